"""Data larger than memory: the same problems and prompts in the same order, of which few are alive at a time."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from table_fixture import write

from rlkit.data import stored
from rlkit.data.base import DataError, DataSource, Problem
from rlkit.data.conversations import render_recorded
from rlkit.data.files import FileSource
from rlkit.data.mixture import Mixture
from rlkit.data.order import order_of
from rlkit.data.recorded import ChatSource, PairsSource, ResponsesSource
from rlkit.data.rendering import CHUNK, load_tokenizer, render
from rlkit.experience import Prompt
from rlkit.models.folder import model_folder

ROWS = 1200
TOKENIZER = load_tokenizer(model_folder("embedded:policy"))


def rows(kind: str) -> list[Any]:
    """Of each kind some that cannot be used."""
    asked = [f"What is {i} + {i % 7}?" for i in range(ROWS)]
    match kind:
        case "pairs":
            return [{"prompt": q, "chosen": f"{i}", "rejected": f"{i % 90}"} for i, q in enumerate(asked)]
        case "responses":
            some = [(asked[i % 500], f"{i}", i % 2) for i in range(ROWS)]
            return [{"prompt": q, "completion": a, "label": None if a == "77" else b} for q, a, b in some]
        case "chat":
            return [{"messages": [{"role": r, "content": q} for r in ("user", "assistant")]} for q in asked]
        case _:
            return [{"question": q, "answer": "#### 1" if i % 50 else "cut off"} for i, q in enumerate(asked)]


def source(kind: str, folder: Path) -> DataSource:
    classes = {"pairs": PairsSource, "responses": ResponsesSource, "chat": ChatSource, "jsonl": FileSource}
    paths = {name: str(write(folder / f"{name}.jsonl", rows(name))) for name in classes}
    fields = {"max_bad_row_share": 0.2}
    if kind == "mixture":
        members = {name: {"kind": name, "path": paths[name], **fields} for name in ("pairs", "jsonl")}
        return Mixture(Mixture.Config(sources=members, **fields), 0)
    return classes[kind](classes[kind].Config(path=paths[kind], **fields), 0)


def drawn(kind: str, folder: Path) -> tuple[Any, ...]:
    """What a run sees: prompts in the order they are drawn, unusable rows, held-out problems, the position."""
    data = source(kind, folder)
    problems, bad = data.load("train")
    if kind == "jsonl":
        prompts, unusable = render(problems, TOKENIZER, 30)
    else:
        prompts, unusable = render_recorded(problems, TOKENIZER, [TOKENIZER.eos_token_id], 30, 20)
    order = order_of(prompts, 3, data.weights())
    taken = [told(prompt) for prompt in order.take(len(prompts) + 100)]
    resumed = order_of(prompts, 4, data.weights())
    resumed.load_state_dict(order.state_dict())
    again = [told(prompt) for prompt in resumed.take(20)]
    named = {id: told(prompt) for id, prompt in order.named({prompts[1].id, prompts[-1].id}).items()}
    return taken, again, named, bad, unusable, list(data.load("heldout")[0]), order.state_dict()


def told(prompt: Prompt) -> Any:
    if prompt.recorded is None:
        return prompt
    samples = [(s.token_ids.tolist(), s.text, s.index) for s in prompt.recorded.samples]
    return prompt.id, prompt.token_ids, prompt.columns, samples, prompt.recorded.scores


@pytest.mark.parametrize("kind", ["pairs", "responses", "chat", "jsonl", "mixture"])
def test_the_same_prompts_in_the_same_order(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drawn(kind, tmp_path)
    monkeypatch.setattr(stored, "IN_MEMORY_BYTES", 1000)
    assert isinstance(source(kind, tmp_path).load("train")[0], stored.Filed)
    assert drawn(kind, tmp_path) == expected


def test_few_problems_and_prompts_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY_BYTES", 1000)
    most: Counter[type] = Counter()
    chunk, written = stored._SAMPLED, stored._write

    def alive() -> Counter[type]:
        return Counter(type(one) for one in gc.get_objects() if type(one) in (Problem, Prompt))

    before = alive()  # of other tests

    def counting(items: Any) -> Any:
        def counted() -> Any:
            for i, item in enumerate(items):
                if i % 300 == 299:
                    now = alive() - before
                    most.update({kind: max(0, count - most[kind]) for kind, count in now.items()})
                yield item

        return written(counted())

    monkeypatch.setattr(stored, "_write", counting)
    problems, _ = source("pairs", tmp_path).load("train")
    assert 0 < most[Problem] <= 2 * chunk
    prompts, _ = render_recorded(problems, TOKENIZER, [TOKENIZER.eos_token_id], 64, 64)
    order_of(prompts, 0, {}).take(64)
    assert len(prompts) > 1000
    assert 0 < most[Prompt] <= CHUNK + 2 * chunk and most[Problem] <= 2 * CHUNK + 2 * chunk


def test_it_is_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stored.stored(iter(range(300)))
    assert plain == list(range(300)) and stored.picked(plain, [4, 2]) == [4, 2]
    monkeypatch.setattr(stored, "IN_MEMORY_BYTES", 10)
    filed = stored.stored(iter(range(300)))
    assert isinstance(filed, stored.Filed)
    assert list(filed) == plain and filed[2:9:3] == plain[2:9:3] and filed[-1] == 299 and filed[::-100] == plain[::-100]
    some = stored.picked(stored.picked(filed, [7, 5, 3]), [2, 0])
    assert list(some) == [3, 7] and len(some) == 2
    with pytest.raises(IndexError):
        filed[300]
    assert list(stored.picked(filed, [])) == []


def test_the_file_lies_where_the_user_says_while_ray_starts_beside_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes get a folder of their own by the driver's environment, often in memory."""
    monkeypatch.setattr(stored, "IN_MEMORY_BYTES", 10)
    monkeypatch.setenv("TMPDIR", "/of/ray")
    assert isinstance(stored.stored(["a" * 100]), stored.Filed)


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(stored, "FOLDER", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="TMPDIR"):
        stored.stored(["a" * 100])
    limit, folder = 10_000, tmp_path / "full"
    folder.mkdir()
    monkeypatch.setattr(stored, "FOLDER", str(folder))
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DataError, match=r"File too large.*TMPDIR"):
            stored.stored(str(i) * 1000 for i in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
