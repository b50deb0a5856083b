"""`reward=progress`: worked numbers, the estimator against least squares, and what it finds out about real states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.base import RewardContext
from rewards.progress import ProgressReward, Ridge
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Episode, Group, GroupScores, Message, Prompt, Sample, Score, Span
from rlkit.experience.steps import process_rewards

SPA = np.array([0.2, 0.5, 0.1])


def episode(
    turns: int, *, rewards: tuple[float, ...] = (), malformed: tuple[int, ...] = (), ends: Any = None
) -> Sample:
    """Turns of 2 tokens with an observation of 1 between them; `ends`: the last tokens of turns."""
    ids = np.full(3 * turns - 1, 20, np.int32)
    if ends is not None:
        ids[1::3] = ends
    mask = np.ones(len(ids), np.bool_)
    mask[2::3] = False
    spans = [
        Span(3 * k, 3 * k + 2, "turn", data={"reward": (*rewards, *[0.0] * turns)[k], "malformed": int(k in malformed)})
        for k in range(turns)
    ]
    spans += [Span(3 * k + 2, 3 * k + 3, "turn", "user") for k in range(turns - 1)]
    logprobs = np.zeros(len(ids), np.float32)
    return Sample(0, ids, logprobs, "", "stop", (0, 0), 0, mask, tuple(spans), episode=Episode("done"))


def group(*samples: Sample, name: str = "g") -> Group:
    prompt = Prompt("p", (Message("user", "?"),), (30, 31, 32))
    return Group(name, prompt, tuple(replace(one, index=i) for i, one in enumerate(samples)))


def reward(**options: Any) -> ProgressReward:
    return ProgressReward(ProgressReward.Config(**options), RewardContext())


def test_contributions_fused_with_executed_actions() -> None:
    """c = (0.2, 0.5, 0.1) and a second turn that could not be executed, though the last one always counts."""
    progress = reward()
    progress.head = Ridge(1e-12)
    progress.head.learn(np.eye(3), SPA)
    assert (progress.head(np.eye(3)).sum() - 1.0) ** 2 == pytest.approx(0.04)
    played = episode(3, malformed=(1, 2))
    score = progress._shared_out(Score(1.0), played, np.eye(3))
    assert process_rewards(played, score)[0].tolist() == pytest.approx([0.7, 0.5, 0.6])
    assert score.value == 1.0 and score.components == {"outcome": 1.0, "progress": pytest.approx(0.8)}
    alone = reward(value="none", executed_weight=0.0)
    alone.head = progress.head
    score = alone._shared_out(Score(1.0), played, np.eye(3))
    assert process_rewards(played, score)[0].tolist() == pytest.approx(SPA) and score.value is None
    lost = progress._shared_out(Score.invalid("environment: died"), played, np.eye(3))
    assert lost.reason == "environment: died"


def test_the_head_is_least_squares_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(40, 5)), rng.normal(size=40)
    padded = np.vstack([rows, np.sqrt(0.5) * np.eye(5)]), np.append(targets, np.zeros(5))
    expected = rows @ np.linalg.lstsq(*padded, rcond=None)[0]
    once, twice = Ridge(0.5), Ridge(0.5)
    assert not once(rows).any()
    once.learn(rows, targets)
    for part in np.array_split(rng.permutation(40), 3):
        twice.learn(rows[part], targets[part])
    np.testing.assert_allclose(once(rows), expected, atol=1e-9)
    np.testing.assert_allclose(twice(rows), expected, atol=1e-9)


def test_it_finds_the_turn_that_decided_and_remembers_it() -> None:
    """An episode is won if one of its turns ends with token 40."""
    progress, rng = reward(), np.random.default_rng(0)
    progress.start()
    errors = []
    for step in range(4):
        groups = []
        for g in range(6):
            samples = []
            for _ in range(6):
                ends = rng.integers(41, 60, 3)
                if rng.random() < 0.5:
                    ends[rng.integers(3)] = 40
                won = float((ends == 40).any())
                samples.append(episode(3, rewards=(0.0, 0.0, won), ends=ends))
            groups.append(group(*samples, name=f"{step}.{g}"))
        scores = progress.score(groups)
        learnt = progress.update([one.with_scores(own) for one, own in zip(groups, scores, strict=True)])
        errors.append(learnt["progress/error"] / learnt["progress/variance"])
    assert errors[0] > 1 and errors[-1] < 0.4, errors
    asked = group(episode(3, ends=np.array([45, 40, 50])), episode(3, ends=np.array([45, 46, 50])))
    (scores,) = progress.score([asked])
    won, lost = (process_rewards(asked.samples[0], score)[0] for score in scores.samples)
    gained = won - lost
    assert gained[0] == 0 and gained[1] > max(0.3, gained[2]), "turns after it have read it, too"
    assert 0.6 < gained.sum() < 1.4
    again = reward()
    again.start()
    again.load_state_dict(progress.state_dict())
    assert again.score([asked]) == [scores] and again.version == 4
    fresh = reward()
    fresh.load_state_dict(fresh.state_dict())
    progress.close()


def test_nothing_is_learnt_from_what_was_not_judged() -> None:
    progress = reward()
    progress.start()
    broken = group(episode(2)).with_scores(GroupScores((Score.invalid("environment: died"),)))
    assert progress.update([broken]) == {} and progress.head.sums() == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reward=progress", "ProgressReward reads what an environment gives"),
        ("reward=progress environment=maze reward.outcome.per_turn=true", "would be lost"),
        ("reward=progress environment=maze reward.value=none algorithm=grpo", "gives process rewards"),
        ("reward=progress environment=maze reward.model_path=nowhere", r"reward\.model_path"),
    ],
)
def test_what_is_refused_before_the_start(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(words.split())
