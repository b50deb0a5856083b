"""`python -m rlkit.serve`: real servers, asked over HTTP; rewards that hang, die and raise behind them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from reward_samples import make_group
from serve_fixture import Server, left_after, misbehaving

from rewards.base import RewardConfig
from rlkit.experience.wire import SCHEMA_VERSION, encode

MISBEHAVING = ("reward._target_=reward_samples.Misbehaving", "reward.timeout_seconds=1")


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("rule") / "log.txt", "reward=rule", "serve.max_body_mib=0.1").ready()
    yield server
    assert server.end() == 0, server.text


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("broken") / "log.txt",
        *MISBEHAVING,
        "serve.max_batch_samples=8",
        "serve.max_queued_samples=8",
    ).ready()
    yield server
    server.end()


def scores(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [
        score["reason"] if score["value"] is None else score["value"]
        for group in answer.json()["groups"]
        for score in group["samples"]
    ]


def test_scores_arrive_in_order(rule: Server) -> None:
    first, second = make_group("x", ["#### 42", "#### 41", "no answer"]), make_group("y", ["#### 42"], answer=None)
    answer = rule.post(first, second)
    right, wrong, none, no_gold = scores(answer)
    assert (right, wrong, none) == (1.0, 0.0, 0.0)
    assert no_gold.startswith("no_gold: "), "what cannot be judged is invalid, not zero"
    content = answer.json()
    assert content["schema_version"] == SCHEMA_VERSION
    assert [group["id"] for group in content["groups"]] == ["x", "y"]
    assert content["groups"][0]["samples"][0]["components"] == {"correct": 1.0, "format": 1.0}
    assert "gold '42'" in content["groups"][0]["samples"][0]["trace"]
    assert rule.post().json()["groups"] == []


def test_health_says_what_is_served(rule: Server) -> None:
    health = rule.get("/health").json()
    assert health["status"] == "ok"
    assert health["reward"] == "rewards.verifiers.math.MathReward"
    asked = {name: health["traits"][name] for name in ("references", "answer", "columns")}
    assert asked == {"references": False, "answer": True, "columns": []}
    assert health["traits"]["process_rewards"] is False
    assert health["call_timeout_seconds"] == RewardConfig().timeout_seconds
    assert health["model_version"].startswith("MathReward-")
    (worker,) = health["workers"]
    assert worker["alive"]
    assert psutil.pid_exists(worker["pid"])
    assert worker["self_test"]["samples"] == 2
    assert rule.get("/v1/schema").json()["request"]["properties"]["groups"]


def test_metrics_count_samples_and_failures(rule: Server) -> None:
    def counted(name: str) -> float:
        lines = [line for line in rule.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    names = (
        "rlkit_samples_total ",
        'rlkit_failed_samples_total{reason="no_gold"}',
        'rlkit_requests_total{status="200"}',
    )
    before = [counted(name) for name in names]
    rule.post(make_group("x", ["#### 42", "a"]), make_group("y", ["#### 42"], answer=None))
    assert [counted(name) - old for name, old in zip(names, before, strict=True)] == [3, 1, 1]
    assert counted("rlkit_scoring_seconds_count") >= 1


def request(change: str) -> bytes:
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "groups": [json.loads(encode(make_group("x", ["a b", "c"])))],
    }
    group = body["groups"][0]
    if change == "another version":
        body["schema_version"] = SCHEMA_VERSION + 1
    elif change == "an unknown key":
        group["reward"] = 1
    elif change == "text as a number":
        group["samples"][0]["token_ids"] = ["1"]
    elif change == "a number too large":
        group["samples"][0]["token_ids"] = [2**40]
    elif change == "lengths that differ":
        group["samples"][0]["mask"] = [True]
    elif change == "no sample":
        group["samples"] = []
    elif change == "NaN in a column":
        group["prompt"]["columns"] = {"weight": float("nan")}
    elif change == "no JSON":
        return b"\x80\x04K\x01."  # a pickle
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("another version", f"schema_version: Input should be {SCHEMA_VERSION}"),
        ("an unknown key", "groups.0.reward: Extra inputs"),
        ("text as a number", "groups.0.samples.0.token_ids.0"),
        ("a number too large", "groups.0.samples.0.token_ids: "),
        ("lengths that differ", "2 tokens but a mask of 1"),
        ("no sample", "groups.0.samples"),
        ("NaN in a column", "groups.0.prompt.columns"),
        ("no JSON", "Invalid JSON"),
    ],
)
def test_a_malformed_request_is_refused_by_name(rule: Server, change: str, said: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{rule.url}/v1/score", content=request(change), headers=headers, trust_env=False)
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    answer = httpx.post(f"{rule.url}/v1/score", content=request(""), headers=headers, trust_env=False)
    assert answer.status_code == 200


def test_large_bodies_and_other_types_are_refused(rule: Server) -> None:
    headers = {"Content-Type": "application/json"}
    url, much = f"{rule.url}/v1/score", b" " * 200_000
    assert httpx.post(url, content=much, headers=headers, trust_env=False).status_code == 413
    streamed = httpx.post(url, content=iter([much[:60_000]] * 3), headers=headers, trust_env=False)
    assert streamed.status_code == 413, "without Content-Length, too"
    assert httpx.post(url, content=b"x", headers={"Content-Type": "application/octet-stream"}).status_code == 415
    assert rule.get("/health").status_code == 200


def test_a_web_page_under_another_name_gets_nothing(rule: Server) -> None:
    assert rule.get("/health", Host="evil.example:80").status_code == 403
    assert rule.get("/health", Host="localhost:80").status_code == 200


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        pytest.param("hang", "timeout: no answer within the server's reward.timeout_seconds=1", marks=pytest.mark.slow),
        ("hang in C", "timeout: no answer within the server's reward.timeout_seconds=1"),
        ("die", "crash: the reward's process"),
        ("raise", "exception: RuntimeError: the judge is offline"),
        ("None", "wrong_type: score() returned NoneType"),
        ("string", "wrong_type: score() returned str"),
        ("nan", "not_finite: the score is nan"),
        ("sample missing", "wrong_length: 1 scores for the 2 samples"),
    ],
)
def test_a_reward_that_fails_is_invalid_and_the_server_goes_on(broken: Server, order: str, reason: str) -> None:
    before = broken.get("/health").json()["workers"][0]
    outcomes = scores(broken.post(misbehaving(order)))
    assert str(outcomes[0]).startswith(reason)
    assert scores(broken.post(misbehaving("fine"))) == [1.0, 2.0]
    replaced = order in ("hang", "hang in C", "die", "raise")
    after = broken.get("/health").json()["workers"][0]
    assert (after["pid"] != before["pid"]) == replaced
    assert after["restarts"] - before["restarts"] == (2 if replaced else 0)
    assert not psutil.pid_exists(before["pid"]) or not replaced, "a replaced process is gone"


@pytest.mark.slow
def test_a_bad_request_does_not_spoil_those_scored_with_it(broken: Server) -> None:
    with ThreadPoolExecutor(4) as threads:
        hung = threads.submit(broken.post, misbehaving("hang"))  # occupies the process; the others wait
        broken.until_busy()
        died_answer = threads.submit(broken.post, misbehaving("die"))
        broken.until_queued(2)  # the reward does what the first group says
        fine_answer = threads.submit(broken.post, misbehaving("fine"))
        assert str(scores(hung.result())[0]).startswith("timeout")
        died, fine = scores(died_answer.result()), scores(fine_answer.result())
    assert all(str(reason).startswith("crash") for reason in died)
    assert fine == [1.0, 2.0]


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back(broken: Server) -> None:
    with ThreadPoolExecutor(8) as threads:
        hung = threads.submit(broken.post, misbehaving("hang"))
        broken.until_busy()
        waiting = [threads.submit(broken.post, misbehaving("fine", str(i))) for i in range(6)]
        answers = [answer.result() for answer in waiting]
        hung.result()
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert "samples are already waiting" in answer.json()["error"]


@pytest.mark.slow
def test_what_nobody_waits_for_is_not_scored(broken: Server) -> None:
    with ThreadPoolExecutor(2) as threads:
        hung = threads.submit(broken.post, misbehaving("hang"))
        broken.until_busy()
        late = threads.submit(broken.post, misbehaving("fine"), deadline_seconds=0.1)
        assert late.result().status_code == 503
        assert "longer than its client" in late.result().json()["error"]
        hung.result()


def test_a_request_for_too_many_samples_is_told_the_limit(broken: Server) -> None:
    many = [make_group(str(i), ["a", "b", "c"]) for i in range(3)]
    answer = broken.post(*many)
    assert answer.status_code == 413
    assert "serve.max_batch_samples=8" in answer.json()["error"]
    assert len(scores(broken.post(make_group("one group is never cut", ["a"] * 9)))) == 9


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_open_requests_finish_and_nothing_is_left(tmp_path: Path, number: int) -> None:
    server = Server(tmp_path / "log.txt", *MISBEHAVING, "reward.timeout_seconds=3", "serve.end_seconds=60").ready()
    family = server.family()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, misbehaving("hang"))
        server.until_busy()
        assert server.end(number) == 0, server.text
        assert str(scores(answer.result())[0]).startswith("timeout")
    assert server.text.endswith("ended\n")
    assert left_after(family, 5) == []


@pytest.mark.slow
def test_a_killed_server_takes_a_hung_reward_along(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "reward._target_=reward_samples.Misbehaving").ready()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(server.post, misbehaving("hang in C"))
        server.until_busy()
        family = server.kill()
        with pytest.raises(httpx.HTTPError):
            answer.result()
    assert len(family) > 1
    assert left_after(family, 10) == []


def test_a_reward_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", *MISBEHAVING, "reward.fail_start=true")
    assert server.process.wait(timeout=60) == 1
    assert "reward reward_samples.Misbehaving cannot start: ValueError: the model folder is empty" in server.text


@pytest.mark.slow
def test_ending_while_it_loads(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "reward=polar")
    deadline = time.monotonic() + 30
    while "loading" not in server.text and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    family = server.family()
    assert server.end() == 0, server.text
    assert left_after(family, 5) == []


def test_a_port_in_use_is_found_before_loading(rule: Server, tmp_path: Path) -> None:
    second = Server(tmp_path / "log.txt", "reward=rule", port=rule.port)
    assert second.process.wait(timeout=30) == 2
    assert "cannot listen there: Address already in use" in second.text
    assert "loading" not in second.text


def test_with_a_token_nothing_is_answered_without_it(tmp_path: Path) -> None:
    token = "a-token-of-some-length"
    server = Server(
        tmp_path / "log.txt",
        "reward=rule",
        "serve.host=0.0.0.0",
        "serve.token_env=A_TOKEN",
        environment={"A_TOKEN": token},
    ).ready()
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
            for path in ("/health", "/metrics", "/v1/schema", "/nothing"):
                assert server.get(path, **headers).status_code == 401
            assert server.post(make_group("x", ["#### 42"]), headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {token}"}
        assert server.get("/health", **right).status_code == 200
        assert scores(server.post(make_group("x", ["#### 42"]), headers=right)) == [1.0]
        assert token not in server.text
    finally:
        server.end()


@pytest.mark.slow
def test_processes_work_side_by_side(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", *MISBEHAVING, "reward.workers=2", "reward.timeout_seconds=5").ready()
    try:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(3):  # on a machine that stalls, a call may be over before anybody looks
                hung = threads.submit(server.post, misbehaving("hang"))
                with contextlib.suppress(AssertionError):
                    server.until_busy(15)
                    break
            assert scores(server.post(misbehaving("fine"))) == [1.0, 2.0]
            assert not hung.done()
            hung.result()
        pids = [worker["pid"] for worker in server.get("/health").json()["workers"]]
        assert len(set(pids)) == 2
        os.kill(pids[0], signal.SIGKILL)
        outcomes = [scores(server.post(misbehaving("fine"))) for _ in range(3)]
        assert outcomes == [[1.0, 2.0]] * 3, "a process that died between two calls costs no sample"
    finally:
        server.end()
