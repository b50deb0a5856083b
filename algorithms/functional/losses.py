"""Losses of policy and critic: pure functions of flat rows [R].

Log-ratios are clamped to [-20, 20], with no gradient outside. Only tensor methods are used, so that a configuration can
look up a surrogate without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from algorithms.base import Denominators
from algorithms.functional.kl import LARGEST_LOG_RATIO, Estimator

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]
Correction = Literal["truncate", "mask", "decoupled", "sequence_truncate", "sequence_mask", "geometric_mask"]


def aggregate(
    rows: Tensor,
    mask: Tensor,
    sequence: Tensor,
    num_sequences: int,
    denominators: Denominators,
    how: Aggregation,
    constant_length: int | None = None,
) -> Tensor:
    """[R] values -> scalar share of the step's mean; shares of micro-batches and ranks add up.

    token_mean: sum over tokens / all tokens (DAPO, arXiv 2503.14476 eq. 8).
    sequence_mean_token_mean: mean over samples of the token mean (GRPO, arXiv 2402.03300 eq. 3).
    sequence_mean_token_sum: mean over samples of the token sum.
    constant_length: token sum / (samples x constant_length) (Dr. GRPO, arXiv 2503.20783 section 3.2).
    """
    rows = rows * mask
    if how == "token_mean":
        return rows.sum() / denominators.tokens
    if how == "constant_length":
        if constant_length is None:
            raise ValueError("aggregation constant_length needs a constant_length")
        return rows.sum() / (denominators.sequences * constant_length)
    if how == "sequence_mean_token_sum":
        return rows.sum() / denominators.sequences
    tokens = rows.new_zeros(num_sequences).index_add(0, sequence, mask)
    return (rows / tokens.clamp(min=1.0)[sequence]).sum() / denominators.sequences


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's per-token loss [R] (arXiv 1707.06347 eq. 7, negated) and where clipping binds [R] (bool).

    ratio = exp(logprobs - old_logprobs); loss = max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high)).
    `dual_clip` c > 1 bounds the loss of tokens with A < 0 by -A c (arXiv 1912.09729).
    """
    ratio = clamped(logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, binds = plain.maximum(clipped), clipped > plain
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        above = (advantages < 0) & (loss > ceiling)
        loss, binds = ceiling.where(above, loss), binds | above
    return loss, binds


def sequence_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int
) -> Tensor:
    """GSPO's log s_i [R] (arXiv 2507.18071 eq. 7): the mean log-ratio of a sample's trained tokens.

    The gradient flows through each row's log-prob (GSPO-token, eq. 14); it sums to GSPO's where a sample's tokens share
    one advantage and are averaged over the sample.
    """
    rows = (logprobs - old_logprobs).where(mask > 0, 0.0).detach()
    total = rows.new_zeros(num_sequences).index_add(0, sequence, rows)
    tokens = rows.new_zeros(num_sequences).index_add(0, sequence, mask.to(rows.dtype))
    return (total / tokens.clamp(min=1.0))[sequence] + logprobs - logprobs.detach()


def gspo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequence: Tensor,
    num_sequences: int,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """GSPO's loss [R] and where clipping binds [R]: the clipped surrogate with one ratio per sample.

    Use with aggregation `sequence_mean_token_mean` (eq. 5).
    """
    log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask, sequence, num_sequences)
    return clipped_surrogate(log_ratio, log_ratio.new_zeros(()), advantages, clip_low, clip_high)


def cispo_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO's loss [R] (arXiv 2506.13585 eq. 4, 5) and where its weight is clipped [R].

    -sg(clamp(ratio, 1 - clip_low, 1 + clip_high)) A log pi: clipping keeps the gradient. clip_low = 1: no lower bound,
    as in the paper. Use with aggregation `token_mean`.
    """
    ratio = clamped(logprobs - old_logprobs).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logprobs, weight != ratio


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE's loss [R], -A log pi; nothing is clipped [R]."""
    return -advantages * logprobs, logprobs.new_zeros(logprobs.shape).bool()


def rollout_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    sequence: Tensor,
    num_sequences: int,
    correction: Correction,
    *,
    largest: float | None = None,
    smallest: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights [R] for samples from a policy other than the proximal one, and where they were cut [R]; no gradient.

    w = exp(old - rollout), 1 where mask is 0. truncate: min(w, largest) (truncated importance sampling, Yao et al.
    2025). mask: w within [smallest, largest], else 0 (the token still counts in the denominators). decoupled: w (AReaL,
    arXiv 2505.24298). sequence_truncate, sequence_mask: the same with the product of a sample's w for all its tokens.
    geometric_mask: 1 where their geometric mean is within the bounds, else 0 (all three: Liu and Li 2025, "When Speed
    Kills Stability"). Raise ValueError if a bound is missing.
    """
    log_ratio = (old_logprobs - rollout_logprobs).where(mask > 0, 0.0).detach()
    if correction in ("sequence_truncate", "sequence_mask", "geometric_mask"):
        total = log_ratio.new_zeros(num_sequences).index_add(0, sequence, log_ratio)
        if correction == "geometric_mask":
            total = total / mask.new_zeros(num_sequences).index_add(0, sequence, mask).clamp(min=1.0)
        log_ratio = total[sequence]
    ratio = clamped(log_ratio).exp()
    if correction == "decoupled":
        return ratio, ratio.new_zeros(ratio.shape).bool()
    if largest is None:
        raise ValueError(f"correction {correction!r} needs the largest weight")
    if correction in ("truncate", "sequence_truncate"):
        return ratio.clamp(max=largest), ratio > largest
    outside = (ratio > largest) | (ratio < (0.0 if smallest is None else smallest))
    weight = ratio.new_ones(ratio.shape) if correction == "geometric_mask" else ratio
    return weight.where(~outside, 0.0), outside


def kl_divergence(logprobs: Tensor, reference_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimates [R] of KL(policy || reference), as in `kl.py`; differentiable in `logprobs`.

    The expected gradient of k1 is 0 (use it in the reward); that of k2 is the KL's; that of k3 is that of KL(reference
    || policy).
    """
    if estimator == "k1":
        return logprobs - reference_logprobs
    d = clamped(logprobs - reference_logprobs)
    return d**2 / 2 if estimator == "k2" else (-d).exp() - 1 + d


def clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value [R], and where clipping binds [R] (bool).

    max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 (PPO's public code; arXiv 2005.12729). clip None:
    (V - R)^2 / 2.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, plain.new_zeros(plain.shape).bool()
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return plain.maximum(clipped) / 2, clipped > plain
