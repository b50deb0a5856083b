"""Weights that every rollout worker must hold, and the proof that it holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.experience import UserError

Canary = tuple[tuple[int, ...], ...]
"""Token ids of sequences whose log-probs sampler and learner compare."""
CANARY_PROMPTS, CANARY_TOKENS = 4, 32
"""Maximum number of sequences, and of tokens in each."""
NOISES_OF_A_MEASURED_CHANGE = 12.0
LEAST_CHANGE_SHOWN = 0.5


class WeightsNotLoadedError(UserError):
    """Raised if a worker samples with weights other than those published."""


@dataclass(frozen=True)
class Loaded:
    """An engine's report after loading weights; sums are of bit patterns."""

    unwritten: tuple[str, ...] = ()
    """Layers with parameters that were not fully written, and how much was."""
    arrived: int = 0
    """Sum over the weights that arrived (and whose parameters are readable), in the engine's precision."""
    held: int = 0
    """Sum over the readable parameters that the engine has now."""


@dataclass(frozen=True)
class WeightReceipt:
    """A worker's report on the weights it would now sample with."""

    version: int
    checksum: str
    """Checksum of the weights received."""
    announced: str | None
    """The checksum sent with the weights; None after a direct transfer, for which the learner has it."""
    canary_logprobs: np.ndarray
    loaded: Loaded | None = Loaded()
    """None: nothing was loaded since the last receipt."""
    idle: float = 0.0
    """Seconds since the last receipt during which the engine had nothing to do."""
    frozen: float = 0.0
    """Seconds during which the engine sampled nothing because of these weights."""


@dataclass(frozen=True)
class Published:
    bundle: Any
    """Reference to a WeightBundle; None for a direct transfer."""
    version: int
    canary: Canary
    wanted: np.ndarray
    """The learner's log-probs of the canary: all sequences, each without its first token."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of a sampler with the learner on the canary."""

    difference: float
    """Largest absolute difference of log-probs."""
    change: float | None = None
    """Share of the learner's change that the sampler shows (about 1); None while it is too small to measure."""

    def metrics(self) -> dict[str, float]:
        change = {} if self.change is None else {"weights/canary_change": self.change}
        return {"weights/canary_difference": self.difference, **change}

    @classmethod
    def weakest(cls, agreements: Sequence[Agreement]) -> Agreement:
        changes = [agreement.change for agreement in agreements if agreement.change is not None]
        return cls(max(a.difference for a in agreements), min(changes, key=lambda c: -abs(c - 1)) if changes else None)


def change_shown(learner: tuple[np.ndarray, np.ndarray], sampler: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Return the share of the learner's change on the canary that the sampler shows; None if noise may hide it.

    `learner`, `sampler`: log-probs [T] before and after. With a the learner's change and b the sampler's, the share is
    (a.b) / (a.a): the slope of b over a. An engine with the new weights has b = a + noise, a slope of 1; one that kept
    the old ones has b = 0, a slope of 0 whatever the precision.

    The slope's standard error is sqrt(2) s / |a|, where s is the noise of one log-prob, from both kernels' rounding.
    The difference between both ends before the change includes this noise and serves as s: 1e-7 in fp32, about 0.01 in
    bfloat16. A change is measured from 12 sqrt(2) s on, where 0.5 is six standard errors from both 0 and 1: an engine
    with old weights does not pass, and one with new weights does not stop a long run by chance.
    """
    learners, samplers = (after.astype(np.float64) - before for before, after in (learner, sampler))
    distance = learner[0].astype(np.float64) - sampler[0]
    noise = np.sqrt(np.mean(distance**2)) if len(distance) else 0.0
    size = float(np.sqrt(learners @ learners))
    if not size > max(NOISES_OF_A_MEASURED_CHANGE * np.sqrt(2.0) * noise, 1e-6):
        return None
    return float(learners @ samplers / size**2)


@dataclass
class Proof:
    """What one worker has proved so far; a new process starts with a new one."""

    last: WeightReceipt | None = None
    learners: np.ndarray | None = None
    """[T] the learner's log-probs of the canary at the last publication whose change was measured, or at the first."""
    samplers: np.ndarray | None = None
    """[T] the worker's log-probs at that moment: small changes add up until they can be measured."""

    def accept(
        self, who: str, published: Published, receipt: WeightReceipt, checksum: str | None, tolerance: float
    ) -> Agreement:
        """Check a receipt. `checksum`: the learner's, for a direct transfer.

        Raises WeightsNotLoadedError unless the receipt proves that worker `who` received these weights undamaged, has
        them in its parameters, and samples as the learner does.
        """
        version = published.version
        sent = receipt.announced if checksum is None else checksum
        if sent not in (None, receipt.checksum):
            raise WeightsNotLoadedError(
                f"{who}: weights of version {version} arrived damaged: their checksum is {receipt.checksum}, the "
                f"learner's is {sent}"
            )
        if receipt.version != version:
            raise WeightsNotLoadedError(f"{who} has weights of version {receipt.version}, not {version}")
        self._check_parameters(f"{who}: version {version}", receipt)
        difference = float(np.abs(receipt.canary_logprobs - published.wanted).max())
        if not difference <= tolerance:  # also true for NaN
            raise WeightsNotLoadedError(
                f"{who}: after version {version} was loaded, its log-probs of the canary prompts differ from the "
                f"learner's by {difference:.3g}, more than {tolerance:g} (rollout.canary_tolerance): "
                + _cause(receipt.canary_logprobs, published.wanted)
            )
        change = self._change(who, published, receipt)
        if change is not None or self.learners is None:
            self.learners, self.samplers = published.wanted, receipt.canary_logprobs
        self.last = receipt
        return Agreement(difference, change)

    def _check_parameters(self, what: str, receipt: WeightReceipt) -> None:
        loaded = receipt.loaded
        if loaded is None:
            raise WeightsNotLoadedError(f"{what} was announced, but the engine loaded nothing")
        if loaded.unwritten:
            raise WeightsNotLoadedError(
                f"{what} did not reach every parameter of the engine; these would stay old: "
                f"{', '.join(loaded.unwritten)} (elements written). The learner's names differ from this model's in "
                "vLLM, or it leaves tensors out"
            )
        if self.last is None or self.last.loaded is None:
            return
        before = self.last.loaded
        # More sensitive than log-probs: at a learning rate of 1e-6 a step moves those of the embedded policy by 3e-4,
        # bfloat16's rounding by 3e-2; but a step changes the parameters' bits. Their sum need not equal that of what
        # arrived, because of shards, repacked copies and values that vLLM derives.
        if loaded.arrived != before.arrived and loaded.held == before.held:
            raise WeightsNotLoadedError(
                f"{what} arrived and differs from version {self.last.version}, yet the engine's parameters are "
                "unchanged to the last bit: it kept the old weights"
            )

    def _change(self, who: str, published: Published, receipt: WeightReceipt) -> float | None:
        if self.learners is None or self.samplers is None:
            return None
        change = change_shown((self.learners, published.wanted), (self.samplers, receipt.canary_logprobs))
        if change is not None and not change >= LEAST_CHANGE_SHOWN:
            raise WeightsNotLoadedError(
                f"{who}: with version {published.version} the learner's log-probs of the canary prompts changed, but "
                f"the sampler's show {change:.0%} of that change: it still samples with older weights"
            )
        return change


def _cause(sampler: np.ndarray, learner: np.ndarray) -> str:
    if not np.isfinite(learner).all():
        return "the learner's are not finite, so look for NaN in the weights of model.path, or a diverged policy"
    if not np.isfinite(sampler).all():
        return "the sampler's are not finite"
    return "it does not sample from the policy being trained"
