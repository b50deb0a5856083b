"""Metrics of one update: summed over micro-batches, reduced over ranks, averaged over optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from algorithms.base import Denominators, LossOutput
from rlkit.learner.batches import Rows


@torch.no_grad()
def mismatch(before: Tensor, rows: Rows, denominators: Denominators) -> LossOutput:
    """Distance of the learner's log-probs from the sampler's on trained tokens.

    kl/rollout is k3 of KL(sampler || learner): mean of exp(d) - 1 - d with d = learner - sampler.
    """
    difference = (before - rows.rollout_logprobs) * rows.mask
    return LossOutput(
        loss=before.new_zeros(()),
        sums={
            "mismatch/logprob_mean": difference.abs().sum() / denominators.tokens,
            "kl/rollout": ((torch.exp(difference) - 1 - difference) * rows.mask).sum() / denominators.tokens,
        },
        maxima={"mismatch/logprob_max": difference.abs().max()},
    )


@dataclass
class StepMetrics:
    area: str
    """The first part of the metrics' names."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    rate: float = 0.0
    skipped: int = 0

    def add(self, *outputs: LossOutput) -> None:
        for output in outputs:
            for name, value in output.sums.items():
                value = value.detach()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            for name, value in output.maxima.items():
                value = value.detach()
                self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value
        loss = outputs[0].loss.detach()
        name = f"{self.area}/loss"
        self.sums[name] = self.sums.get(name, torch.zeros_like(loss)) + loss

    def optimizer_step(self, *, grad_norm: float, rate: float, skipped: bool) -> None:
        self.grad_norms.append(grad_norm)
        self.rate = rate
        self.skipped += skipped

    def reduced(self, device: str) -> dict[str, float]:
        """Sums over ranks averaged over optimizer steps; maxima over ranks and steps."""
        steps = max(1, len(self.grad_norms))
        sums, maxima = (
            _over_ranks(self.sums, dist.ReduceOp.SUM, device),
            _over_ranks(self.maxima, dist.ReduceOp.MAX, device),
        )
        return {
            **{name: value / steps for name, value in sums.items()},
            **maxima,
            f"{self.area}/grad_norm": sum(self.grad_norms) / steps,
            f"{self.area}/learning_rate": self.rate,
            f"{self.area}/skipped_updates": float(self.skipped),
        }


def _over_ranks(values: dict[str, Tensor], op: dist.ReduceOp.RedOpType, device: str) -> dict[str, float]:
    if dist.get_world_size() > 1:
        # A rank without micro-batches has no names: all ranks agree on the union first.
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, sorted(values))
        names = sorted({name for one in everyone for name in one})
        neutral = 0.0 if op == dist.ReduceOp.SUM else float("-inf")
        stacked = torch.tensor([float(values.get(name, neutral)) for name in names], device=device)
        dist.all_reduce(stacked, op=op)
        return dict(zip(names, stacked.tolist(), strict=True))
    names = sorted(values)
    return dict(zip(names, torch.stack([values[n].float() for n in names]).tolist(), strict=True)) if names else {}
