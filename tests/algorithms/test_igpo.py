"""Information gain per turn: worked numbers, what is asked of the policy and where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import VOCABULARY, build_learner, write_tiny_model
from test_turns import PROMPT, episode
from transformers import LlamaForCausalLM

from algorithms.base import Advantages, Experience
from algorithms.igpo import ANSWER, IGPO
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score

ASKED = replace(PROMPT, answer="42")
BELIEFS = [(0.1, 0.2), (0.3, 0.4), (0.6, 0.5)]
"""Probabilities of the answer's two tokens before three turns: geometric means 0.141421, 0.346410, 0.547723."""
FIRST = float(np.sqrt(0.1 * 0.2))


def algorithm(**options: Any) -> IGPO:
    return IGPO(IGPO.Config(**{"kl_coefficient": 0.0, **options}))


def played(*outcomes: float, turns: int = 3) -> Group:
    pairs = [episode(i, [(9.0, None)] * turns, outcome) for i, outcome in enumerate(outcomes)]
    samples, scores = zip(*pairs, strict=True)
    return Group("g", ASKED, samples).with_scores(GroupScores(scores))


def asked(*rows: tuple[float, ...]) -> list[np.ndarray]:
    return [np.log(np.array(row, dtype=np.float32)) for row in rows]


def two_episodes() -> Experience:
    """Gains (0.204989, 0.201312) and the outcome 1; (0.05, -0.02) and 0. Both begin with the same belief."""
    rows = asked(*BELIEFS, (FIRST + 0.05,), (FIRST + 0.03,))
    return Experience([played(1.0, 0.0)], 1, logprobs={ANSWER: rows})


def by_turn(credit: Advantages) -> list[list[float]]:
    for row in credit.tokens:
        assert row[0::3].tolist() == row[1::3].tolist() and not row[2::3].any()
    return [row[0::3].tolist() for row in credit.tokens]


def test_gains_and_the_outcome_in_both_norms() -> None:
    """The rewards that the environment gave for the turns, 9 each, are not read."""
    pooled = algorithm().advantages(two_episodes())
    first, second = by_turn(pooled)
    assert first == pytest.approx([1.786807, 1.876114, 1.974967], abs=3e-6)
    assert second == pytest.approx([-1.786807, -1.295066, -0.621568], abs=3e-6)
    assert pooled.metrics["igpo/answer"] == pytest.approx((0.547723 + FIRST + 0.03) / 2, abs=1e-6)
    assert pooled.metrics["igpo/gain"] == pytest.approx((0.204989 + 0.201312 + 0.03) / 2, abs=1e-6)
    first, second = by_turn(algorithm(norm="position_mean").advantages(two_episodes()))
    assert first == pytest.approx([0.688151, 0.610656, 0.5], abs=2e-6)
    assert second == pytest.approx([-0.688151, -0.610656, -0.5], abs=2e-6)


def test_gains_of_log_probabilities_with_a_weight_and_without_the_outcome() -> None:
    options = {"gain": "log_probability", "process_coefficient": 0.1, "outcome_coefficient": 0.0, "credit": "loo"}
    first, second = by_turn(algorithm(**options).advantages(two_episodes()))
    gains = np.diff(np.log([FIRST, np.sqrt(0.12), np.sqrt(0.3)])), np.diff(np.log([FIRST, FIRST + 0.05, FIRST + 0.03]))
    mine, other = (0.1 * np.append(np.cumsum(gain[::-1])[::-1], 0.0) for gain in gains)
    assert first == pytest.approx(mine - other, abs=1e-6) and second == pytest.approx(other - mine, abs=1e-6)


def test_the_order_of_episodes_does_not_matter() -> None:
    experience = two_episodes()
    (group,) = experience.groups
    begin, *others = experience.logprobs[ANSWER]
    turned = replace(group, samples=group.samples[::-1], scores=GroupScores(group.scores.samples[::-1]))  # type: ignore[union-attr]
    swapped = Experience([turned], 1, logprobs={ANSWER: [begin, *others[2:], *others[:2]]})
    assert by_turn(algorithm().advantages(swapped)) == by_turn(algorithm().advantages(experience))[::-1]


def test_a_broken_episode_and_one_of_a_single_turn() -> None:
    """The first has no turns and no score; the second earns its outcome alone."""
    broken = replace(episode(0, [(0.0, None)])[0], spans=(), mask=np.zeros(2, np.bool_))
    (one, won), (two, lost) = episode(1, [(9.0, None)], 1.0), episode(2, [(9.0, None)] * 2, 0.0)
    scores = GroupScores((Score.invalid("environment: died"), won, lost))
    group = Group("g", ASKED, (broken, one, two)).with_scores(scores)
    experience = Experience([group], 1, logprobs={ANSWER: asked((0.5,), (0.25,))})
    credit = algorithm(credit="loo", outcome_coefficient=0.0).advantages(experience)
    assert credit.keep.tolist() == [False, True, True]
    assert [row[0] for row in credit.tokens] == pytest.approx([0.0, 0.25, -0.25])


def letters(what: Any) -> tuple[int, ...]:
    """Ids of letters, where `>4` is one token."""
    assert isinstance(what, str)
    return tuple(map(ord, what.replace(">4", "!")))


def test_what_is_asked_and_behind_what() -> None:
    group = replace(played(1.0, 0.0, turns=3), samples=played(1.0, turns=3).samples)
    questions = algorithm(lead_in="<a").groups_for(ANSWER, [group], letters)
    said = group.samples[0].token_ids.tolist()
    behind = [(1, 2), (1, 2, *said[:3]), (1, 2, *said[:6])]
    assert [question.prompt.token_ids for question in questions] == [(*ids, *map(ord, "<a")) for ids in behind]
    assert [question.samples[0].token_ids.tolist() for question in questions] == [[52, 50]] * 3
    merged = algorithm(lead_in="<a>").groups_for(ANSWER, [group], letters)[0]
    assert merged.prompt.token_ids == (1, 2, *map(ord, "<a")), "the token that is of both is the answer's"
    assert merged.samples[0].token_ids.tolist() == [ord("!"), ord("2")]


def test_the_learner_is_asked_as_the_model_would_answer(tmp_path: Path) -> None:
    """Through its packed forward passes, against one plain pass over each whole sequence."""
    folder = write_tiny_model(tmp_path / "model", initializer_range=0.5)
    model, learner = LlamaForCausalLM.from_pretrained(folder), build_learner(folder, algorithm=algorithm())
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY, 8).astype(np.int32)
    one: Sample = replace(episode(0, [(0.0, None)] * 3)[0], token_ids=ids)
    prompt = Prompt("p", (Message("user", "?"),), (5, 6, 7), answer="x")
    questions = algorithm().groups_for(ANSWER, [Group("g", prompt, (one,))], lambda what: (8, 9) if what else ())
    rows = learner.group_logprobs(questions)
    for row, upto in zip(rows, (0, 3, 6), strict=True):
        whole = torch.tensor([[5, 6, 7, *ids[:upto].tolist(), 8, 9]])
        with torch.no_grad():
            logits = model(whole).logits[0].log_softmax(-1)
        expected = [float(logits[-3, 8]), float(logits[-2, 9])]
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("algorithm=igpo reward=math", "IGPO as configured needs turns, and there are none"),
        ("algorithm=igpo environment=maze", "IGPO needs a gold answer with every prompt"),
        ("algorithm=igpo environment=hidden_facts algorithm.credit=min_form", "turn_discounted"),
    ],
)
def test_what_is_refused_before_the_start(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(words.split())
