"""The steps of a `shaping` list (float64)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from algorithms.functional.advantages import overlong_penalty
from algorithms.functional.step_credit import clip, delta
from rewards.shaping import references
from rewards.shaping.references import Fit, Float64, Form
from rlkit.config.named import read_named
from rlkit.experience.section import Named

Int64 = NDArray[np.int64]


@dataclass
class RunningStatistics:
    """Count, mean, sum of squared deviations and extremes; batches are merged exactly (Chan et al.)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, values: Float64) -> None:
        """Add values [n], which must be finite; n may be 0."""
        n = len(values)
        if n == 0:
            return
        total, batch_mean = self.count + n, float(np.mean(values))
        difference = batch_mean - self.mean
        self.mean += difference * n / total
        self.squares += float(np.sum((values - batch_mean) ** 2)) + difference**2 * self.count * n / total
        self.least, self.greatest = min(self.least, float(np.min(values))), max(self.greatest, float(np.max(values)))
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation (ddof=0); 0 for fewer than two values."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count = int(state["count"])
        self.mean, self.squares = float(state["mean"]), float(state["squares"])
        self.least, self.greatest = float(state["least"]), float(state["greatest"])


class Step(Named):
    """Base of all steps. Subclass OutcomeStep, ReferenceStep, RunningStep, ProcessStep or FusingStep."""

    keeps_scale: ClassVar[bool] = False
    """Whether its output is still comparable with reference rewards that it has not shaped."""

    @property
    def sets_scale(self) -> bool:
        """Whether it gives raw model scores a known spread: bounds, or a standard deviation of 1."""
        return False


class OutcomeStep(Step):
    """Changes the outcome values of one group's valid samples."""

    @abstractmethod
    def apply(self, values: Float64, lengths: Int64) -> Float64:
        """values [n], lengths [n] in response tokens -> [n]."""


class ReferenceStep(Step):
    """Compares with the rewards of reference responses to the same prompt. Exactly one of three sources must be set."""

    reference_value: float | None = None
    """The same reference reward for every prompt."""
    reference_rewards: str | None = None
    """Data column with each prompt's reference rewards (a number or a list), scored beforehand by the same reward."""
    reference_responses: str | None = None
    """Column with reference responses (a text or a list), scored once by this reward; `references`: the data's own."""
    max_references: int = Field(default=10, ge=1)
    """Use at most this many references per prompt, the first ones."""

    @abstractmethod
    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        """values [n], reference_rewards [N] -> [n]. Raise ValueError for too few references."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in SOURCES if getattr(self, name) is not None]
        if len(sources) != 1:
            count = f"{' and '.join(sources)} are given" if sources else "none is given"
            raise ValueError(f"needs one of {', '.join(SOURCES)}; {count}")
        if self.reference_value is not None and self.max_references != 10:
            raise ValueError("max_references has no effect with reference_value")
        return self


SOURCES = ("reference_value", "reference_rewards", "reference_responses")


class RunningStep(Step):
    """Uses statistics of all valid values so far, which are saved with the reward's state."""

    @abstractmethod
    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """values [n] -> [n]."""


class ProcessStep(Step):
    """Changes the process rewards of one response."""

    @abstractmethod
    def apply(self, steps: Float64) -> Float64:
        """steps [K] -> [K]."""


class FusingStep(Step):
    """Changes the process rewards of one response depending on its outcome."""

    @abstractmethod
    def apply(self, steps: Float64, outcome: float) -> Float64:
        """steps [K] -> [K]."""


class Par(ReferenceStep):
    """Preference as reward: the mean of f(k (r - offset - r_ref)) over the references (arXiv 2502.18770)."""

    kind: str = "par"
    form: Form = "sigmoid"
    """The function f; quintic is a polynomial fitted to the sigmoid."""
    k: float = Field(default=1.0, gt=0)
    """Steepness of f."""
    offset: float = 0.0
    """3 gives the slow-then-fast variant."""

    @property
    def sets_scale(self) -> bool:
        return True

    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        return references.preference_as_reward(values, reference_rewards, self.form, self.k, self.offset)


class Centre(ReferenceStep):
    """Subtracts the mean reference reward, for example to align the members of an ensemble."""

    kind: str = "centre"

    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        return references.centred(values, reference_rewards)


class Lsc(ReferenceStep):
    """Log-sigmoid centring: log sigma(r - r_ref), r_ref a quantile of the reference rewards (arXiv 2402.00742)."""

    kind: str = "lsc"
    quantile: float = Field(default=0.85, gt=0, lt=1)
    """Which quantile of the reference rewards is r_ref."""
    fit: Fit = "normal"
    """normal: mean and standard deviation of at least two references; empirical: linear interpolation."""
    floor: float | None = Field(default=None, lt=0)
    """Lower bound of the result; null: none."""

    @model_validator(mode="after")
    def _quantile_acts(self) -> Self:
        if self.reference_value is not None and (self.quantile, self.fit) != (0.85, "normal"):
            raise ValueError("quantile and fit have no effect with reference_value, which is r_ref itself")
        return self

    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        if self.reference_value is not None:
            reference = self.reference_value
        else:
            reference = references.reference_quantile(reference_rewards, self.quantile, self.fit)
        return references.log_sigmoid_centred(values, reference, self.floor)


class Standardise(RunningStep):
    """(r - mean) / std with running statistics."""

    kind: str = "standardise"

    @property
    def sets_scale(self) -> bool:
        return True

    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """Only centre while all values so far are equal; change nothing before there are statistics."""
        return (values - statistics.mean) / (statistics.std or 1.0) if statistics.count else values


class ClipStd(RunningStep):
    """r clipped to mean +- width * std with running statistics."""

    kind: str = "clip_std"
    width: float = Field(default=1.0, gt=0)
    """Half-width of the interval in standard deviations."""

    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """Change nothing before there are statistics."""
        room = self.width * statistics.std
        return np.clip(values, statistics.mean - room, statistics.mean + room) if statistics.count else values


class MinMax(RunningStep):
    """(r - min) / (max - min) with running extremes."""

    kind: str = "minmax"

    @property
    def sets_scale(self) -> bool:
        return True

    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """Return 0 while all values so far are equal; change nothing before there are statistics."""
        spread = statistics.greatest - statistics.least
        return (values - statistics.least) / (spread or 1.0) if statistics.count else values


class GroupNormalise(OutcomeStep):
    """(r - mean) / std over the valid samples of the prompt (ddof=0)."""

    kind: str = "group_normalise"
    divide: bool = True
    """false: only centre."""

    @property
    def sets_scale(self) -> bool:
        return self.divide

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        shifted = values - np.mean(values)
        if not self.divide:
            return shifted
        std = float(np.std(values))
        # Equal rewards leave rounding errors, which must not be scaled up to a standard deviation of 1.
        negligible = std <= 1e-12 * max(1.0, float(np.max(np.abs(values))))
        return np.zeros_like(shifted) if negligible else shifted / std


class Clamp(OutcomeStep):
    """Clips outcome rewards to fixed bounds; `high` alone is PAR's ceiling."""

    kind: str = "clamp"
    low: float | None = None
    """Lower bound; null: none."""
    high: float | None = None
    """Upper bound; null: none."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("needs low or high")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        return np.clip(values, self.low, self.high)


class LengthPenalty(OutcomeStep):
    """Subtracts `per_token` for every response token beyond `free_tokens` (as PAR's code does before centring)."""

    kind: str = "length_penalty"
    keeps_scale: ClassVar[bool] = True
    per_token: float = Field(default=0.01, gt=0)
    """Cost of a token."""
    free_tokens: int = Field(default=300, ge=0)
    """Tokens that cost nothing."""

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        over: Float64 = np.maximum(lengths - float(self.free_tokens), 0.0)
        return values - self.per_token * over


class Overlong(OutcomeStep):
    """DAPO's soft punishment of overlong responses, times `weight` (arXiv 2503.14476 eq. 13)."""

    kind: str = "overlong"
    keeps_scale: ClassVar[bool] = True
    max_tokens: int = Field(ge=1)
    """Length at which the full cost applies: usually rollout.max_response_tokens."""
    buffer_tokens: int = Field(ge=1)
    """The cost grows from 0 over this many tokens before max_tokens (DAPO: a fifth of max_tokens)."""
    weight: float = Field(default=1.0, gt=0)
    """The full cost."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens={self.buffer_tokens} is more than max_tokens={self.max_tokens}")
        return self

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        return values + self.weight * overlong_penalty(
            lengths, max_tokens=self.max_tokens, buffer_tokens=self.buffer_tokens
        )


class Clip(ProcessStep):
    """min(p - eta, 0) for every process reward (arXiv 2410.15115)."""

    kind: str = "clip"
    eta: float
    """The bound, which the paper does not give. Try 0.5 for scores between 0 and 1."""

    def apply(self, steps: Float64) -> Float64:
        return clip(steps, self.eta)


class Delta(ProcessStep):
    """Each process reward minus its successor (arXiv 2410.15115): repeating a step earns nothing."""

    kind: str = "delta"

    def apply(self, steps: Float64) -> Float64:
        return delta(steps)


class Renorm(FusingStep):
    """p + outcome - mu for every process reward (PPR).

    With mu = 1 no step of a wrong response is rewarded, and none of a right one punished (p, outcomes from 0 to 1)."""

    kind: str = "renorm"
    mu: float = 1.0
    """What is subtracted. This is not neutral: with an outcome of 0 each further step costs up to mu."""

    def apply(self, steps: Float64, outcome: float) -> Float64:
        return steps + (outcome - self.mu)


class TurnDense(FusingStep):
    """p / n for every process reward p; n counts those that are not 0 if the outcome is at least 1, else `maximum`."""

    kind: str = "turn_dense"
    maximum: int = Field(ge=1)
    """The most process rewards that a response can earn."""

    def apply(self, steps: Float64, outcome: float) -> Float64:
        return steps / max(1, np.count_nonzero(steps) if outcome >= 1 else self.maximum)


BUILT_IN = (
    Par,
    Centre,
    Lsc,
    Standardise,
    ClipStd,
    MinMax,
    GroupNormalise,
    Clamp,
    LengthPenalty,
    Overlong,
    Clip,
    Delta,
    Renorm,
    TurnDense,
)
STEPS: dict[str, type[Step]] = {step.model_fields["kind"].default: step for step in BUILT_IN}
PROCESS_LEVELS = (ProcessStep, FusingStep)
LEVELS = (OutcomeStep, ReferenceStep, RunningStep, *PROCESS_LEVELS)


def parse_steps(value: Any) -> tuple[Step, ...]:
    """Parse a list such as `[delta, {kind: clip, eta: 0.5}]`; a kind with a dot is the dotted path of a class.

    Only length penalties may precede a step that compares with reference rewards. Raise ValueError with the name of the
    wrong step.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError("must be a list of steps, like [{kind:par,reference_value:0}]")
    steps = [read_named(item, STEPS, Step, f"step {number}") for number, item in enumerate(value, start=1)]
    rescaling: Step | None = None
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, LEVELS):
            levels = ", ".join(level.__name__ for level in LEVELS)
            raise ValueError(f"step {number}: {step.kind} must be a subclass of one of {levels} ({Step.__module__})")
        if isinstance(step, ReferenceStep) and rescaling is not None:
            raise ValueError(
                f"step {number} ({step.kind}) compares with reference rewards, which {rescaling.kind} before it does "
                f"not change; put {step.kind} first (only length_penalty and overlong may precede it)"
            )
        if rescaling is None and not isinstance(step, PROCESS_LEVELS) and not step.keeps_scale:
            rescaling = step
    return tuple(steps)


Shaping = Annotated[tuple[SerializeAsAny[Step], ...], BeforeValidator(parse_steps)]
