"""`reward=remote` against small servers that answer what a healthy reward server never would."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from reward_samples import make_group

from rewards.base import RewardConfig, RewardContext, RewardTraits
from rewards.remote import BUDGET_SHARE, RemoteReward
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group
from rlkit.experience.wire import SCHEMA_VERSION, Traits


def client(url: str, **options: Any) -> RemoteReward:
    reward = RemoteReward(RemoteReward.Config(url=url, **options), RewardContext())
    reward.start()
    return reward


def outcomes(reward: RemoteReward, *groups: Group) -> list[str | float | None]:
    try:
        return [s.value if s.valid else s.reason for scores in reward.score(groups) for s in scores.samples]
    finally:
        reward.close()


def only_problem(tmp_path: Path, url: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(["reward=remote", f"reward.url={url}", f"run_dir={tmp_path / 'run'}"])
    (problem,) = error.value.problems
    return str(problem)


Answer = Callable[[int, Any], tuple[int, Any, dict[str, str]]]
"""(number of the request, its body) -> status, body, headers."""


class OddServer:
    """Says it is a reward server; what it answers is up to the test."""

    def __init__(self, answer: Answer, **health: Any) -> None:
        self.requests: list[Any] = []
        described = {
            "status": "ok", "schema_version": SCHEMA_VERSION, "rlkit_version": "0", "reward": "odd.Odd",
            "model_version": "odd-1", "traits": {name: getattr(RewardTraits(), name) for name in Traits.model_fields},
            "trainable": False, "max_request_samples": 100,
            "max_body_bytes": 10**6, "call_timeout_seconds": 120.0, "workers": [], **health,
        }  # fmt: skip
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, described, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                self.reply(*answer(len(server.requests), body))

            def reply(self, status: int, content: Any, headers: dict[str, str]) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def odd() -> Iterator[Callable[..., OddServer]]:
    servers: list[OddServer] = []

    def begin(answer: Answer, **health: Any) -> OddServer:
        servers.append(OddServer(answer, **health))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def good(body: Any, value: Any = 1.0) -> dict[str, Any]:
    """A right answer to a request."""
    groups = [
        {"id": g["id"], "samples": [{"value": value, "valid": True} for _ in g["samples"]]} for g in body["groups"]
    ]
    return {"schema_version": SCHEMA_VERSION, "model_version": "odd-1", "groups": groups}


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(odd: Callable[..., OddServer], status: int) -> None:
    server = odd(lambda number, body: (status, {}, {}) if number < 3 else (200, good(body), {}))
    assert outcomes(client(server.url), make_group("g", ["x"])) == [1.0]
    assert len(server.requests) == 3


def test_a_server_may_say_how_long_to_wait(odd: Callable[..., OddServer]) -> None:
    server = odd(lambda number, body: (429, {}, {"Retry-After": "1"}) if number < 2 else (200, good(body), {}))
    began = time.monotonic()
    assert outcomes(client(server.url), make_group("g", ["x"])) == [1.0]
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_would_be_the_same_again_is_not_tried_again(odd: Callable[..., OddServer], status: int) -> None:
    server = odd(lambda number, body: (status, {"error": "no"}, {}))
    assert str(outcomes(client(server.url), make_group("g", ["x"]))[0]).startswith("refused: ")
    assert len(server.requests) == 1


def test_a_group_that_is_refused_is_found_among_others(odd: Callable[..., OddServer]) -> None:
    def answer(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        return (422, {}, {}) if any(g["id"] == "g5" for g in body["groups"]) else (200, good(body), {})

    server = odd(answer)
    values = outcomes(client(server.url), *(make_group(f"g{i}", ["x"]) for i in range(8)))
    assert [i for i, value in enumerate(values) if value != 1.0] == [5]
    assert len(server.requests) == 7, "halved until it is alone: 8, 4, 4, 2, 2, 1, 1"


def test_tries_are_bounded(odd: Callable[..., OddServer]) -> None:
    server = odd(lambda number, body: (500, {"error": "a bug"}, {}))
    (reason,) = outcomes(client(server.url, attempts=3), make_group("g", ["x"]))
    assert str(reason).startswith("unreachable: ")
    assert "a bug" in str(reason)
    assert "(3 tries)" in str(reason)
    assert len(server.requests) == 3


def test_a_server_that_never_answers_is_given_up(odd: Callable[..., OddServer]) -> None:
    release = threading.Event()

    def answer(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        if body["groups"][0]["id"] == "slow":
            release.wait(30)
        return 200, good(body), {}

    server = odd(answer)
    reward = client(server.url, timeout_seconds=2, samples_per_request=1)
    began = time.monotonic()
    values = outcomes(reward, make_group("slow", ["x"]), make_group("quick", ["x"]))
    release.set()
    assert str(values[0]).startswith(f"timeout: no scores from {server.url}/v1/score within 1.6 s")
    assert values[1] == 1.0, "what came in time is kept"
    assert time.monotonic() - began < 5
    assert 0 < server.requests[0]["deadline_seconds"] <= 1.6


def one_score(**score: Any) -> dict[str, Any]:
    """An answer for group g with this score."""
    groups = [{"id": "g", "samples": [{"value": 1.0, "valid": True, **score}]}]
    return {"schema_version": SCHEMA_VERSION, "model_version": "odd-1", "groups": groups}


@pytest.mark.parametrize(
    "content",
    [
        b"no JSON",
        json.dumps(one_score(value=math.nan)).encode(),
        one_score(value="1"),
        one_score(valid=False),
        one_score(value=None),
        one_score(components={"a": None}),
        {**one_score(), "groups": []},
        {**one_score(), "groups": [{**one_score()["groups"][0], "id": "h"}]},
        {**one_score(), "schema_version": SCHEMA_VERSION + 1},
    ],
)
def test_an_answer_against_the_schema_is_invalid_and_never_zero(odd: Callable[..., OddServer], content: Any) -> None:
    server = odd(lambda number, body: (200, content, {}))
    assert str(outcomes(client(server.url), make_group("g", ["x"]))[0]).startswith("wrong_answer: ")
    assert len(server.requests) == 1


def test_another_version_of_the_messages_is_refused(odd: Callable[..., OddServer], tmp_path: Path) -> None:
    server = odd(lambda number, body: (200, good(body), {}), schema_version=SCHEMA_VERSION + 1)
    said = only_problem(tmp_path, server.url)
    assert f"speaks version {SCHEMA_VERSION + 1} of the messages, this client {SCHEMA_VERSION}; install" in said


def test_a_body_larger_than_the_server_takes_is_cut_before_it_is_sent(odd: Callable[..., OddServer]) -> None:
    server = odd(lambda number, body: (200, good(body), {}), max_body_bytes=3000)
    values = outcomes(
        client(server.url), make_group("a", ["x"]), make_group("b", ["word " * 2000]), make_group("c", ["x"])
    )
    assert [values[0], values[2]] == [1.0, 1.0]
    assert "serve.max_body_mib" in str(values[1])
    assert all([len(group["samples"]) for group in request["groups"]] for request in server.requests)


def test_by_default_a_client_waits_for_both_tries_of_a_server(
    odd: Callable[..., OddServer], caplog: pytest.LogCaptureFixture
) -> None:
    budget = BUDGET_SHARE * RemoteReward.Config(url="http://h:1").timeout_seconds
    assert budget >= 2 * RewardConfig().timeout_seconds + 30, "and for a new process in between"
    server = odd(lambda number, body: (200, good(body), {}), call_timeout_seconds=RewardConfig().timeout_seconds)
    client(server.url)
    assert "gives up" not in caplog.text
    client(server.url, timeout_seconds=120)
    assert "gives up after 96 s" in caplog.text and "for 240 s (2 tries of 120 s each); set at least 300" in caplog.text
