"""How good a process reward model is, and what its rewards do; numpy, per sample or per batch."""

from __future__ import annotations

import numpy as np

from algorithms.advantages import Bool, Float64, Int64, members_of_groups
from algorithms.returns import Masks, Ragged


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
    predicted = _sigmoid(scores)
    place = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    gaps = [abs(float((predicted - labels)[place == b].sum())) for b in np.unique(place)]
    return sum(gaps) / len(labels)


def _sigmoid(scores: Float64) -> Float64:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * scores)))  # without overflow for large |s|
