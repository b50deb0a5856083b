"""Policy losses as pure functions of flat rows of response tokens. Shapes as in `algorithms.base.LossInputs`.

Every function returns sums already divided by the denominators of the whole optimizer step, so that the shares of
micro-batches and ranks simply add up.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from algorithms.base import Denominators

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]


def aggregate(
    rows: Tensor,
    mask: Tensor,
    sequence: Tensor,
    num_sequences: int,
    denominators: Denominators,
    how: Aggregation,
    constant_length: int | None = None,
) -> Tensor:
    """[R] values -> scalar share of the step's mean.

    token_mean: sum over tokens / all tokens (DAPO, arXiv 2503.14476 eq. 8).
    sequence_mean_token_mean: mean over samples of each sample's token mean (GRPO, arXiv 2402.03300 eq. 3).
    sequence_mean_token_sum: mean over samples of each sample's token sum.
    constant_length: token sum / (samples x constant_length) (Dr. GRPO, arXiv 2503.20783 section 3.2).
    """
    rows = rows * mask
    if how == "token_mean":
        return rows.sum() / denominators.tokens
    if how == "constant_length":
        if constant_length is None:
            raise ValueError("aggregation constant_length needs the constant")
        return rows.sum() / (denominators.sequences * constant_length)
    if how == "sequence_mean_token_sum":
        return rows.sum() / denominators.sequences
    tokens = rows.new_zeros(num_sequences).index_add(0, sequence, mask)
    return (rows / tokens.clamp(min=1.0)[sequence]).sum() / denominators.sequences


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's per-token loss [R] (arXiv 1707.06347 eq. 7, negated) and where clipping binds [R] (bool).

    ratio = exp(logprobs - old_logprobs); loss = max(-A * ratio, -A * clamp(ratio, 1 - clip_low, 1 + clip_high)).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """[R] estimate of KL(policy || reference) per token: exp(d) - 1 - d, d = reference - policy.

    Schulman's k3 ("Approximating KL divergence", 2020): unbiased for samples of the policy, never negative. d is
    clamped to [-20, 20] so that one token cannot overflow the sum.
    """
    d = (reference_logprobs - logprobs).clamp(-20.0, 20.0)
    return torch.exp(d) - 1 - d
