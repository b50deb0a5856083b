"""Credit for the turns of episodes: baselines over others and over states, two-level GAE, and what each pays for."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from test_pure_and_brpo import sample, spans

from algorithms.base import Experience
from algorithms.functional.returns import gae, turn_gae
from algorithms.grpo import GRPO
from algorithms.ppo import PPO
from algorithms.step_credit import StepCredit
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score, Span
from rlkit.experience.steps import turn_ends

Turn = tuple[float, str | None]
"""Reward and state."""
PROMPT = Prompt("p", (Message("user", "?"),), (1, 2))


def episode(index: int, turns: list[Turn], outcome: float | None = None) -> tuple[Sample, Score]:
    """Turns of two tokens, with an observation of one between them; the outcome is the sum of their rewards."""
    mask = np.array([True, True, False] * len(turns))[:-1]
    places = [(3 * k, 3 * k + 2) for k in range(len(turns))]
    said = [Span(*place, "turn", data={"state": state}) for place, (_, state) in zip(places, turns, strict=True)]
    heard = [Span(end, end + 1, "turn", "user") for _, end in places[:-1]]
    rewards = spans(*((*place, reward) for place, (reward, _) in zip(places, turns, strict=True)))
    value = sum(reward for reward, _ in turns) if outcome is None else outcome
    return sample(index, len(mask), mask=mask, spans=(*said, *heard)), Score(value, span_rewards=rewards)


def group(name: str, episodes: list[list[Turn]]) -> Group:
    samples, scores = zip(*(episode(i, turns) for i, turns in enumerate(episodes)), strict=True)
    return Group(name, PROMPT, samples).with_scores(GroupScores(scores))


def by_turn(groups: list[Group], **options: Any) -> list[list[float]]:
    """Advantage of each turn of each episode, from its first token; that of the second is equal, of observations 0."""
    experience = Experience(groups, step=1)
    algorithm = StepCredit(StepCredit.Config(**{"kl_coefficient": 0.0, **options}))
    rows = algorithm.advantages(experience).tokens
    for row in rows:
        assert row[0::3].tolist() == row[1::3].tolist() and not row[2::3].any()
    return [row[0::3].tolist() for row in rows]


UNBIASED = {"credit": "loo", "outcome_coefficient": 0.0}
NORMALISED_FIRST = {"credit": "turn_discounted", "outcome_coefficient": 0.0}


def test_discounted_returns_against_the_others_turns() -> None:
    """Returns with 1/2: (1 + 4/2, 4) and (2,); the second episode is over at the second turn."""
    episodes: list[list[Turn]] = [[(1.0, None), (4.0, None)], [(2.0, None)], [(0.0, None), (3.0, None)]]
    got = by_turn([group("g", episodes)], gamma=0.5, **UNBIASED)
    expected = [[3.0 - (2.0 + 1.5) / 2, 4.0 - 3.0 / 2], [2.0 - (3.0 + 1.5) / 2], [1.5 - (3.0 + 2.0) / 2, 3.0 - 4.0 / 2]]
    assert got == [pytest.approx(row) for row in expected]


# -- stop or go on -------------------------------------------------------------------------------------------


def stop_or_go_on(first: float, p: float) -> list[tuple[float, list[Turn], bool]]:
    """Probability, turns, stopped. The first turn pays `first` and stops or goes on; the second, if there is one, pays
    1 or -1 by a coin, so both choices are worth the same."""
    go = (1 - p) / 2
    return [
        (p, [(first, None)], True),
        (go, [(first, None), (1.0, None)], False),
        (go, [(first, None), (-1.0, None)], False),
    ]


def pull(first: float, p: float, **options: Any) -> float:
    """The expected policy gradient on the logit of stopping, exactly: over all groups of three episodes."""
    cases = list(product(stop_or_go_on(first, p), repeat=3))
    groups = [group(str(n), [turns for _, turns, _ in case]) for n, case in enumerate(cases)]
    rows = by_turn(groups, **options)
    total = 0.0
    for n, case in enumerate(cases):
        weight = np.prod([probability for probability, _, _ in case])
        advantages = [row[0] for row in rows[3 * n : 3 * n + 3]]
        total += weight * sum(a * (stopped - p) for a, (_, _, stopped) in zip(advantages, case, strict=True))
    return float(total)


@pytest.mark.parametrize("first", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_baselines_over_others_do_not_pull(first: float, gamma: float, p: float) -> None:
    assert pull(first, p, gamma=gamma, **UNBIASED) == pytest.approx(0.0, abs=1e-7)


def test_normalising_first_pays_for_fewer_turns_where_rewards_are_high() -> None:
    """A further turn earns - mean / std: it costs where turns earn on average, and pays where they cost."""
    assert pull(1.0, 0.5, **NORMALISED_FIRST) > 0.1
    assert pull(-1.0, 0.5, **NORMALISED_FIRST) < -0.1
    assert pull(0.0, 0.5, **NORMALISED_FIRST) == pytest.approx(0.0, abs=1e-7)


def trained(seeds: int, steps: int = 25, rate: float = 0.2, **options: Any) -> np.ndarray:
    """Of each seed the logit of stopping, from 0, after some steps of policy gradient on 2 groups of 4 episodes."""
    rngs, logits = [np.random.default_rng(seed) for seed in range(seeds)], np.zeros(seeds)
    for _ in range(steps):
        ps = 1 / (1 + np.exp(-logits))
        cases = [stop_or_go_on(1.0, p) for p in ps]
        chances = np.stack([ps, (1 - ps) / 2, (1 - ps) / 2], axis=1)
        picks = np.stack([rng.choice(3, (2, 4), p=chance) for rng, chance in zip(rngs, chances, strict=True)])
        groups = [
            group(f"{seed}.{g}", [cases[seed][i][1] for i in row])
            for seed, rows in enumerate(picks)
            for g, row in enumerate(rows)
        ]
        advantages = np.array([row[0] for row in by_turn(groups, **options)]).reshape(picks.shape)
        logits += rate * (advantages * ((picks == 0) - ps[:, None, None])).mean(axis=(1, 2))
    return logits


def test_only_normalising_first_moves_the_probability_of_stopping() -> None:
    for options, moved in ((UNBIASED, False), (NORMALISED_FIRST, True)):
        logits = trained(12, **options)
        error = logits.std(ddof=1) / np.sqrt(len(logits))
        assert (logits.mean() > 6 * error) == moved, (logits.mean(), error)
        assert moved or abs(logits.mean()) < 3 * error


# -- anchor states -------------------------------------------------------------------------------------------

WALKS: list[list[Turn]] = [
    [(0.0, "a"), (0.0, "b"), (1.0, "c")],
    [(0.0, "a"), (0.0, "a"), (0.0, "d")],
    [(0.0, "a"), (0.5, "b")],
]
"""Returns with 1/2: (1/4, 1/2, 1), (0, 0, 0), (1/4, 1/2). State a: 1/4, 0, 0, 1/4; b: 1/2, 1/2; c, d: alone."""
STATES = {"credit": "anchor_states", "gamma": 0.5}


def test_turns_are_compared_in_the_same_state() -> None:
    outcomes = np.array([1.0, 0.0, 0.5])
    state = [[0.125, 0.0, 0.0], [-0.125, -0.125, 0.0], [0.125, 0.0]]
    walks = [group("g", WALKS)]
    got = by_turn(walks, process_coefficient=2.0, **STATES)
    assert got == [pytest.approx(a - 0.5 + 2.0 * np.array(s)) for a, s in zip(outcomes, state, strict=True)]
    std = np.std([0.25, 0.0, 0.0, 0.25], ddof=1)
    got = by_turn(walks, normalize_by_std=True, **STATES)
    episodes = (outcomes - 0.5) / 0.5
    assert got == [pytest.approx(a + np.array(s) / std, abs=1e-5) for a, s in zip(episodes, state, strict=True)]


def test_states_of_other_groups_are_others() -> None:
    alone = by_turn([group("g", WALKS)], **STATES)
    rich = [[(100.0, "a")], [(50.0, "b"), (1.0, None)]]
    assert by_turn([group("g", WALKS), group("h", rich)], **STATES)[:3] == alone


def test_without_states_it_is_the_episode_and_one_state_is_the_mean_of_returns() -> None:
    other: list[list[Turn]] = [[(0.25, None), (0.5, None)], [(1.0, None)]]
    episode_only = by_turn([group("g", other), group("h", WALKS)], **STATES)[:2]
    assert episode_only == [pytest.approx([-0.125, -0.125]), pytest.approx([0.125])]
    one_turn: list[list[Turn]] = [[(reward, "start")] for reward in (1.0, 0.0, 0.0, 0.25)]
    got = by_turn([group("g", one_turn)], process_coefficient=1.0, outcome_coefficient=0.0, **STATES)
    plain = GRPO(GRPO.Config(normalize_by_std=False)).advantages(Experience([group("g", one_turn)], step=1)).tokens
    assert got == [pytest.approx(row[0]) for row in plain]


def test_a_step_without_any_state_is_refused_and_shared_ones_are_counted() -> None:
    none = [group("g", [[(1.0, None)], [(0.0, None)]])]
    with pytest.raises(ValueError, match=r"Step\(state=\.\.\.\), or use algorithm=turn_grpo"):
        by_turn(none, **STATES)
    algorithm = StepCredit(StepCredit.Config(kl_coefficient=0.0, **STATES))
    metrics = algorithm.advantages(Experience([group("g", WALKS)], step=1)).metrics
    assert metrics["steps/shared_state_share"] == 6 / 8 and metrics["steps/count"] == pytest.approx(8 / 3)


# -- two-level GAE -------------------------------------------------------------------------------------------

MASK = np.array([True, True, True, False, True, True, False, True])
ENDS = np.array([False, False, True, False, False, True, False, True])
REWARDS = np.array([0.0, 0.0, 0.3, 0.0, 0.0, -0.2, 0.0, 1.0])
VALUES = np.array([0.1, 0.25, 0.4, 9.9, 0.55, 0.7, 9.9, 0.85])


def as_published(gamma: float, lam: float, turn_gamma: float) -> list[float]:
    """The recursion of RAGEN's code, as loops: only ends earn."""
    ends, trained_tokens = np.flatnonzero(ENDS), np.flatnonzero(MASK)
    high: dict[int, float] = {}
    ahead = following = 0.0
    for t in reversed(ends):
        ahead = REWARDS[t] + turn_gamma * following - VALUES[t] + turn_gamma * lam * ahead
        following, high[int(t)] = VALUES[t], ahead
    advantages = np.zeros(len(MASK))
    for here, t in reversed(list(enumerate(trained_tokens))):
        if int(t) in high:
            advantages[t] = high[int(t)]
        else:
            then = trained_tokens[here + 1]
            advantages[t] = gamma * VALUES[then] - VALUES[t] + gamma * lam * advantages[then]
    return advantages.tolist()


@pytest.mark.parametrize(("gamma", "lam", "turn_gamma"), [(1.0, 1.0, 0.95), (0.99, 0.9, 0.95), (1.0, 0.5, 0.8)])
def test_two_levels_as_published(gamma: float, lam: float, turn_gamma: float) -> None:
    got = turn_gae([REWARDS], [VALUES], [MASK], [ENDS], gamma=gamma, lam=lam, turn_gamma=turn_gamma)
    assert got.advantages[0].tolist() == pytest.approx(as_published(gamma, lam, turn_gamma))
    np.testing.assert_allclose(got.returns[0][MASK], (got.advantages[0] + VALUES)[MASK])
    assert not got.returns[0][~MASK].any()


def test_two_levels_by_hand() -> None:
    """lambda = 1: an end earns its discounted return minus its value."""
    got = turn_gae([REWARDS], [VALUES], [MASK], [ENDS], gamma=1.0, lam=1.0, turn_gamma=0.5).advantages[0]
    last, middle, first = 1.0, -0.2 + 0.5 * 1.0, 0.3 + 0.5 * 0.3
    expected = [first - 0.1, first - 0.25, first - 0.4, 0.0, middle - 0.55, middle - 0.7, 0.0, last - 0.85]
    assert got.tolist() == pytest.approx(expected)


def test_two_levels_are_one_without_discounts_or_with_one_turn() -> None:
    """With rewards on every token too, such as a KL penalty."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=8), rng.normal(size=1), np.zeros(0)]
    values = [VALUES, np.ones(1), np.zeros(0)]
    masks, ends = [MASK, np.ones(1, bool), np.zeros(0, bool)], [ENDS, np.zeros(1, bool), np.zeros(0, bool)]
    plain = gae(rows, values, masks, gamma=1.0, lam=1.0)
    two = turn_gae(rows, values, masks, ends, gamma=1.0, lam=1.0, turn_gamma=1.0)
    for one, other in zip(two.advantages, plain.advantages, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    whole = [np.zeros(len(end), bool) for end in ends]
    plain = gae(rows, values, masks, gamma=0.9, lam=0.8)
    two = turn_gae(rows, values, masks, whole, gamma=0.9, lam=0.8, turn_gamma=0.5)
    for one, other in zip(two.advantages, plain.advantages, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_ppo_reads_the_turns_and_one_that_earned_nothing_is_one() -> None:
    player, score = episode(0, [(0.0, None), (0.0, None), (1.0, None)])
    assert np.flatnonzero(turn_ends(player)).tolist() == [1, 4, 7]
    score = Score(None, span_rewards=score.span_rewards)
    values = [np.zeros(8, np.float32)]
    experience = Experience([Group("g", PROMPT, (player,)).with_scores(GroupScores((score,)))], 1, values=values)
    config = PPO.Config(credit="turns", turn_gamma=0.5, whiten_advantages=False)
    got = PPO(config).advantages(experience)
    assert got.tokens[0].tolist() == [0.25, 0.25, 0.0, 0.5, 0.5, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turn_gamma": 0.5}, "turn_gamma has no effect with credit=token"),
        ({"credit": "turns", "turn_gamma": 1.0}, "credit=turns has no effect with gamma"),
    ],
)
def test_options_of_turns_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PPO.Config(**options)
