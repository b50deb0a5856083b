"""Held-out evaluation: what the verifier's scores come to, pass@k, several sets, and what is asked of the sampler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import RewardConfig, RewardContext
from rewards.verifiers.terms import Length
from rlkit.config.parts import OWN
from rlkit.config.schema import EvaluationConfig
from rlkit.evaluation import Evaluation, Evaluator
from rlkit.experience import Episode, Group, GroupScores, Message, Prompt, Sample, Score, Span
from rlkit.experience.scores import RewardFailed, report_on, verdicts
from rlkit.experience.statistics import Z, expected_best, wilson
from rlkit.rollout.requests import GroupRequest
from rlkit.serving.pool import Scored
from rlkit.serving.stored import groups_in

RIGHT, WRONG = Score(4.0, components={"correct": 1.0}), Score(0.5, components={"correct": 0.0})
LOST = Score.invalid("timeout")


def sample(index: int, tokens: int = 1) -> Sample:
    return Sample(index, np.ones(tokens, np.int32), np.zeros(tokens, np.float32), "", "stop", (0, 0), seed=0)


def group(*scores: Score) -> Group:
    samples = tuple(sample(i) for i in range(len(scores)))
    return Group("group", Prompt("prompt", (), (1,)), samples).with_scores(GroupScores(scores))


def test_verdicts_are_right_or_wrong_where_all_have_the_component_and_values_elsewhere() -> None:
    area, (first, second) = verdicts([group(RIGHT, WRONG), group(LOST)])
    assert area == "accuracy"
    np.testing.assert_array_equal(first, [1.0, 0.0])
    np.testing.assert_array_equal(second, [np.nan])
    area, (first, second) = verdicts([group(RIGHT, WRONG), group(Score(0.25), LOST)])
    assert area == "reward"
    np.testing.assert_array_equal(first, [4.0, 0.5])
    np.testing.assert_array_equal(second, [0.25, np.nan])


def test_an_episode_that_nobody_calls_a_success_is_none_where_others_are_judged_so() -> None:
    silent = Score(0.5, components={"turns": 3.0})
    area, (values,) = verdicts([group(Score(2.0, components={"success": 1.0}), silent)])
    assert area == "accuracy"
    np.testing.assert_array_equal(values, [1.0, 0.0])
    area, (values,) = verdicts([group(silent, silent)])
    assert area == "reward"
    np.testing.assert_array_equal(values, [0.5, 0.5])


def test_a_verifier_without_a_value_is_refused() -> None:
    with pytest.raises(RewardFailed, match="gives no value for a whole response"):
        verdicts([group(Score(value=None, token_rewards=np.ones(1)))])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.integers(1, 7))
def test_the_expected_best_of_k_is_the_mean_over_all_subsets(values: list[float], k: int) -> None:
    if k > len(values):
        with pytest.raises(ValueError, match=f"best of {k}"):
            expected_best(np.array(values), k)
        return
    subsets = [max(subset) for subset in combinations(values, k)]
    assert expected_best(np.array(values), k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_is_the_published_estimator() -> None:
    """1 - prod over i of n - c + 1 to n of (1 - k / i), as it is computed with arXiv 2107.03374."""
    for n, c, k in [(200, 3, 100), (16, 5, 4), (10, 0, 3), (10, 8, 3), (1, 1, 1)]:
        published = 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
        assert expected_best(np.repeat([0.0, 1.0], [n - c, c]), k) == pytest.approx(published, abs=1e-12)


@dataclass
class Sampler:
    """Answers requests in reverse order; a response has as many tokens as the prompt's second one says, plus its
    index."""

    asked: list[GroupRequest] = field(default_factory=list)
    episode: Episode | None = None

    async def generate(self, requests: Sequence[GroupRequest]) -> AsyncIterator[Any]:
        self.asked += requests
        for request in reversed(requests):
            samples = tuple(
                replace(sample(i, request.prompt.token_ids[1] + i), episode=self.episode, spans=(Span(0, 1, "turn"),))
                for i in range(request.samples)
            )
            yield [Group(request.id, request.prompt, samples)]


class Even:
    """Right if the number of tokens is even; nothing is said of 9."""

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        def one(tokens: int) -> Score:
            return LOST if tokens == 9 else Score(9.0, components={"correct": float(tokens % 2 == 0)})

        return [GroupScores(tuple(one(len(sample)) for sample in group.samples)) for group in groups]


class Pool:
    """A reward in this process."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.config = reward, RewardConfig(max_failed_share=0.5)

    async def score(self, batches: Sequence[Any], chosen: Sequence[str] | None = None) -> Scored:
        groups = [group for batch in batches for group in await groups_in(batch)]
        scores = self.reward.score([group for group in groups if chosen is None or group.id in chosen])
        return Scored(scores, report_on(scores, 0.0))


def evaluated(
    sets: dict[str, list[int]], reward: Any, step: int = 3, episode: Episode | None = None, **options: Any
) -> tuple[Evaluation, list[GroupRequest]]:
    prompts = {
        name: [Prompt(f"{name}{i}", (Message("user", "?"),), (1, tokens)) for i, tokens in enumerate(lengths)]
        for name, lengths in sets.items()
    }
    sampler: Any = Sampler(episode=episode)
    pool: Any = Pool(reward)
    evaluator = Evaluator(prompts, sampler, pool, EvaluationConfig(**options), seed=7)
    return asyncio.run(evaluator.evaluate(step)), sampler.asked


def test_one_response_to_each_prompt_and_the_ids_that_seeds_come_from() -> None:
    result, asked = evaluated({OWN: [2, 3, 4, 5, 6]}, Even())
    assert result == Evaluation(
        "accuracy/heldout",
        {
            "accuracy/heldout": 0.6,
            "evaluation/samples": 5.0,
            "evaluation/unjudged": 0.0,
            "evaluation/length_mean": 4.0,
            "evaluation/truncated_share": 0.0,
            "accuracy/heldout/low": 0.0,  # of five questions nobody knows more
            "accuracy/heldout/high": 1.0,
        },
    )
    assert result.value == 0.6
    assert [request.id for request in asked] == [f"evaluation-3-{i}" for i in range(5)]
    assert {(request.seed, request.samples, request.temperature, request.max_response_tokens) for request in asked} == {
        (7, 1, None, None)
    }


def test_several_responses_give_their_mean_and_pass_at_k() -> None:
    """Four responses: of 2, 3, 4, 5 tokens two are right, and of 6, 7, 8, 9 two of the three that were judged."""
    result, _ = evaluated({OWN: [2, 6]}, Even(), samples=4)
    assert result.value == pytest.approx((2 / 4 + 2 / 3) / 2), "each problem counts once, as in the interval"
    assert result.metrics["evaluation/pass@2"] == pytest.approx((5 / 6 + 1.0) / 2)
    assert result.metrics["evaluation/pass@4"] == 1.0  # of the one prompt with four verdicts
    assert (result.metrics["evaluation/samples"], result.metrics["evaluation/unjudged"]) == (8.0, 1.0)
    result, _ = evaluated({OWN: [2]}, Even(), samples=3)
    assert {name for name in result.metrics if "@" in name} == {"evaluation/pass@2", "evaluation/pass@3"}


def test_each_set_has_metrics_of_its_own_and_the_first_is_the_headline() -> None:
    result, asked = evaluated({OWN: [2, 3], "math": [4, 4, 5], "code": [3]}, Even())
    assert result.headline == "accuracy/heldout"
    assert result.value == 0.5
    assert result.metrics["evaluation/math/accuracy"] == pytest.approx(2 / 3)
    assert result.metrics["evaluation/code/accuracy"] == 0.0
    assert result.metrics["evaluation/math/length_mean"] == pytest.approx(13 / 3)
    assert (result.metrics["evaluation/samples"], result.metrics["evaluation/math/samples"]) == (2.0, 3.0)
    assert [request.id for request in asked][2:] == [
        *(f"evaluation-3-math-{i}" for i in range(3)),
        "evaluation-3-code-0",
    ]
    alone, _ = evaluated({"math": [4, 5]}, Even())
    assert (alone.headline, alone.value) == ("evaluation/math/accuracy", 0.5)


def test_held_out_episodes_are_measured_as_those_of_training_are() -> None:
    lost = Episode("turns", success=False, metrics={"gamed": 1.0})
    result, _ = evaluated({OWN: [2], "math": [4]}, Even(), episode=lost)
    for prefix in ("evaluation/environment/", "evaluation/math/environment/"):
        own = {n.removeprefix(prefix): value for n, value in result.metrics.items() if n.startswith(prefix)}
        shares = {"success": 0.0, "budget_share": 1.0, "metric/gamed": 1.0}
        shares |= {"metric/gamed_low": pytest.approx(1 / (1 + Z**2)), "metric/gamed_high": 1.0}
        assert own == {"turns": 1.0, "observation_tokens": 0.0, "malformed_share": 0.0, **shares}


@pytest.mark.parametrize(("successes", "trials"), [(45, 32768), (0, 85), (85, 85), (3, 7)])
def test_the_bounds_of_a_share_are_those_of_wilson(successes: int, trials: int) -> None:
    """The shares that are Z standard errors of their own away from the measured one; 45 of 32,768 are 0.001373."""
    share = successes / trials
    for bound in wilson(successes, trials):
        assert (share - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / trials, abs=1e-15)
    low, high = wilson(successes, trials)
    assert 0 <= low <= share <= high <= 1 and low < high
    if trials == 32768:
        assert (round(share, 6), round(low, 6), round(high, 6)) == (0.001373, 0.001027, 0.001837)


def test_a_reward_of_any_size_is_a_mean_value_and_the_best_of_k() -> None:
    reward = Length(Length.Config(max_tokens=2, slope_tokens=4), RewardContext())
    result, _ = evaluated({OWN: [2, 4], "long": [6]}, reward, samples=2)  # 1, 0.75; 0.5, 0.25; 0, 0
    assert (result.headline, result.value) == ("reward/heldout", 0.625)
    assert result.metrics["evaluation/best@2"] == 0.75
    assert result.metrics["evaluation/long/reward"] == 0.0
    assert not any("accuracy" in name or "pass" in name for name in result.metrics)


def test_how_the_sampler_is_asked() -> None:
    _, asked = evaluated({OWN: [2]}, Even(), samples=4, temperature=0.6, max_response_tokens=9)
    (request,) = asked
    assert (request.samples, request.temperature, request.max_response_tokens) == (4, 0.6, 9)
    _, asked = evaluated({OWN: [2]}, Even(), greedy=True)
    assert asked[0].temperature == 0.0


def test_too_many_answers_without_a_verdict_end_the_evaluation() -> None:
    with pytest.raises(RewardFailed, match="the verifier of the held-out evaluation"):
        evaluated({OWN: [9, 9, 2]}, Even())


def test_training_answers_are_judged_once() -> None:
    groups = [group(Score(0.5))]
    pool: Any = Pool(Even())
    sampler: Any = Sampler()
    stored: Any = SimpleNamespace(references=lambda groups: [[replace(groups[0], id="another"), *groups]])

    def judged(same: bool = False, **options: Any) -> list[Group] | None:
        evaluator = Evaluator({}, sampler, pool, EvaluationConfig(**options), seed=0, training_judged=same)
        return asyncio.run(evaluator.judge_training(groups, stored))

    assert judged(same=True) is groups
    assert judged(training_answers=False) is None
    (scored,) = judged() or []
    assert math.isclose(scored.scored()[0][1].components["correct"], 0.0)
