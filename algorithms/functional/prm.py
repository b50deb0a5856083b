"""Losses that make an implicit process reward model (arXiv 2412.01981, 2502.01456) out of outcome labels.

A response's score is s = beta x sum over its tokens of (log pi_phi - log pi_ref): a sum, never a mean over tokens. All
functions work on logits (never sigmoid first: its fp32 value is exactly 1 from s of about 17, and the gradient 0) in
fp32 at least, and return one loss per response, pair or group, so that the caller divides by global counts.

How good a process reward model is, and what its rewards do; numpy, per sample or per batch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.functional.advantages import Bool, Float64, Int64, members_of_groups
from algorithms.functional.returns import Masks, Ragged


def response_scores(
    logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int, beta: float
) -> Tensor:
    """s [S] of flat rows [R] (rows as in `algorithms.base.LossInputs`); differentiable in `logprobs` only.

    Rows with mask 0 do not enter, whatever they hold.
    """
    ratios = torch.where(mask > 0, _wide(logprobs) - _wide(reference_logprobs).detach(), 0.0)
    return beta * ratios.new_zeros(num_sequences).index_add(0, sequence, ratios)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-[l log sigma(s) + (1 - l) log sigma(-s)], [S]; labels in [0, 1] may be soft (a share of passed tests)."""
    scores = _wide(scores)
    return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma(s_w - s_l) per pair [P] of a correct and an incorrect response to one prompt."""
    return -F.logsigmoid(_wide(chosen) - _wide(rejected))


def nca_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma(s_w) - log sigma(-s_w) / 2 - log sigma(-s_l) / 2 per pair [P] (arXiv 2402.05369)."""
    chosen, rejected = _wide(chosen), _wide(rejected)
    return -F.logsigmoid(chosen) - F.logsigmoid(-chosen) / 2 - F.logsigmoid(-rejected) / 2


def nca(scores: Tensor, targets: Tensor, group: Tensor) -> Tensor:
    """-sum_i [p_i log sigma(s_i) + log sigma(-s_i) / K] per group [G] (arXiv 2402.05369).

    scores, targets, group [S]: targets p are each group's own distribution, e.g. softmax(reward / alpha); groups are
    numbered from 0, K is a group's size. With K = 2 and a hard target this is `nca_pair`.
    """
    scores = _wide(scores)
    size = _per_group(torch.ones_like(scores), group)[group]
    return _per_group(-targets.to(scores.dtype) * F.logsigmoid(scores) - F.logsigmoid(-scores) / size, group)


def info_nca(scores: Tensor, targets: Tensor, group: Tensor) -> Tensor:
    """-sum_i p_i log softmax(s)_i per group [G]; arguments as for `nca`. With K = 2 and a hard target this is `dpo`."""
    scores = _wide(scores)
    groups = int(group.max()) + 1
    largest = scores.new_full((groups,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
    shifted = scores - largest[group]
    log_sum = _per_group(shifted.exp(), group).log()
    return _per_group(-targets.to(scores.dtype) * (shifted - log_sum[group]), group)


def kto(
    scores: Tensor, labels: Tensor, baseline: Tensor, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w_D (1 - sigma(s - z)) for correct responses, w_U (1 - sigma(z - s)) for the others; [S] (arXiv 2402.01306).

    labels [S] 1 or 0; `baseline` scalar z = beta x KL estimate, from `kto_baseline`; no gradient flows through it. Soft
    labels mix the two.
    """
    scores = _wide(scores)
    margin = scores - baseline.detach()
    labels = labels.to(scores.dtype)
    return desirable_weight * labels * torch.sigmoid(-margin) + undesirable_weight * (1 - labels) * torch.sigmoid(
        margin
    )


def kto_baseline(mismatched_scores: Tensor) -> Tensor:
    """z = max(0, mean s) over responses paired with *other* prompts; average the mean over ranks first. Detached."""
    return _wide(mismatched_scores).mean().clamp(min=0.0).detach()


def correct_incorrect_pairs(labels: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Places (chosen, rejected) of all pairs of one group with labels chosen > rejected; [P] each.

    labels, group [S]. Groups that are all right or all wrong give no pair; soft labels give one wherever they differ.
    """
    better = (labels[:, None] > labels[None, :]) & (group[:, None] == group[None, :])
    chosen, rejected = better.nonzero(as_tuple=True)
    return chosen, rejected


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _per_group(values: Tensor, group: Tensor) -> Tensor:
    return values.new_zeros(int(group.max()) + 1).index_add(0, group, values)


def pair_accuracy(scores: Float64, labels: Float64, group: Int64, valid: Bool) -> Float64:
    """Per group with two valid samples: the share of (better, worse) pairs that `scores` put in that order.

    scores, labels, group, valid [B]; pairs are weighted by their labels' difference (soft labels), equal scores count
    half. A group without a difference counts 0.5, as in the official code.
    """
    shares = []
    for members in members_of_groups(valid, group):
        gap = np.clip(labels[members][:, None] - labels[members][None, :], 0.0, None)
        margin = scores[members][:, None] - scores[members][None, :]
        right = (margin > 0) + 0.5 * (margin == 0)
        shares.append(float((gap * right).sum() / gap.sum()) if gap.any() else 0.5)
    return np.array(shares, dtype=np.float64)


def sign_accuracy(scores: Float64, labels: Float64, valid: Bool) -> float:
    """Share of valid samples with s > 0 for a label above 0.5 and s < 0 else; a score of 0 says nothing and is wrong.

    NaN without valid samples.
    """
    if not valid.any():
        return float("nan")
    return float((scores[valid] * np.where(labels[valid] > 0.5, 1.0, -1.0) > 0).mean())


def length_correlation(returns: Ragged, masks: Masks, keep: Bool) -> float:
    """Correlation of a response's first return with its number of trained tokens; NaN if either does not vary.

    Far from 0: the process reward pays for (or against) length.
    """
    chosen = [(g[m][0], m.sum()) for g, m, k in zip(returns, masks, keep, strict=True) if k and m.any()]
    first, length = np.array(chosen, dtype=np.float64).T if chosen else (np.zeros(0), np.zeros(0))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(length) == 0:
        return float("nan")
    return float(np.corrcoef(first, length)[0, 1])


def last_token_share(process: Ragged, masks: Masks, keep: Bool) -> float:
    """Share of the summed |process reward| that stands on each response's last trained token; NaN if all are 0.

    Near 1 the model is an outcome reward in disguise.
    """
    rows = [np.abs(r[m]) for r, m, k in zip(process, masks, keep, strict=True) if k and m.any()]
    total = sum(float(row.sum()) for row in rows)
    return sum(float(row[-1]) for row in rows) / total if total > 0 else float("nan")


def brier(scores: Float64, labels: Float64) -> float:
    """Mean (sigma(s) - label)^2 over samples [B]: 0.25 for a model that knows nothing, 0 for one that knows all."""
    return float(((_sigmoid(scores) - labels) ** 2).mean())


def calibration_error(scores: Float64, labels: Float64, bins: int = 10) -> float:
    """|mean sigma(s) - mean label| in equal bins of sigma(s), weighted by their samples (arXiv 1706.04599 eq. 3)."""
    return expected_calibration_error(_sigmoid(scores), labels, bins)


def expected_calibration_error(predicted: Float64, labels: Float64, bins: int = 10) -> float:
    """The same from predicted probabilities [N]."""
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    gaps = [abs(float((predicted - labels)[index == b].sum())) for b in np.unique(index)]
    return sum(gaps) / len(labels)


def _sigmoid(scores: Float64) -> Float64:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * scores)))  # without overflow for large |s|
