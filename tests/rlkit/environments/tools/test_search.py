"""The tool `search`: BM25 by hand, a corpus's file, and a retriever's server."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.environments.base import Action, Task
from rlkit.environments.tools.bm25 import BM25
from rlkit.environments.tools.environment import Tools
from rlkit.environments.tools.search import Search
from rlkit.experience import ToolCall, UserError
from rlkit.rollout.hosts import EpisodeFailedError, InlineHost

TEXTS = ["the cat sat", "the cat and the dog", "a bird", "dog dog dog dog"]


def test_scores_by_hand() -> None:
    # 14 words in four texts: 3.5 on average. `cat` and `dog` are in two texts each: idf = ln(1 + 2.5 / 2.5) = ln 2.
    # tf / (tf + 1.2 (0.25 + 0.75 length / 3.5)): lengths 3, 5, 2, 4.
    index = BM25(TEXTS)
    first = math.log(2) * 1 / (1 + 0.3 + 0.9 * 3 / 3.5)
    second = math.log(2) * 1 / (1 + 0.3 + 0.9 * 5 / 3.5)
    last = math.log(2) * 4 / (4 + 0.3 + 0.9 * 4 / 3.5)
    np.testing.assert_allclose(index.scores("Cat!"), [first, second, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(index.scores("cat dog"), [first, 2 * second, 0, last], rtol=1e-12)
    np.testing.assert_allclose(index.scores("dog, DOG"), [0, 2 * second, 0, 2 * last], rtol=1e-12)
    # `bird` is in one text: idf = ln(1 + 3.5 / 1.5).
    np.testing.assert_allclose(index.scores("bird")[2], math.log(10 / 3) / (1 + 0.3 + 0.9 * 2 / 3.5), rtol=1e-12)
    assert [number for number, _ in index.best("cat dog", 2)] == [1, 3]
    assert index.best("fish", 3) == [] and index.best("", 3) == []


def test_of_equal_texts_the_first_come_first() -> None:
    index = BM25(["x y", "x", "z", "x", "x"])
    assert [number for number, _ in index.best("x", 3)] == [1, 3, 4]
    assert [number for number, _ in index.best("x", 9)] == [1, 3, 4, 0]


def test_against_every_document_by_itself() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.zipf(1.5, rng.integers(1, 30)) if n < 99) for _ in range(200)]
    bags = [text.split() for text in texts]
    mean = sum(map(len, bags)) / len(bags)

    def score(query: list[str], bag: list[str]) -> float:
        total = 0.0
        for word in query:
            holding, tf = sum(word in other for other in bags), bag.count(word)
            idf = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
            total += idf * tf / (tf + 1.2 * (0.25 + 0.75 * len(bag) / mean))
        return total

    query = ["w1", "w7", "w40", "w2"]
    expected = [score(query, bag) for bag in bags]
    index = BM25(texts)
    np.testing.assert_allclose(index.scores(" ".join(query)), expected, rtol=1e-12)
    best = sorted(range(200), key=lambda number: (-index.scores(" ".join(query))[number], number))[:10]
    assert [number for number, _ in index.best(" ".join(query), 10)] == best


def test_nothing_to_search_in() -> None:
    assert BM25([]).best("x", 1) == []
    assert BM25(["", "!"]).best("x", 1) == []


# -- the tool ------------------------------------------------------------------------------------------------------


def ask(query: str, **options: Any) -> str:
    return asyncio.run(answer(query, **options))


async def answer(query: str, **options: Any) -> str:
    seconds = options.pop("step_timeout_seconds", 30.0)
    config = Tools.Config(tools=[{"kind": "search", **options}], step_timeout_seconds=seconds, placement="inline")
    host = InlineHost(Tools, config)
    await host.start()
    await host.open("1", Task("1"), 0)
    try:
        step = await host.step("1", Action("", (ToolCall("search", {"query": query}),)))
    finally:
        await host.close("1")
    (message,) = step.observation
    content: str = message.content  # type: ignore[union-attr]
    return content


def test_a_file_is_searched(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": n, "contents": text, "name": f"Text {n}"} for n, text in enumerate(TEXTS)]
    corpus.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    found = ask("dog", corpus=corpus, text_column="contents", title_column="name", documents=1)
    assert found == "[1] Text 3\ndog dog dog dog"
    found = ask("cat", corpus=corpus, text_column="contents")
    assert found == "[1] the cat sat\n\n[2] the cat and the dog"
    assert ask("fish", corpus=corpus, text_column="contents") == "nothing was found"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 1}\n', "line 2 has no text in 'text'; it has text"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2 has no text in 'text'; it has body"),
        ('{"text": "a"}\n\n[1]\n', "line 3 is list, not a JSON object"),
        ('{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(content)
    with pytest.raises(UserError, match=f"{corpus}, {message}"):
        Search(corpus=corpus).prepare()
    corpus.write_text("")
    assert Search(corpus=corpus).check(30.0) == [f"search: {corpus} is empty"]


@contextmanager
def retriever(said: Any, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(405, {})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.reply(status, said)

        def reply(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/retrieve", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


SCORED = [
    {"document": {"id": "7", "contents": '"Graz"\nA city.'}, "score": 0.9},
    {"document": {"text": "b"}, "score": 0},
]


@pytest.mark.parametrize("result", [[SCORED], SCORED, [[one["document"] for one in SCORED]]])
def test_a_retriever_is_asked(result: Any) -> None:
    with retriever({"result": result}) as (url, asked):
        assert ask("a city", url=url, documents=2) == '[1] "Graz"\nA city.\n\n[2] b'
        assert asked == [{"query": "a city", "queries": ["a city"], "topk": 2, "return_scores": True}]


def test_what_is_wrong_with_a_retriever_is_not_the_policys_doing() -> None:
    with retriever({}, 404) as (url, _), pytest.raises(EpisodeFailedError, match=r"failure: search: .*HTTP 404"):
        ask("a", url=url)
    with retriever({"answer": 1}) as (url, asked), pytest.raises(EpisodeFailedError, match="like a retriever"):
        ask("a", url=url, step_timeout_seconds=1.0)
    assert len(asked) > 1  # it may be one that is starting
    with pytest.raises(UserError, match="no retriever answers there"):
        ask("a", url=url)
