"""Log-ratios of two language models, and the objectives that make process rewards of them, on packed trees.

Used by the reward that learns during a run and by offline training alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from algorithms import prm_losses
from rlkit.models.packing import PackedBatch, Tree, pack

Objective = Literal["ce", "dpo", "nca", "kto"]
PAIRED: tuple[Objective, ...] = ("dpo", "nca")
"""Objectives whose examples are pairs of a better and a worse response to one prompt."""
LARGEST_INITIAL_RATIO = 1e-3
"""Models of equal weights must agree to this: else the two run through different kernels or types."""


def log_ratios(policy: Any, reference: Any, trees: Sequence[Tree], device: str, chunk: int) -> Tensor:
    """q = log pi_phi - log pi_ref [R] at temperature 1 of the trees' suffix tokens; differentiable in pi_phi."""
    return packed_log_ratios(policy, reference, pack(trees).to(device), chunk)


def packed_log_ratios(policy: Any, reference: Any, packed: PackedBatch, chunk: int) -> Tensor:
    """The same of a packed batch."""
    with torch.no_grad():
        reference_logprobs, _ = reference(packed, 1.0, chunk)
    logprobs, _ = policy(packed, 1.0, chunk)
    ratios: Tensor = logprobs - reference_logprobs
    return ratios


def response_scores(ratios: Tensor, trees: Sequence[Tree], beta: float, mask: Tensor | None = None) -> Tensor:
    """s = beta * sum of q [S], one per suffix of the trees; rows with mask 0 do not enter."""
    lengths = torch.tensor([len(suffix) for tree in trees for suffix in tree.suffixes])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(ratios.device)
    mask = torch.ones_like(ratios) if mask is None else mask
    return prm_losses.response_scores(ratios, torch.zeros_like(ratios), mask, sequence, len(lengths), beta)


def objective_sum(
    objective: Objective,
    scores: Tensor,
    labels: Tensor,
    pairs: tuple[Tensor, Tensor],
    baseline: Tensor | None = None,
) -> Tensor:
    """Sum of the objective over scores [S] with labels [S] (ce, kto), or over pairs ([P] better, [P] worse places).

    `baseline`: KTO's z, of the whole batch.
    """
    if objective == "ce":
        return prm_losses.cross_entropy(scores, labels).sum()
    if objective == "kto":
        if baseline is None:
            raise ValueError("kto needs the baseline of the whole batch")
        return prm_losses.kto(scores, labels, baseline).sum()
    better, worse = pairs
    loss = prm_losses.dpo if objective == "dpo" else prm_losses.nca_pair
    return loss(scores[better], scores[worse]).sum()


def mismatched(trees: Sequence[Tree]) -> list[Tree]:
    """The first response of each tree after the next tree's prompt: what KTO's baseline is the mean score of.

    Trees must have different prompts. Raises ValueError for fewer than two: nothing would be mismatched.
    """
    if len(trees) < 2:
        raise ValueError("KTO's baseline needs responses to at least two prompts in a batch")
    following = [*trees[1:], trees[0]]
    return [Tree(other.prefix, tree.suffixes[:1]) for tree, other in zip(trees, following, strict=True)]


@torch.no_grad()
def check_equal(policy: Any, reference: Any, device: str, chunk: int) -> None:
    """Raises ValueError if two models of equal weights do not give log-ratios of zero."""
    largest = float(log_ratios(policy, reference, [Tree((0,), (tuple(range(1, 17)),))], device, chunk).abs().max())
    if not largest <= LARGEST_INITIAL_RATIO:
        raise ValueError(
            f"the implicit PRM and its reference have equal weights but differ by {largest:.3g} in log-prob "
            f"(at most {LARGEST_INITIAL_RATIO:g} is allowed): process rewards would be numerical noise"
        )
