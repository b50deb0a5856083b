"""The contract of an algorithm: what it needs, its advantages (numpy, driver), its loss (torch, learner)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlkit.experience import Group, UserError
from rlkit.experience.section import Section

if TYPE_CHECKING:  # torch is loaded only where a loss is computed; validating a configuration must stay cheap
    from torch import Tensor

FloatArray = NDArray[np.float32]
Layout = Literal["any", "pairs", "full_group"]


class AlgorithmConfig(Section):
    """Fields of every algorithm. An algorithm nests a subclass as `Config`."""

    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses sampled for each prompt (the group size)."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Fields redefined only for another default keep their description."""
        for name, info in cls.model_fields.items():
            inherited = (base.model_fields.get(name) for base in cls.__mro__[1:] if issubclass(base, AlgorithmConfig))
            info.description = info.description or next((f.description for f in inherited if f is not None), None)


@dataclass(frozen=True)
class AlgorithmNeeds:
    """What the runtime must provide; checked before anything starts."""

    critic: bool = False
    reference_policy: bool = False
    min_samples_per_prompt: int = 1
    layout: Layout = "any"
    """Which samples must share a micro-batch: those of a pair or of a group."""
    process_rewards: bool = False
    """Scores must carry token or span rewards."""
    token_kl: bool = False
    """Advantages use log-probs of policy and reference (a KL penalty in the reward)."""
    greedy_response: bool = False
    """Every prompt also gets a scored greedy response (`Group.greedy`), never trained on."""


@dataclass(frozen=True)
class Experience:
    """One training step before the update. Samples are numbered group by group."""

    groups: Sequence[Group]
    step: int
    values: Sequence[FloatArray] | None = None
    """Per sample, [T]: the critic's values, if there is one."""
    policy_logprobs: Sequence[FloatArray] | None = None
    """Per sample, [T]: under the policy before the update, if needed."""
    reference_logprobs: Sequence[FloatArray] | None = None
    """Per sample, [T]: under the reference policy, if needed."""


@dataclass(frozen=True)
class Advantages:
    """Sequences are per sample, in the Experience's order."""

    tokens: Sequence[FloatArray]
    """Per sample, [T]."""
    keep: NDArray[np.bool_]
    """[B] samples that enter the loss and its denominators (False: invalid, dropped, nothing to learn)."""
    returns: Sequence[FloatArray] | None = None
    """Per sample, [T]: the critic's targets."""
    extras: Mapping[str, Sequence[FloatArray]] = field(default_factory=dict)
    """Further per-token inputs of the loss (per sample, [T]): labels, sequence rewards, weights."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the loss that change from step to step, such as coefficients."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def check(self, experience: Experience, algorithm: object) -> None:
        """Raise UserError unless there is one number per response token, and a `keep` per sample."""
        samples = [sample for group in experience.groups for sample in group.samples]
        who = f"{type(algorithm).__module__}.{type(algorithm).__name__}.advantages"
        if not len(samples) == len(self.tokens) == len(self.keep):
            raise UserError(f"{who}: {len(samples)} samples, but {len(self.tokens)} rows and {len(self.keep)} keeps")
        for i, (sample, row) in enumerate(zip(samples, self.tokens, strict=True)):
            if len(sample) != len(row):
                raise UserError(f"{who}: sample {i} has {len(sample)} response tokens, its advantages {len(row)}")


@dataclass(frozen=True)
class Denominators:
    """Totals over the optimizer step: all micro-batches and data-parallel ranks."""

    tokens: float
    """Trained response tokens."""
    sequences: float
    """Samples with at least one trained token."""
    groups: float
    """Groups with at least one such sample."""


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch as flat rows: R response tokens (trained or not) of S samples, sample after sample.

    All tensors are on the learner's device. Only `logprobs` and `entropy` carry gradients.
    """

    logprobs: Tensor
    """[R] under the policy being trained."""
    entropy: Tensor
    """[R] of the policy's next-token distribution, in nats."""
    old_logprobs: Tensor
    """[R] under the policy before this step's first update (the proximal policy)."""
    rollout_logprobs: Tensor
    """[R] from the sampler (the behaviour policy)."""
    advantages: Tensor
    """[R]"""
    mask: Tensor
    """[R] 1.0 where the token is trained."""
    sequence: Tensor
    """[R] int64: sample of each row."""
    group: Tensor
    """[S] int64: group of each sample, numbered within the micro-batch."""
    denominators: Denominators
    reference_logprobs: Tensor | None = None
    """[R]"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[R] each."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """The step's `Advantages.scalars`."""

    @property
    def num_sequences(self) -> int:
        return int(self.group.shape[0])


@dataclass(frozen=True)
class ValueLossInputs:
    """One micro-batch of the critic as flat rows [R] of S samples. Only `values` carries gradients."""

    values: Tensor
    """[R]"""
    old_values: Tensor
    """[R] that the advantages were computed with."""
    returns: Tensor
    """[R] targets."""
    mask: Tensor
    """[R] 1.0 where the token is trained."""
    sequence: Tensor
    """[R] int64: sample of each row."""
    num_sequences: int
    """S."""
    denominators: Denominators


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the step's loss; shares add up over micro-batches and ranks."""

    loss: Tensor
    """Scalar, divided by the global denominators."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalar metrics that add up in the same way (divided by global denominators, too)."""
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalar metrics of which the maximum over micro-batches and ranks is reported."""


class Algorithm(ABC):
    """Subclass, nest a `Config`, and point `algorithm._target_` at it."""

    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    def needs(self) -> AlgorithmNeeds:
        """Subclasses of SurrogateAlgorithm extend `super().needs()`, which asks for what a KL penalty takes."""
        return AlgorithmNeeds()

    def normalises(self) -> bool:
        """Whether advantages are divided by the spread of rewards, so that their scale cancels; if not, raw scores
        of a model should be normalised first."""
        return False

    @abstractmethod
    def advantages(self, experience: Experience) -> Advantages:
        """Credit for every response token. Pure."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """The policy loss of one micro-batch. Pure, differentiable in `inputs.logprobs` and `inputs.entropy`."""

    def observe(self, metrics: Mapping[str, float]) -> None:  # noqa: B027 (few algorithms have state)
        """Called in the driver after each update; only here may state change.

        The loss runs in other processes: state reaches it in `Advantages.scalars`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What `observe` changed, for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        ...

    def value_loss(self, inputs: ValueLossInputs) -> LossOutput:
        raise TypeError(f"{type(self).__name__} says that it needs a critic but defines no value_loss")
