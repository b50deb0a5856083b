"""POLAR behind HTTP: wire formats, chunks, what is tried again and what is not, and that every call ends."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polar_fixture import tiny_discriminator
from polar_server import FORMATS, FakeServer, fake_server, hang_up, no_gzip, reply, status, trickle
from pydantic import ValidationError
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.polar.backends import DiscriminatorError, plain_scores
from rewards.polar.reward import PolarReward
from rewards.polar.servers import WIRES, Server, ServerBackend, ServerError, WrongAnswer, chunks, last_number
from rlkit.experience import Group
from rlkit.models.packing import Tree

KINDS = sorted(FORMATS)
TREES = [Tree((1, 20, 30), [(40, 4), (41, 42, 4)]), Tree((1, 21), [(43, 4), (44, 4), (45, 46, 47, 4)])]
SEQUENCES = [[*tree.prefix, *suffix] for tree in TREES for suffix in tree.suffixes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_discriminator(tmp_path_factory.mktemp("polar"))


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[FakeServer]:
    one_at_a_time = threading.Lock()

    def scores(rows: list[list[int]]) -> list[float]:
        # Two threads that load models side by side leave transformers without its tying of weights, for ever: it
        # replaces a method of all models meanwhile, and the second takes the replacement for the original.
        with one_at_a_time:
            return plain_scores(folder, "cpu", "float32", rows)

    with fake_server(request.param, scores) as fake:
        fake.kind = request.param  # type: ignore[attr-defined]
        yield fake


@pytest.fixture
def lengths() -> Iterator[FakeServer]:
    """A server whose score is the length of the input."""
    with fake_server("http_sglang", lambda rows: [float(len(row)) for row in rows]) as fake:
        yield fake


def backend(server: FakeServer, seconds: float = 10.0, **options: Any) -> ServerBackend:
    return ServerBackend(Server((server.url,), WIRES["http_sglang"], **options), seconds)


def reward_of(folder: Path, server: FakeServer, **options: Any) -> PolarReward:
    config = PolarReward.Config(model_path=str(folder), backend=server.kind, urls=(server.url,), **options)  # type: ignore[attr-defined, call-arg]
    return PolarReward(config, RewardContext(threads=1))


def groups() -> list[Group]:
    texts = ["#### 42", "#### 41", "", "#### 42", "a longer answer\n#### 7"]
    return [make_group("a", texts), make_group("b", ["six", "seven"], question="How many?", references=("6", "six"))]


# ---- the same scores -------------------------------------------------------------------------------------------------


def test_scores_over_http_are_those_in_process(folder: Path, server: FakeServer) -> None:
    options = {"max_references": 2, "tokens_per_request": 130, "dtype": "float32"}
    remote = reward_of(folder, server, **options)
    remote.start()
    local = PolarReward(PolarReward.Config(model_path=str(folder), max_references=2), RewardContext(threads=1))  # type: ignore[call-arg]
    local.start()
    for found, expected in zip(remote.score(groups()), local.score(groups()), strict=True):
        for one, other in zip(found.samples, expected.samples, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-4)
            np.testing.assert_allclose(one.ensemble, other.ensemble, atol=1e-4)
    sizes = [sum(map(len, body[server.key])) for body in server.bodies[1:]]
    assert len(sizes) > 2 and max(sizes) <= 130, "several requests, each within its tokens"
    assert remote.score([]) == []


def test_the_request_is_what_the_server_documents(server: FakeServer) -> None:
    wire = WIRES[server.kind]  # type: ignore[attr-defined]
    found = ServerBackend(Server((server.url,), wire, "POLAR-7B", "secret"), 10).score(TREES)
    assert server.bodies == [{server.key: SEQUENCES, "model": "POLAR-7B"}]
    assert server.keys == ["Bearer secret"] and len(found) == 5


def test_vllm_is_told_to_leave_the_activation_off() -> None:
    wire = WIRES["http_vllm"]
    assert wire.body([(1, 2)], None) == {"input": [[1, 2]], "use_activation": False}
    classifier = {"data": [{"index": 1, "data": [-2.0]}, {"index": 0, "data": [3.5]}]}
    assert wire.scores(classifier, 2) == [3.5, -2.0]
    per_token = {"data": [{"index": 0, "data": [[0.1], [0.2], [-7.5]]}]}
    assert wire.scores(per_token, 1) == [-7.5]


@pytest.mark.parametrize("entry", [-7.5, [-7.5], [[0.3], [-7.5]]])
def test_a_score_is_the_last_number(entry: Any) -> None:
    assert last_number(entry) == -7.5


def test_null_is_not_a_number_and_text_is_refused() -> None:
    assert np.isnan(last_number([None]))
    for entry in ("7", [], True, {}):
        with pytest.raises(WrongAnswer, match="instead of a score"):
            last_number(entry)


# ---- what is tried again ---------------------------------------------------------------------------------------------


FAULTS = {"503": status(503), "429": status(429), "500": status(500), "cut": hang_up, "no gzip": no_gzip}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_may_pass_is_tried_again(lengths: FakeServer, fault: Any) -> None:
    lengths.faults = [fault, fault]
    assert backend(lengths).score(TREES) == [5, 6, 4, 4, 6]
    assert len(lengths.bodies) == 3


@pytest.mark.parametrize(("code", "text"), [(401, "no key"), (403, "no"), (404, "Not Found"), (405, "no")])
def test_what_will_not_pass_ends_at_once(lengths: FakeServer, code: int, text: str) -> None:
    lengths.always = status(code, text)
    with pytest.raises(ServerError, match=f"HTTP {code}: {text}.*would not help"):
        backend(lengths).score(TREES)
    assert len(lengths.bodies) == 1


def test_one_input_that_is_refused_is_found(lengths: FakeServer) -> None:
    def too_long(handler: Any, body: dict[str, Any]) -> bool:
        if max(map(len, body["input_ids"])) <= 5:
            return False
        reply(handler, 400, "longer than the maximum model length of 5")
        return True

    lengths.always = too_long
    found = backend(lengths).score(TREES)
    assert [found[0], *found[2:4]] == [5, 4, 4]
    for score in (found[1], found[4]):
        assert isinstance(score, str) and score.startswith("refused: ") and "maximum model length of 5" in score


def test_a_refused_input_makes_an_invalid_score(folder: Path, server: FakeServer) -> None:
    reward = reward_of(folder, server)
    reward.start()

    def refuse(handler: Any, body: dict[str, Any]) -> bool:
        if max(map(len, body[server.key])) < 100:
            return False
        reply(handler, 400, "too long")
        return True

    server.always = refuse
    (scores,) = reward.score([make_group("a", ["#### 42", "x" * 150])])
    assert scores.samples[0].valid
    assert scores.samples[1].reason.startswith("refused: ") and "too long" in scores.samples[1].reason


@pytest.mark.parametrize("answer", ["<html>", {"data": []}, [], [{"embedding": ["x"]}] * 5])
def test_an_answer_in_another_format_is_an_error(lengths: FakeServer, answer: Any) -> None:
    lengths.always = status(200, answer)
    with pytest.raises(ServerError, match=r"is this the kind of server that reward\.backend names"):
        backend(lengths).score(TREES)


BYTES = {
    "no UTF-8": (b'[{"embedding": [1.0], "meta": "\xff\xfe"}]', "UnicodeDecodeError"),
    "a number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "ValueError"),
    "a number that no float holds": (b'[{"embedding": [1' + b"0" * 400 + b"]}]", "a number of 401 digits"),
    "nested too deeply": (b"[" * 100_000, "RecursionError"),
}


@pytest.mark.parametrize(("content", "cause"), BYTES.values(), ids=BYTES)
def test_bytes_that_are_no_json_are_the_servers_failure(lengths: FakeServer, content: bytes, cause: str) -> None:
    lengths.always = status(200, content)
    alone = [Tree((1, 2), [(3,)])]
    with pytest.raises(ServerError, match=rf"{lengths.url}/classify: HTTP 200: .*{cause}"):
        backend(lengths).score(alone)


# ---- a clear end -----------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named(lengths: FakeServer) -> None:
    gone = ServerBackend(Server(("http://127.0.0.1:9",), WIRES["http_vllm"]), 0.5)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"no scores for 5 inputs within 0\.5 s from http://127\.0\.0\.1:9.*Connect"):
        gone.score(TREES)
    assert time.monotonic() - started < 3


def test_a_trickle_of_bytes_is_given_up(lengths: FakeServer) -> None:
    lengths.faults = [trickle]
    assert backend(lengths, request_timeout_seconds=0.3).score(TREES) == [5, 6, 4, 4, 6]
    lengths.always = trickle
    with pytest.raises(ServerError, match=r"no answer within 0\.3 s"):
        backend(lengths, seconds=1.5, request_timeout_seconds=0.3).score(TREES)


def test_a_replica_that_died_is_passed_over(lengths: FakeServer) -> None:
    both = Server(("http://127.0.0.1:9", lengths.url), WIRES["http_sglang"], tokens_per_request=6)
    assert ServerBackend(both, 10).score(TREES) == [5, 6, 4, 4, 6]


def test_a_server_that_comes_back_is_used_again() -> None:
    def scores(rows: Any) -> list[float]:
        return [float(len(row)) for row in rows]

    with fake_server("http_sglang", scores) as first:
        client = backend(first, seconds=20)
        assert client.score(TREES) == [5, 6, 4, 4, 6]
        port = int(first.url.rpartition(":")[2])
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.extend(client.score(TREES)))
    waiting.start()
    time.sleep(0.5)
    assert found == []
    with fake_server("http_sglang", scores, port):
        waiting.join(20)
    assert found == [5, 6, 4, 4, 6]


def test_requests_are_bounded_and_neighbours_stay_together(lengths: FakeServer) -> None:
    def slow(handler: Any, body: dict[str, Any]) -> bool:
        time.sleep(0.05)
        return False

    lengths.always = slow
    many = [Tree((1,), [(2,) * n for n in range(1, 21)])]
    found = backend(lengths, concurrent_requests=3, tokens_per_request=25).score(many)
    assert found == [n + 1 for n in range(1, 21)]
    assert 2 <= lengths.most_open <= 3
    assert chunks([[1] * 4, [2] * 4, [3] * 9, [4]], 8) == [[[1] * 4, [2] * 4], [[3] * 9], [[4]]]


# ---- at the start ----------------------------------------------------------------------------------------------------


def test_another_model_and_a_sigmoid_are_refused_at_the_start(folder: Path, server: FakeServer) -> None:
    raw = server.scorer
    server.scorer = lambda rows: [1 / (1 + np.exp(-score)) for score in raw(rows)]
    with pytest.raises(DiscriminatorError, match="sigmoid of the raw scores"):
        reward_of(folder, server).start()
    with pytest.raises(DiscriminatorError, match="all between 0 and 1"):
        reward_of(folder, server, compare_at_start=False).start()
    server.scorer = lambda rows: [score + 1 for score in raw(rows)]
    with pytest.raises(DiscriminatorError, match=rf"self-test failed: {server.kind} at http"):  # type: ignore[attr-defined]
        reward_of(folder, server).start()
    reward_of(folder, server, compare_at_start=False).start()  # nothing to compare with


def test_a_folder_without_weights_serves_where_nothing_is_compared(
    folder: Path, server: FakeServer, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (message,) = PolarReward.check(reward_of(bare, server).config)
    assert "holds no weights" in message and "compare_at_start=false" in message
    trusting = reward_of(bare, server, compare_at_start=False)
    assert PolarReward.check(trusting.config) == []
    trusting.start()
    assert all(score.valid for score in trusting.score(groups())[0].samples)


def test_a_key_that_is_not_there_is_found_before_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLAR_KEY", raising=False)
    config = PolarReward.Config(
        model_path=str(folder), backend="http_vllm", urls=("http://h:1",), api_key_variable="POLAR_KEY"
    )  # type: ignore[call-arg]
    no_key, nobody = PolarReward.check(config)
    assert no_key == "reward.api_key_variable: the environment has no POLAR_KEY"
    assert nobody.startswith("reward.urls: no POLAR server answers there (http://h:1: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "http_vllm"}, "needs urls"),
        ({"urls": ("http://h",)}, "urls has no effect with backend=transformers"),
        ({"backend": "vllm", "compare_at_start": False}, "compare_at_start has no effect with backend=vllm"),
        ({"backend": "http_sglang", "urls": ("h:30000",)}, "'h:30000' is not an address"),
        ({"backend": "http_sglang", "urls": ("http://h",), "memory_gib": 2}, "memory_gib has no effect"),
        ({"backend": "http_sglang", "urls": ("http://h",), "timeout_seconds": 20}, "no time for a second try"),
    ],
)
def test_options_that_cannot_act_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolarReward.Config(**options)
