"""Losses of an implicit process reward model on outcome labels (arXiv 2412.01981, 2502.01456); torch.

A response's score is s = beta x sum over its tokens of (log pi_phi - log pi_ref). Losses take logits in fp32 at least
(sigmoid saturates) and return one loss per response or pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def response_scores(
    logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int, beta: float
) -> Tensor:
    """s [S] of flat rows [R]; differentiable in `logprobs` only. Rows with mask 0 are ignored."""
    ratios = torch.where(mask > 0, _wide(logprobs) - _wide(reference_logprobs).detach(), 0.0)
    return beta * ratios.new_zeros(num_sequences).index_add(0, sequence, ratios)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-[l log sigma(s) + (1 - l) log sigma(-s)], [S]; labels in [0, 1] may be soft."""
    scores = _wide(scores)
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma(s_w - s_l) per pair [P] of a correct and an incorrect response."""
    return -F.logsigmoid(_wide(chosen) - _wide(rejected))


def nca_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma(s_w) - log sigma(-s_w) / 2 - log sigma(-s_l) / 2 per pair [P] (arXiv 2402.05369)."""
    chosen, rejected = _wide(chosen), _wide(rejected)
    return -F.logsigmoid(chosen) - F.logsigmoid(-chosen) / 2 - F.logsigmoid(-rejected) / 2


def kto(
    scores: Tensor, labels: Tensor, baseline: Tensor, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w_D (1 - sigma(s - z)) for correct responses, w_U (1 - sigma(z - s)) for the others; [S] (arXiv 2402.01306).

    labels [S] in [0, 1], soft ones mix the two; `baseline` scalar z = beta x KL estimate, detached.
    """
    scores = _wide(scores)
    margin = scores - baseline.detach()
    labels = labels.to(scores.dtype)
    return desirable_weight * labels * torch.sigmoid(-margin) + undesirable_weight * (1 - labels) * torch.sigmoid(
        margin
    )


def kto_baseline(mismatched_scores: Tensor) -> Tensor:
    """z = max(0, mean s) over responses paired with *other* prompts, detached; average the mean over ranks first."""
    return _wide(mismatched_scores).mean().clamp(min=0.0).detach()


def correct_incorrect_pairs(labels: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (chosen, rejected) [P] of all pairs of one group with labels chosen > rejected; labels, group [S]."""
    better = (labels[:, None] > labels[None, :]) & (group[:, None] == group[None, :])
    chosen, rejected = better.nonzero(as_tuple=True)
    return chosen, rejected


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
