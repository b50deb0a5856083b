"""Statistics over the samples of one prompt.

Costs of long responses, added to outcome rewards. Lengths [n] are response tokens.

Process rewards made safe for RL: Clip and Delta (arXiv 2410.15115). Per response, steps p [K] in order, float64.

Statistics of all rewards so far, and the transforms that use them (PAR's code, baselines of arXiv 2502.18770).

The steps of a `shaping` chain: typed options (`kind` says which), and what each does to a group's rewards.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rewards.shaping import references
from rewards.shaping.references import Fit, Float64, Form


def standardised_in_group(rewards: Float64, divide: bool = True) -> Float64:
    """(r - mean) / std over the valid samples of one group [n], ddof=0; 0 for all where they are equal or alone.

    Before a weighted sum it gives every component the same scale within a prompt. divide=False only centres.
    """
    shifted = np.asarray(rewards, dtype=np.float64) - np.mean(rewards)
    if not divide:
        return shifted
    std = float(np.std(rewards))
    # Equal rewards leave rounding errors behind, which must not be blown up to a spread of 1.
    negligible = std <= 1e-12 * max(1.0, float(np.max(np.abs(rewards))))
    return np.zeros_like(shifted) if negligible else shifted / std


Int64 = NDArray[np.int64]


def length_penalty(lengths: Int64, per_token: float, free_tokens: int) -> Float64:
    """-per_token * max(0, length - free_tokens) [n] (PAR's code, arXiv 2502.18770: 0.01 beyond 300 tokens)."""
    return -per_token * np.maximum(lengths.astype(np.float64) - free_tokens, 0.0)


def overlong_penalty(lengths: Int64, max_tokens: int, buffer_tokens: int) -> Float64:
    """DAPO's soft punishment (arXiv 2503.14476 eq. 13) [n]: 0 up to max_tokens - buffer_tokens, then down to -1."""
    over = lengths.astype(np.float64) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)


def clip(steps: Float64, eta: float) -> Float64:
    """r_k = min(p_k - eta, 0) [K]: further steps earn nothing, bad ones cost."""
    return np.minimum(np.asarray(steps, dtype=np.float64) - eta, 0.0)


def delta(steps: Float64) -> Float64:
    """r_k = p_k - p_{k+1} for k < K - 1, r_{K-1} = p_{K-1}, r_K = 0 [K].

    The undiscounted reward-to-go of step k < K is p_k, so repeating a step adds nothing. A single step earns 0.
    """
    steps = np.asarray(steps, dtype=np.float64)
    shaped = np.zeros_like(steps)
    shaped[:-1] = steps[:-1]
    shaped[:-2] -= steps[1:-1]
    return shaped


@dataclass
class RunningStatistics:
    """Count, mean, sum of squared differences, least and greatest; batches are merged exactly (Chan et al.)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, values: Float64) -> None:
        """Count a batch [n] of finite values; an empty one changes nothing."""
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
        """Population standard deviation (ddof=0); 0 before there are two values."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, float]:
        """Everything needed to go on later."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The reverse of state_dict."""
        self.count = int(state["count"])
        self.mean, self.squares = float(state["mean"]), float(state["squares"])
        self.least, self.greatest = float(state["least"]), float(state["greatest"])


def standardised(values: Float64, statistics: RunningStatistics) -> Float64:
    """(r - mean) / std [n]; only centred while all values were equal, unchanged before there are statistics."""
    if statistics.count == 0:
        return values
    return (values - statistics.mean) / (statistics.std or 1.0)


def clipped_to_std(values: Float64, statistics: RunningStatistics, width: float = 1.0) -> Float64:
    """r clipped to mean +- width * std [n]; unchanged before there are statistics."""
    if statistics.count == 0:
        return values
    room = width * statistics.std
    return np.clip(values, statistics.mean - room, statistics.mean + room)


def min_max(values: Float64, statistics: RunningStatistics) -> Float64:
    """(r - least) / (greatest - least) [n]; 0 while all values were equal, unchanged before there are statistics."""
    if statistics.count == 0:
        return values
    return (values - statistics.least) / ((statistics.greatest - statistics.least) or 1.0)


class Step(BaseModel):
    """Base of all steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    level: ClassVar[Literal["outcome", "process"]] = "outcome"
    """What it touches: outcome values, or token and span rewards."""
    keeps_scale: ClassVar[bool] = False
    """Whether a reward after it can still be compared with reference rewards before it."""

    @property
    def sets_scale(self) -> bool:
        """Whether raw scores of a model have a known spread after it: bounded, or a standard deviation of 1."""
        return self.name in ("par", "standardise", "minmax")

    @property
    def name(self) -> str:
        """The step's `kind`."""
        return str(getattr(self, "kind"))  # noqa: B009 (every step has one; the base does not)


class OutcomeStep(Step):
    """Changes the outcome values of one group's valid samples."""

    @abstractmethod
    def apply(self, values: Float64, lengths: Int64) -> Float64:
        """values [n], lengths [n] in response tokens -> [n]."""


class ReferenceStep(Step):
    """Compares with rewards of reference responses to the same prompt. One of three sources must be given."""

    reference_value: float | None = None
    """The same reference reward for every prompt (0 leaves the rewards where they are)."""
    reference_rewards: str | None = None
    """Data column with the reference rewards of each prompt (a number or a list), scored before by the same reward."""
    reference_responses: str | None = None
    """Column with reference responses (a text or a list), scored once by this reward; `references`: the data's."""
    max_references: int = Field(default=10, ge=1)
    """References used for a prompt, the first ones."""

    @abstractmethod
    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        """values [n], reference_rewards [N] -> [n]. Raises ValueError if these references are not enough."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"needs one of {', '.join(SOURCES)}; {found}")
        if self.reference_value is not None and self.max_references != 10:
            raise ValueError("max_references has no effect with reference_value")
        return self


SOURCES = ("reference_value", "reference_rewards", "reference_responses")


class RunningStep(Step):
    """Uses statistics of all valid values so far; they are saved with the reward's state."""

    @abstractmethod
    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """values [n] -> [n]."""


class ProcessStep(Step):
    """Changes the process rewards of one response."""

    level: ClassVar[Literal["outcome", "process"]] = "process"

    @abstractmethod
    def apply(self, steps: Float64) -> Float64:
        """steps [K] -> [K]."""


class Par(ReferenceStep):
    """Preference as reward: the mean of f(k (r - offset - r_ref)) over the references (arXiv 2502.18770)."""

    kind: Literal["par"] = "par"
    """PAR and its siblings."""
    form: Form = "sigmoid"
    """f; quintic is a polynomial fitted to the sigmoid."""
    k: float = Field(default=1.0, gt=0)
    """Steepness."""
    offset: float = 0.0
    """3 gives the slow-then-fast variant."""

    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        """Within (0, 1), or what the form's range is."""
        return references.preference_as_reward(values, reference_rewards, self.form, self.k, self.offset)


class Centre(ReferenceStep):
    """Subtracts the mean reference reward; aligns the members of an ensemble."""

    kind: Literal["centre"] = "centre"
    """r - mean(r_ref)."""

    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        """Unbounded."""
        return references.centred(values, reference_rewards)


class Lsc(ReferenceStep):
    """Log-sigmoid centring: log sigma(r - r_ref), r_ref a quantile of the reference rewards (arXiv 2402.00742)."""

    kind: Literal["lsc"] = "lsc"
    """Summed over rewards: a logical AND."""
    quantile: float = Field(default=0.85, gt=0, lt=1)
    """Which quantile of the reference rewards is r_ref."""
    fit: Fit = "normal"
    """normal: mean and standard deviation of at least two references; empirical: linear interpolation."""
    floor: float | None = Field(default=None, lt=0)
    """The result is not below this; null: unbounded."""

    @model_validator(mode="after")
    def _quantile_acts(self) -> Self:
        if self.reference_value is not None and (self.quantile, self.fit) != (0.85, "normal"):
            raise ValueError("quantile and fit have no effect with reference_value, which is r_ref itself")
        return self

    def compare(self, values: Float64, reference_rewards: Float64) -> Float64:
        """Below 0."""
        if self.reference_value is not None:
            reference = self.reference_value
        else:
            reference = references.reference_quantile(reference_rewards, self.quantile, self.fit)
        return references.log_sigmoid_centred(values, reference, self.floor)


class Standardise(RunningStep):
    """(r - mean) / std with running statistics."""

    kind: Literal["standardise"] = "standardise"
    """Running normalisation."""

    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """Mean 0, standard deviation 1 over the run."""
        return standardised(values, statistics)


class ClipStd(RunningStep):
    """r clipped to mean +- width * std with running statistics."""

    kind: Literal["clip_std"] = "clip_std"
    """Running clipping."""
    width: float = Field(default=1.0, gt=0)
    """In standard deviations."""

    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """The scale stays."""
        return clipped_to_std(values, statistics, self.width)


class MinMax(RunningStep):
    """(r - least) / (greatest - least) with running extremes."""

    kind: Literal["minmax"] = "minmax"
    """Running scaling to 0 to 1."""

    def normalise(self, values: Float64, statistics: RunningStatistics) -> Float64:
        """Within 0 and 1."""
        return min_max(values, statistics)


class GroupNormalise(OutcomeStep):
    """(r - mean) / std over the valid samples of the prompt."""

    kind: Literal["group_normalise"] = "group_normalise"
    """Puts components on one scale before they are combined."""
    divide: bool = True
    """false: only centres."""

    @property
    def sets_scale(self) -> bool:
        """Unless it only centres."""
        return self.divide

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        """Mean 0 in the group."""
        return standardised_in_group(values, self.divide)


class Clamp(OutcomeStep):
    """Clips outcome rewards to fixed bounds; `high` alone is PAR's ceiling."""

    kind: Literal["clamp"] = "clamp"
    """Fixed bounds."""
    low: float | None = None
    """Least value; null: none."""
    high: float | None = None
    """Greatest value; null: none."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("needs low or high")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        """Within the bounds."""
        return np.clip(values, self.low, self.high)


class LengthPenalty(OutcomeStep):
    """Subtracts `per_token` for every response token beyond `free_tokens`."""

    kind: Literal["length_penalty"] = "length_penalty"
    """PAR's code puts it before the centring."""
    keeps_scale: ClassVar[bool] = True
    per_token: float = Field(default=0.01, gt=0)
    """Cost of a token."""
    free_tokens: int = Field(default=300, ge=0)
    """Tokens that cost nothing."""

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        """On the scale of the rewards."""
        return values + length_penalty(lengths, self.per_token, self.free_tokens)


class Overlong(OutcomeStep):
    """DAPO's soft punishment of overlong responses, times `weight` (arXiv 2503.14476 eq. 13)."""

    kind: Literal["overlong"] = "overlong"
    """Grows over the last `buffer_tokens` before `max_tokens`."""
    keeps_scale: ClassVar[bool] = True
    max_tokens: int = Field(ge=1)
    """Where the whole cost is reached: usually rollout.max_response_tokens."""
    buffer_tokens: int = Field(ge=1)
    """Tokens before that over which the cost grows from 0 (DAPO: a fifth of max_tokens)."""
    weight: float = Field(default=1.0, gt=0)
    """The whole cost."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"buffer_tokens={self.buffer_tokens} is more than max_tokens={self.max_tokens}")
        return self

    def apply(self, values: Float64, lengths: Int64) -> Float64:
        """On the scale of the rewards."""
        return values + self.weight * overlong_penalty(lengths, self.max_tokens, self.buffer_tokens)


class Clip(ProcessStep):
    """min(p - eta, 0) for every process reward (arXiv 2410.15115)."""

    kind: Literal["clip"] = "clip"
    """Of process rewards; outcome rewards are clipped by `clamp`."""
    eta: float
    """The bound; the paper gives none. Try 0.5 for scores within 0 and 1."""

    def apply(self, steps: Float64) -> Float64:
        """At most 0."""
        return clip(steps, self.eta)


class Delta(ProcessStep):
    """Each process reward minus its successor (arXiv 2410.15115): repeating a step earns nothing."""

    kind: Literal["delta"] = "delta"
    """After `clip` where both are used."""

    def apply(self, steps: Float64) -> Float64:
        """Its reward-to-go is p again."""
        return delta(steps)


AnyStep = (
    Par
    | Centre
    | Lsc
    | Standardise
    | ClipStd
    | MinMax
    | GroupNormalise
    | Clamp
    | LengthPenalty
    | Overlong
    | Clip
    | Delta
)
KINDS: dict[str, type[Step]] = {kind.model_fields["kind"].default: kind for kind in get_args(AnyStep)}
"""Step class by kind."""
