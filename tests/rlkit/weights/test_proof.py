"""What a worker's receipts prove: yardsticks that hold in any precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlkit.experience import Message, Prompt
from rlkit.prompts import CANARY_PROMPTS, CANARY_TOKENS, canary
from rlkit.weights.publication import (
    Agreement,
    Loaded,
    Proof,
    Published,
    WeightReceipt,
    WeightsNotLoadedError,
    change_shown,
)

TOKENS, TOLERANCE = 120, 0.5
RNG = np.random.default_rng(0)
LEARNER = RNG.normal(-3, 1, TOKENS)


def published(version: int, logprobs: np.ndarray) -> Published:
    return Published(None, version, (), logprobs)


def receipt(version: int, logprobs: np.ndarray, loaded: Loaded | None) -> WeightReceipt:
    return WeightReceipt(version, f"c{version}", None, logprobs, loaded)


def loaded(version: int) -> Loaded:
    return Loaded((), version, 10 * version)


@pytest.mark.parametrize(("noise", "step"), [(1e-7, 1e-4), (0.01, 0.03), (0.03, 0.1)])
def test_a_change_above_the_noise_is_seen_and_old_weights_are_told_from_new(noise: float, step: float) -> None:
    """fp32 and bfloat16: the noise of both ends may be far above the tolerance of the other."""
    old, change = LEARNER + noise * RNG.normal(size=TOKENS), step * RNG.normal(size=TOKENS)
    new = LEARNER + change + noise * RNG.normal(size=TOKENS)
    assert change_shown((LEARNER, LEARNER + change), (old, new)) == pytest.approx(1, abs=0.2)
    assert change_shown((LEARNER, LEARNER + change), (old, old)) == 0


def test_a_change_below_the_noise_is_not_judged_but_adds_up_until_it_can_be() -> None:
    noise, direction = 0.01, RNG.normal(size=TOKENS)
    proof = Proof()
    stuck = LEARNER + noise * RNG.normal(size=TOKENS)
    for version in range(8):  # 0.002 a step: a fifth of the noise of one log-prob
        learner = LEARNER + 0.002 * version * direction
        agreement = proof.accept("w", published(version, learner), receipt(version, stuck, loaded(version)), None, 0.5)
        assert agreement.change is None
    learner = LEARNER + 0.002 * 20 * direction
    with pytest.raises(WeightsNotLoadedError, match=r"show 0% of that change: it still samples with older weights"):
        proof.accept("w", published(20, learner), receipt(20, stuck, loaded(20)), None, 0.5)
    moved = stuck + 0.002 * 20 * direction
    agreement = proof.accept("w", published(20, learner), receipt(20, moved, loaded(20)), None, 0.5)
    assert agreement.change == pytest.approx(1)


def test_noise_alone_does_not_stop_a_long_run() -> None:
    """Engines with the right weights, at the smallest change that is judged."""
    rng, noise = np.random.default_rng(1), 0.01
    for _ in range(3000):
        change = rng.normal(size=TOKENS)
        change *= 12.5 * np.sqrt(2) * noise / np.linalg.norm(change)
        old, new = (LEARNER + noise * rng.normal(size=TOKENS) for _ in range(2))
        share = change_shown((LEARNER, LEARNER + change), (old, new + change))
        assert share is None or share > 0.5


def accept(proof: Proof, version: int, report: Loaded | None) -> Agreement:
    return proof.accept("worker 3", published(version, LEARNER), receipt(version, LEARNER, report), None, TOLERANCE)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (None, "version 2 was announced, but the engine loaded nothing"),
        (Loaded(("model.norm 0 of 64",), 2, 20), r"model\.norm 0 of 64 \(elements written\)"),
        (Loaded((), 2, 10), "unchanged to the last bit: it kept the old weights"),
    ],
)
def test_the_engines_parameters_speak_where_log_probs_do_not(report: Loaded | None, message: str) -> None:
    proof = Proof()
    accept(proof, 1, loaded(1))
    with pytest.raises(WeightsNotLoadedError, match=message):
        accept(proof, 2, report)
    accept(proof, 2, loaded(2))


def test_equal_weights_may_come_again_and_a_new_process_starts_anew() -> None:
    proof = Proof()
    accept(proof, 1, loaded(1))
    accept(proof, 2, loaded(1))
    accept(Proof(), 3, Loaded((), 7, 10))


def test_what_is_not_finite_is_named_by_its_end() -> None:
    broken = np.full(TOKENS, np.nan)
    with pytest.raises(WeightsNotLoadedError, match=r"NaN in the weights of model\.path"):
        Proof().accept("w", published(0, broken), receipt(0, broken, loaded(0)), None, TOLERANCE)
    with pytest.raises(WeightsNotLoadedError, match="the sampler's are not finite"):
        Proof().accept("w", published(0, LEARNER), receipt(0, broken, loaded(0)), None, TOLERANCE)
    with pytest.raises(WeightsNotLoadedError, match=r"damaged: their checksum is c0, the learner's is d"):
        Proof().accept("w", published(0, LEARNER), receipt(0, LEARNER, loaded(0)), "d", TOLERANCE)
    announced = replace(receipt(0, LEARNER, loaded(0)), announced="e")
    with pytest.raises(WeightsNotLoadedError, match=r"damaged: their checksum is c0, the learner's is e"):
        Proof().accept("w", published(0, LEARNER), announced, None, TOLERANCE)


def test_the_weakest_of_several_workers_is_reported() -> None:
    weakest = Agreement.weakest([Agreement(0.1, 1.01), Agreement(0.3, None), Agreement(0.2, 0.7)])
    assert weakest == Agreement(0.3, 0.7)
    assert Agreement.weakest([Agreement(0.1)]).change is None


def prompts(system: int, count: int) -> list[Prompt]:
    """With a system prompt of so many tokens, and 20 of their own."""
    ids = [(*range(system), *range(1000 * i, 1000 * i + 20)) for i in range(1, count + 1)]
    return [Prompt(f"p{i}", (Message("user", "?"),), token_ids) for i, token_ids in enumerate(ids)]


@pytest.mark.parametrize("system", [3, 40])
def test_the_canary_is_of_several_prompts_however_long_their_common_beginning(system: int) -> None:
    pieces = canary(prompts(system, 6))
    assert len(set(pieces)) == CANARY_PROMPTS
    assert all(len(ids) <= CANARY_TOKENS for ids in pieces)
    assert len(canary(prompts(system, 1))) == len(canary(prompts(system, 1) * 2)) == 1
