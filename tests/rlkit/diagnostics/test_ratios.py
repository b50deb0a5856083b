"""Log-ratios that the learner measures, against worked numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from algorithms.base import Denominators, LossInputs
from rlkit.diagnostics.base import StepRecord
from rlkit.diagnostics.ratios import Drift, RatioShift

SETTINGS: dict[str, Any] = {"algorithm": {"clip_low": 0.2, "clip_high": 0.2}}


def inputs(
    log_ratios: list[list[float]],
    advantages: list[float],
    mask: list[list[float]] | None = None,
    reference: list[float] | None = None,
    logprobs: list[float] | None = None,
) -> LossInputs:
    """Samples with these log-ratios per token to the old policy, and one advantage each."""
    lengths = [len(row) for row in log_ratios]
    ratios = torch.tensor([value for row in log_ratios for value in row])
    now = torch.full_like(ratios, -1.0) if logprobs is None else torch.tensor(logprobs)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return LossInputs(
        logprobs=now.requires_grad_(),
        entropy=torch.zeros_like(ratios),
        old_logprobs=now.detach() - ratios,
        rollout_logprobs=now.detach() - ratios,
        advantages=torch.tensor(advantages)[sequence],
        mask=torch.ones_like(ratios) if mask is None else torch.tensor([value for row in mask for value in row]),
        sequence=sequence,
        group=torch.zeros(len(lengths), dtype=torch.int64),
        denominators=Denominators(tokens=float(sum(lengths)), sequences=float(len(lengths)), groups=1.0),
        reference_logprobs=None if reference is None else torch.tensor(reference),
    )


def shift(**options: Any) -> RatioShift:
    return RatioShift(RatioShift.Config(**options), SETTINGS)


def numbers(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in sums.items()}


def test_the_worked_numbers_of_a_ratio_shift() -> None:
    diagnostic = shift(buckets=2)
    given = inputs([[-0.2, -0.1, 0.0, 0.1]], [1.0])
    findings = diagnostic.check(StepRecord(1, measured=numbers(diagnostic.measure(given))))
    assert findings.scalars["ratio_shift/mean"] == pytest.approx(0.957185, abs=1e-6)
    assert findings.scalars["ratio_shift/clipped_positive"] == 0.0
    assert "ratio_shift/clipped_negative" not in findings.scalars  # no such token
    first, second = findings.table
    assert (first["advantage"], first["part"], first["token_share"]) == ("positive", 1, 0.5)
    assert first["mean_log_ratio"] == pytest.approx(-0.15)
    assert second["mean_ratio"] == pytest.approx((1 + 1.1051709) / 2)
    assert second["variance"] == pytest.approx(0.1051709**2 / 4, rel=1e-4)


def test_clipping_counts_where_it_can_bind_and_trained_tokens_alone() -> None:
    """Above 1.2 with a positive advantage, below 0.8 with a negative one."""
    diagnostic = shift(buckets=1)
    rows = [[0.5, 0.5, -0.5, 9.0], [0.5, -0.5, -0.5, 9.0], [0.5, 0.5, 0.5, 9.0]]
    given = inputs(rows, [1.0, -1.0, 0.0], mask=[[1.0, 1.0, 1.0, 0.0]] * 3)
    scalars = diagnostic.check(StepRecord(1, measured=numbers(diagnostic.measure(given)))).scalars
    assert scalars["ratio_shift/clipped_positive"] == pytest.approx(2 / 3)
    assert scalars["ratio_shift/clipped_negative"] == pytest.approx(2 / 3)
    up, down = 1.6487213, 0.6065307
    assert scalars["ratio_shift/mean"] == pytest.approx((3 * up + 3 * down) / 6)


@pytest.mark.parametrize("kind", [RatioShift, Drift])
def test_sums_of_micro_batches_are_those_of_the_whole(kind: type[RatioShift] | type[Drift]) -> None:
    diagnostic = kind(kind.Config(), SETTINGS)
    rows, advantages = [[0.1, -0.2, 0.3], [0.5], [-0.4, 0.2, 0.0, 0.6, -0.1]], [0.5, -1.0, 2.0]
    reference = [-1.5, -0.4, -1.0, -0.9, -1.1, -1.2, -0.7, -0.3, -2.0]
    whole = numbers(diagnostic.measure(inputs(rows, advantages, reference=reference)))
    parts = [
        numbers(diagnostic.measure(inputs(rows[:2], advantages[:2], reference=reference[:4]))),
        numbers(diagnostic.measure(inputs(rows[2:], advantages[2:], reference=reference[4:]))),
    ]
    assert whole == pytest.approx({name: parts[0][name] + parts[1][name] for name in whole}, abs=1e-5)


def test_ratios_that_stay_below_one_while_nothing_is_clipped_are_reported() -> None:
    def said(log_ratio: float) -> list[int]:
        diagnostic = shift(steps=2, buckets=1)
        sums = numbers(diagnostic.measure(inputs([[log_ratio] * 3, [0.0]], [1.0, -1.0])))
        return [step for step in range(1, 8) if diagnostic.check(StepRecord(step, measured=sums)).warning]

    assert said(-0.1) == [4, 6]
    assert said(0.1) == said(0.0) == said(0.5) == []


def test_the_implicit_reward_of_the_worked_example() -> None:
    """beta 0.1; DPO policy (-1, -0.5, -2), reference (-1.5, -0.4, -1): -0.06 for the response."""
    diagnostic = Drift(Drift.Config(), SETTINGS)
    policy, reference = [-1.0, -0.5, -2.0], [-1.5, -0.4, -1.0]
    given = inputs([[0.0] * 3, [0.0]], [1.0, -1.0], logprobs=[*policy, -2.0], reference=[*reference, -1.0])
    scalars = diagnostic.check(StepRecord(1, measured=numbers(diagnostic.measure(given)))).scalars
    assert 0.1 * scalars["drift/chosen"] == pytest.approx(-0.06)
    assert scalars["drift/rejected"] == pytest.approx(-1.0)
    assert scalars["drift/kl"] == pytest.approx(-1.6 / 4)


def test_better_and_worse_are_those_of_pairs_where_there_are_pairs() -> None:
    """Log-ratios 1, -2, 4 of the samples; the first won against both others."""
    diagnostic = Drift(Drift.Config(), SETTINGS)
    given = inputs([[0.0], [0.0], [0.0]], [0.0, 0.0, 0.0], logprobs=[-1.0] * 3, reference=[-2.0, 1.0, -5.0])
    paired = replace(given, pairs=torch.tensor([[0, 1], [0, 2]]))
    scalars = diagnostic.check(StepRecord(1, measured=numbers(diagnostic.measure(paired)))).scalars
    assert scalars == pytest.approx({"drift/chosen": 1.0, "drift/rejected": 1.0, "drift/kl": 1.0})
    alone = diagnostic.check(StepRecord(1, measured=numbers(diagnostic.measure(given)))).scalars
    assert alone.keys() == {"drift/kl"}


def drifting(chosen: float, rejected: float, kl: float = 0.0) -> dict[str, float]:
    counts = {"chosen_samples": 1.0, "rejected_samples": 1.0, "tokens": 1.0}
    return {"chosen": chosen, "rejected": rejected, "log_ratio": kl, **counts}


def test_both_falling_is_reported_and_a_growing_margin_is_not() -> None:
    def said(steps: list[dict[str, float]], **options: Any) -> list[str]:
        diagnostic = Drift(Drift.Config(steps=2, **options), SETTINGS)
        findings = [diagnostic.check(StepRecord(i, measured=sums)) for i, sums in enumerate(steps)]
        return [each.warning for each in findings if each.warning]

    (fall,) = said([drifting(-1.0 * i, -3.0 * i) for i in range(4)])
    assert "for better responses (-0.50 to -2.50 nats) and for worse ones (-1.50 to -7.50)" in fall
    assert said([drifting(1.0 * i, -3.0 * i) for i in range(4)]) == []
    assert said([drifting(4.0 - i, -3.0 * i) for i in range(4)]) == []  # better ones are still above the reference
    assert said([drifting(0.0, 0.0, 0.2)] * 4) == []
    assert "0.200 nats per token" in said([drifting(0.0, 0.0, 0.2)] * 4, max_kl=0.1)[0]


def test_a_restored_diagnostic_goes_on_as_if_it_had_not_stopped() -> None:
    steps = [drifting(-1.0 * i, -3.0 * i) for i in range(9)]
    whole = Drift(Drift.Config(steps=2), SETTINGS)
    said = [whole.check(StepRecord(i, measured=sums)) for i, sums in enumerate(steps)]
    first, second = Drift(Drift.Config(steps=2), SETTINGS), Drift(Drift.Config(steps=2), SETTINGS)
    for i, sums in enumerate(steps[:5]):
        first.check(StepRecord(i, measured=sums))
    second.load_state_dict(first.state_dict())
    assert [second.check(StepRecord(i, measured=sums)) for i, sums in enumerate(steps[5:], 5)] == said[5:]
