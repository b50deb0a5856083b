"""Surrogates that bound an update by means other than a clipped token ratio: SAPO, GMPO, DPPO.

As in `losses.py`, they return token losses [R] and where the bound binds [R], and use only tensor methods.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from algorithms.functional.losses import clamped
from rlkit.experience.section import Section

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_PROBABILITY = 1e-7
"""Lower bound on the probability of all other tokens together, in a binary KL."""


class SAPO:
    """Soft adaptive policy optimisation (arXiv 2511.20347): -A (4 / T) sigmoid(T (ratio - 1)).

    T is `positive_temperature` where A > 0, else `negative_temperature`. A ratio's gradient has the weight 4 s (1 - s),
    where s is the sigmoid: 1 at ratio 1, falling to 0 on both sides; "binds" where it is below 1/2. Use with
    aggregation `sequence_mean_token_mean`.
    """

    class Config(Section):
        positive_temperature: float = Field(default=1.0, gt=0)
        """Temperature of tokens with a positive advantage."""
        negative_temperature: float = Field(default=1.05, gt=0)
        """Temperature of the other tokens; higher, because their updates spread over the whole vocabulary."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = self.config.positive_temperature, self.config.negative_temperature
        temperature = advantages.new_full(advantages.shape, negative).masked_fill(advantages > 0, positive)
        gate = (temperature * (clamped(logprobs - old_logprobs).exp() - 1)).sigmoid()
        return -advantages * gate * 4 / temperature, 4 * gate * (1 - gate) < 0.5


def gmpo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequence: Tensor,
    num_sequences: int,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Geometric-mean policy optimisation (arXiv 2507.20673): -A times the geometric mean of a sample's ratios.

    Each ratio is first bounded above by 1 + clip_high where A > 0, below by 1 - clip_low where A < 0. Use with
    aggregation `sequence_mean_token_mean`.
    """
    log_ratio = clamped((logprobs - old_logprobs).where(mask > 0, 0.0))
    low, high = (math.log1p(-clip_low) if clip_low < 1 else -math.inf), math.log1p(clip_high)
    above, below = (advantages > 0) & (log_ratio > high), (advantages < 0) & (log_ratio < low)
    bounded = log_ratio.masked_fill(above, high).masked_fill(below, low)
    total = bounded.new_zeros(num_sequences).index_add(0, sequence, bounded)
    tokens = mask.new_zeros(num_sequences).index_add(0, sequence, mask)
    return -advantages * (total / tokens.clamp(min=1.0)).exp()[sequence], above | below


class DPPO:
    """Divergence PPO (arXiv 2602.04879): -A ratio, without gradient where a token has left the trust region.

    A token has left it if the divergence between policy and sampler (the sampled token against all others) exceeds
    `threshold` and A pushes it further out. The ratio is to the sampler as well, so that it corrects for stale samples.
    """

    measures_from_sampler = True

    class Config(Section):
        divergence: Literal["tv", "kl"] = "tv"
        """|pi - mu|, or the KL of (mu, 1 - mu) from (pi, 1 - pi), mu being the sampler's probability."""
        threshold: float | None = Field(default=None, gt=0)
        """null: the authors' 0.15 for tv, 0.05 nats for kl."""
        largest_ratio: float = Field(default=20.0, gt=1)
        """Ratios above this are cut to it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        published = 0.15 if config.divergence == "tv" else 0.05
        self.threshold = published if config.threshold is None else config.threshold

    def __call__(
        self, logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        now = logprobs.detach()
        sampled = rollout_logprobs.where(mask > 0, now)
        weight = clamped(now - sampled).exp().clamp(max=self.config.largest_ratio)
        outwards = advantages * (now - sampled) > 0
        left = outwards & (self._divergence(now, sampled) > self.threshold)
        return (-weight * advantages * logprobs).masked_fill(left, 0.0), left

    def _divergence(self, now: Tensor, sampled: Tensor) -> Tensor:
        pi, mu = now.exp(), sampled.exp()
        if self.config.divergence == "tv":
            return (pi - mu).abs()
        others = ((1 - probability).clamp(min=SMALLEST_PROBABILITY).log() for probability in (mu, pi))
        return mu * (sampled - now) + (1 - mu) * (next(others) - next(others))
