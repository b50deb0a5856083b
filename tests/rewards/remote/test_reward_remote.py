"""`reward=remote`: its messages, and the client against real servers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_samples import make_group
from serve_fixture import Server
from served_rewards import Everything

from rewards import remote
from rewards.base import RewardContext, RewardTraits
from rewards.remote import RemoteReward
from rewards.verifiers.math import MathReward
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, Message, Prompt, Segment, Span
from rlkit.experience.wire import (
    ScoreRequest,
    Traits,
    UnsendableError,
    WireGroup,
    encode,
    from_wire,
    in_chunks,
    request_body,
    tokens_of,
)

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("rule") / "log.txt",
        "reward=rule",
        "serve.token_env=RLKIT_TEST_TOKEN",
        "serve.max_batch_samples=8",
        environment={"RLKIT_TEST_TOKEN": TOKEN},
    ).ready()
    yield server
    server.end()


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKIT_TEST_TOKEN", TOKEN)
    remote._remembered.clear()


def client(url: str, **options: Any) -> RemoteReward:
    reward = RemoteReward(RemoteReward.Config(url=url, **options), RewardContext())
    reward.start()
    return reward


def outcomes(reward: RemoteReward, *groups: Group) -> list[str | float | None]:
    scored = reward.score(groups)
    assert [len(scores.samples) for scores in scored] == [len(group.samples) for group in groups]
    return [s.value if s.valid else s.reason for scores in scored for s in scores.samples]


# ---------------------------------------------------------------------------------------------- messages


def test_a_group_arrives_as_it_was() -> None:
    group = make_group("g", ["one two 数学 😀", "x"])
    prompt = replace(group.prompt, columns={"weight": np.float32(0.5), "ids": np.arange(2), "text": "a", "none": None})
    sample = replace(
        group.samples[0], mask=np.array([True, False, True, False]), spans=(Span(0, 2, data={"tool": "x"}),)
    )
    sent = replace(group, prompt=prompt, samples=(sample, group.samples[1]), step=7)
    for with_logprobs in (False, True):
        arrived = from_wire(WireGroup.model_validate_json(encode(sent, with_logprobs)))
        assert arrived.prompt == replace(prompt, columns={"weight": 0.5, "ids": [0, 1], "text": "a", "none": None})
        assert (arrived.id, arrived.step) == ("g", 7)
        for mine, theirs in zip(sent.samples, arrived.samples, strict=True):
            assert mine.token_ids.tolist() == theirs.token_ids.tolist()
            assert (mine.text, mine.seed, mine.spans, mine.policy_versions) == (
                theirs.text, theirs.seed, theirs.spans, theirs.policy_versions,
            )  # fmt: skip
            assert mine.trained.tolist() == theirs.trained.tolist()
            assert np.isnan(theirs.logprobs).all() != with_logprobs
            assert not with_logprobs or mine.logprobs.tolist() == theirs.logprobs.tolist()


def test_rows_of_an_episode_arrive_with_what_they_follow() -> None:
    group = make_group("g", ["one two"])
    rows = (Segment(0, 1, np.array([1, 2, 3], np.int32)), Segment(1, 2, np.array([4], np.int32)))
    sent = replace(group, samples=(replace(group.samples[0], segments=rows),))
    (arrived,) = from_wire(WireGroup.model_validate_json(encode(sent))).samples
    plain = [(row.start, row.end, row.context.tolist()) for row in arrived.segments]
    assert plain == [(0, 1, [1, 2, 3]), (1, 2, [4])]
    assert tokens_of(sent) == tokens_of(group) + 4


def test_a_client_is_told_every_trait_that_a_served_reward_can_have() -> None:
    unsaid = {"uses_gpu", "environment", "update_when", "follows_policy"}
    assert {field.name for field in fields(RewardTraits)} - unsaid == set(Traits.model_fields)


def test_the_bytes_of_version_3_stay_as_they_are() -> None:
    """Servers of other rlkit versions that speak the same version of the messages read these."""
    group = make_group("g", ["x"])
    sample = replace(
        group.samples[0], token_ids=np.array([5]), logprobs=np.array([-0.5], np.float32), spans=(Span(0, 1),)
    )
    prompt = Prompt("p", (Message("user", "q"),), (1, 2), ("r",), "a", {"ids": np.arange(2)})
    sent = encode(Group("g", prompt, (sample,), step=3), send_logprobs=True).decode()
    assert sent == (
        '{"id":"g","prompt":{"id":"p","messages":[{"role":"user","content":"q"}],"token_ids":[1,2],"references":["r"],'
        '"answer":"a","columns":{"ids":[0,1]}},"samples":[{"index":0,"token_ids":[5],"text":"x","finish_reason":"stop",'
        f'"policy_versions":{list(sample.policy_versions)},"seed":{sample.seed},"logprobs":[-0.5],"mask":null,"spans":'
        '[{"start":0,"end":1,"kind":"step","role":"assistant","data":{}}],"segments":[]}],"step":3}'
    ).replace(", ", ",")


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "column 'odd'"), (date(2025, 1, 1), "it is a date"), ("\ud800", "is not valid Unicode")],
)
def test_what_json_cannot_carry_is_named(value: Any, said: str) -> None:
    group = make_group("g", ["x"])
    with pytest.raises(UnsendableError, match=said):
        encode(replace(group, prompt=replace(group.prompt, columns={"odd": value})))


def test_requests_hold_whole_groups_within_both_bounds() -> None:
    groups = [make_group(str(i), ["a b"] * size) for i, size in enumerate((2, 2, 5, 1, 1))]
    assert in_chunks(groups, samples=4, tokens=1000) == [[0, 1], [2], [3, 4]]
    assert in_chunks(groups, samples=1000, tokens=10) == [[0], [1], [2], [3, 4]]
    assert in_chunks([], 1, 1) == []
    body = request_body([encode(group) for group in groups], 1.5)
    assert len(ScoreRequest.model_validate_json(body).groups) == 5


# ---------------------------------------------------------------------------------------------- a real server


def test_scores_are_those_of_the_reward_itself(rule: Server) -> None:
    texts = ["#### 42", "#### 41", r"\boxed{84/2}", "no answer", "#### 42."]
    groups = [make_group(str(i), texts[: 1 + i % 5]) for i in range(20)]
    reward = client(rule.url, token_env="RLKIT_TEST_TOKEN", concurrent_requests=3)
    verifier = MathReward(MathReward.Config(), RewardContext())
    expected = verifier.judge([s.text for g in groups for s in g.samples], ["42"] * sum(len(g.samples) for g in groups))
    verifier.close()
    scored = [score for scores in reward.score(groups) for score in scores.samples]
    assert [score.value for score in scored] == [score.value for score in expected]
    assert [score.components for score in scored] == [score.components for score in expected]
    assert reward.score([]) == []
    reward.close()
    reward.close()


def test_more_than_the_server_takes_is_sent_in_parts_and_a_bad_group_alone_is_lost(rule: Server) -> None:
    reward = client(rule.url, token_env="RLKIT_TEST_TOKEN", samples_per_request=100)
    large = make_group("large", ["#### 42"] * 9)
    odd = make_group("odd", ["#### 42"])
    odd = replace(odd, prompt=replace(odd.prompt, columns={"when": date(2025, 1, 1)}))
    values = outcomes(reward, make_group("a", ["#### 42"]), odd, large, make_group("b", ["#### 41", "#### 42"]))
    assert [values[0], *values[2:]] == [1.0, *[1.0] * 9, 0.0, 1.0]
    assert str(values[1]).startswith("unsendable: column 'when' of prompt p-odd")
    reward.close()


def test_a_run_learns_from_the_server_what_its_reward_needs(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", "reward._target_=served_rewards.Everything").ready()
    try:
        arguments = ["reward=remote", f"reward.url={server.url}", f"run_dir={tmp_path / 'run'}"]
        with pytest.raises(ConfigError, match="RemoteReward needs weight with every prompt"):
            load_config(arguments)
        config = RemoteReward.Config(url=server.url)
        assert RemoteReward.traits(config) == Everything.traits(None)
        for send in (False, True):
            reward = client(server.url, send_logprobs=send)
            group = make_group("g", ["one two", "x", "one two three"])
            (scores,) = reward.score([replace(group, prompt=replace(group.prompt, columns={"weight": 2.5}))])
            first, second, third = scores.samples
            assert first.value == 2 / 3
            assert first.token_rewards is not None
            assert first.token_rewards.dtype == np.float32
            assert first.token_rewards.tolist() == np.linspace(0.1, 1, 2, dtype=np.float32).tolist()
            assert [(span.start, span.end, span.value) for span in third.span_rewards] == [(0, 3, 0.25)]
            assert first.ensemble == (2 / 3, 2 / 3 + 1)
            assert first.trace == "2.5 6 * 7 = 42\n#### 42"
            expected = group.samples[0].logprobs.sum() if send else -198.0
            assert math.isclose(first.components["logprob"], expected, rel_tol=1e-6)
            assert (second.valid, second.reason, second.trace) == (False, "odd: the second", r"\ud800 looked at")
            assert [(pair.winner, pair.loser, pair.probability) for pair in scores.pairs] == [(0, 1, 0.75)]
            reward.close()
    finally:
        server.end()


def test_a_reward_that_learns_is_served_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path / "log.txt", "reward._target_=served_rewards.SlowToLearn").ready()
    try:
        assert "learns only within a run; when served, it stays as it is" in server.text
        reward = client(server.url)
        assert "here it only scores" in caplog.text
        assert outcomes(reward, make_group("g", ["x"])) == [0.0]
        reward.close()
    finally:
        server.end()


@pytest.mark.slow
def test_another_model_behind_the_same_address_is_noticed(tmp_path: Path) -> None:
    serve = ("reward._target_=served_rewards.Everything",)
    server = Server(tmp_path / "first.txt", *serve).ready()
    reward = client(server.url)
    groups = [make_group("g", ["x"])]
    assert outcomes(reward, *groups) == [1 / 3]
    server.end()
    other = Server(tmp_path / "second.txt", *serve, "reward.scale=2", port=server.port).ready()
    assert str(outcomes(reward, *groups)[0]).startswith("model_changed: ")
    other.end()
    same = Server(tmp_path / "third.txt", *serve, port=server.port).ready()
    assert outcomes(reward, *groups) == [1 / 3]
    reward.close()
    same.end()


def problems(tmp_path: Path, *arguments: str) -> str:
    remote._remembered.clear()
    with pytest.raises(ConfigError) as error:
        load_config(["reward=remote", *arguments, f"run_dir={tmp_path / 'run'}"])
    assert len(error.value.problems) == 1, error.value.report()
    return str(error.value.problems[0])


def test_what_is_wrong_is_found_before_the_run(rule: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"reward.url={rule.url}"
    assert "reward.url: needs a value" in problems(tmp_path)
    assert "must be http://HOST:PORT" in problems(tmp_path, "reward.url=localhost:8000")
    assert "put the secret in the variable" in problems(tmp_path, "reward.url=http://me:secret@localhost:1")
    assert "no reward server answers there" in problems(tmp_path, "reward.url=http://127.0.0.1:9")
    assert "needs a token" in problems(tmp_path, url)
    monkeypatch.setenv("ANOTHER", "wrong")
    assert "needs a token" in problems(tmp_path, url, "reward.token_env=ANOTHER")
    assert "has no NOT_SET" in problems(tmp_path, url, "reward.token_env=NOT_SET")
    remote._remembered.clear()
    run = f"run_dir={tmp_path / 'run'}"
    resolved = load_config(["reward=remote", url, "reward.token_env=RLKIT_TEST_TOKEN", run])
    assert TOKEN not in str(resolved.config), "a token must not be written down with the configuration"


def test_the_contract_of_rewards(rule: Server, repository: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "REWARD": "rewards.remote.RemoteReward",
        "REWARD_OPTIONS": json.dumps({"url": rule.url, "token_env": "RLKIT_TEST_TOKEN"}),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not ray", "tests/contract"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout
