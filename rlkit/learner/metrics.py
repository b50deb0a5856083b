"""Metrics of one update: summed over micro-batches, reduced over ranks, averaged over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from algorithms.base import Denominators, LossInputs, LossOutput
from rlkit.diagnostics.base import MEASURED, Diagnostic

MOMENTS = ("first moment", "second moment")


@torch.no_grad()
def mismatch(before: Tensor, rollout: Tensor, mask: Tensor, denominators: Denominators) -> LossOutput:
    """Distance between the learner's log-probs [R] and the sampler's [R] on trained tokens that are computed.

    kl/rollout is k3 of KL(sampler || learner): mean of exp(d) - 1 - d with d = learner - sampler. The moments are those
    of the weights exp(d), for `with_effective_size`.
    """
    difference = (before - rollout) * mask
    weight = torch.exp(difference) * mask
    return LossOutput(
        loss=before.new_zeros(()),
        sums={
            "mismatch/logprob_mean": difference.abs().sum() / denominators.measured,
            "kl/rollout": ((torch.exp(difference) - 1 - difference) * mask).sum() / denominators.measured,
            MOMENTS[0]: weight.sum() / denominators.measured,
            MOMENTS[1]: (weight**2).sum() / denominators.measured,
        },
        maxima={"mismatch/logprob_max": difference.abs().max()},
    )


def with_effective_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the moments by `mismatch/ess`, the effective sample size as a share of the tokens: (sum w)^2 / (n sum
    w^2) (Kish 1965)."""
    if MOMENTS[0] not in metrics:
        return metrics
    first, second = (metrics.pop(name) for name in MOMENTS)
    return {**metrics, "mismatch/ess": first**2 / second if second else math.nan}


@torch.no_grad()
def measured(diagnostics: Sequence[Diagnostic], inputs: LossInputs) -> Iterator[LossOutput]:
    """Yield what diagnostics sum over tokens."""
    for diagnostic in diagnostics:
        sums = diagnostic.measure(inputs)
        named = {f"{MEASURED}{diagnostic.config.name}/{name}": value for name, value in sums.items()}
        yield LossOutput(loss=inputs.logprobs.new_zeros(()), sums=named)


@dataclass
class StepMetrics:
    area: str
    """First part of the metrics' names."""
    copies: int = 1
    """Number of ranks that compute the same samples, and so add them to sums over all ranks."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    rate: float = 0.0
    skipped: int = 0
    measured_steps: int = 0
    """Optimizer steps in which any rank computed a sample."""

    def add(self, *outputs: LossOutput) -> None:
        for output in outputs:
            for name, value in output.sums.items():
                value = value.detach()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            for name, value in output.maxima.items():
                value = value.detach()
                self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value
        loss = outputs[0].loss.detach()
        self.sums[self._loss] = self.sums.get(self._loss, torch.zeros_like(loss)) + loss

    @property
    def _loss(self) -> str:
        return f"{self.area}/loss"

    def optimizer_step(self, denominators: Denominators, *, grad_norm: float, rate: float, skipped: bool) -> None:
        self.measured_steps += denominators.measured > 0
        self.grad_norms.append(grad_norm)
        self.rate = rate
        self.skipped += skipped

    def reduced(self, device: str) -> dict[str, float]:
        """Sum over ranks and average over optimizer steps (except for the loss, over those that computed a sample);
        maxima are over ranks and steps."""
        steps, measured = max(1, len(self.grad_norms)), max(1, self.measured_steps)
        if self.grad_norms:
            self.sums.setdefault(self._loss, torch.zeros((), device=device))
        sums, maxima = (
            _over_ranks(self.sums, dist.ReduceOp.SUM, device),
            _over_ranks(self.maxima, dist.ReduceOp.MAX, device),
        )
        return {
            **{name: value / self.copies / (steps if name == self._loss else measured) for name, value in sums.items()},
            **maxima,
            f"{self.area}/grad_norm": sum(self.grad_norms) / steps,
            f"{self.area}/learning_rate": self.rate,
            f"{self.area}/skipped_updates": float(self.skipped),
        }


def _over_ranks(values: dict[str, Tensor], op: dist.ReduceOp.RedOpType, device: str) -> dict[str, float]:
    if dist.get_world_size() > 1:
        # A rank without micro-batches has no names: all ranks first agree on the union.
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, sorted(values))
        names = sorted({name for one in everyone for name in one})
        neutral = 0.0 if op == dist.ReduceOp.SUM else float("-inf")
        stacked = torch.tensor([float(values.get(name, neutral)) for name in names], device=device)
        dist.all_reduce(stacked, op=op)
        return dict(zip(names, stacked.tolist(), strict=True))
    names = sorted(values)
    return dict(zip(names, torch.stack([values[n].float() for n in names]).tolist(), strict=True)) if names else {}
