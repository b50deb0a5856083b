"""The contract of an algorithm: needs, advantages (numpy, driver), loss (torch, learner)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlkit.experience import Group, Message, UserError
from rlkit.experience.section import Section

if TYPE_CHECKING:  # torch is loaded only where a loss is computed; validating a configuration must be cheap
    from torch import Tensor

FloatArray = NDArray[np.float32]
Layout = Literal["any", "pairs", "full_group"]
POLICY, REFERENCE = "policy", "reference"
"""Models that a Pass can run."""
Source = Literal["policy", "data", "model"]
"""Where responses come from (`rollout.source`)."""
Render = Callable[[Sequence[Message] | str], tuple[int, ...]]
"""Returns the token ids of a prompt, formatted with the policy's chat template, or of a plain text."""


class AlgorithmConfig(Section):
    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses sampled for each prompt (the group size)."""
    reference_every_steps: int = Field(default=0, ge=0)
    """Steps after which the reference policy moves towards the policy; 0: it remains the initial model."""
    reference_mix: float = Field(default=1.0, gt=0, le=1)
    """Share of the policy in the moved reference: 1 copies it (iterative DPO); small values at every step give a moving
    average."""

    def for_staleness(self, max_staleness: int) -> Self:
        """Return the configuration with the defaults implied by `trainer.max_staleness` filled in; 1 also stands for a
        sampler whose precision differs from the learner's."""
        return self

    def idle(self) -> frozenset[str]:
        """Options that have no effect whatever the others are set to, given the recipe's own values: `--help` leaves
        them out."""
        return frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, info in cls.model_fields.items():
            inherited = (base.model_fields.get(name) for base in cls.__mro__[1:] if issubclass(base, AlgorithmConfig))
            info.description = info.description or next((f.description for f in inherited if f is not None), None)


@dataclass(frozen=True)
class Pass:
    """A forward pass over a step's samples, before the update."""

    model: str = POLICY
    """policy, reference, or the folder of a frozen model."""
    other_prompts: bool = False
    """Over responses to prompts other than their own (`Algorithm.groups_for`)."""


@dataclass(frozen=True)
class AlgorithmNeeds:
    """Requirements on the runtime, checked before a run starts."""

    sources: tuple[Source, ...] = ("policy",)
    """Where the responses that it can learn from may come from."""
    rewards: bool = True
    """Scores; if False, no reward is called."""
    demonstrations: bool = False
    """The data's own responses to a step's prompts, as further groups of the Experience, each directly after the
    sampled one: every mini-batch has both."""
    answer: bool = False
    """A gold answer for every prompt."""
    pairs: bool = False
    """Groups with preferences, or with values that differ."""
    labels: bool = False
    """Scores from 0 (bad) to 1 (good)."""

    critic: bool = False
    """`Experience.values`, and a model that `value_loss` trains."""
    reference_policy: bool = False
    """`LossInputs.reference_logprobs`: the initial policy, or what `reference_every_steps` has made of it."""
    min_samples_per_prompt: int = 1
    min_prompts_per_step: int = 1
    layout: Layout = "any"
    """Samples that must share a micro-batch."""
    process_rewards: bool = False
    """Scores with token or span rewards."""
    turns: bool = False
    """Samples played turn by turn in an environment."""
    reads_process_rewards: bool = False
    """Uses token or span rewards where there are any; if this and `process_rewards` are False, a reward that gives them
    is refused."""
    outcome_rewards: bool = True
    """Scores with a value; False: process rewards alone are enough."""
    token_kl: bool = False
    """Advantages use log-probs of policy and reference."""
    passes: Mapping[str, Pass] = field(default_factory=dict)
    """`Experience.logprobs` by name: of the step's samples, or of the groups that `groups_for` returns."""
    greedy_response: bool = False
    """Every prompt also gets a scored greedy response (`Group.greedy`), which is not trained on."""
    corrects_staleness: bool = False
    """The loss can weight samples from older policies (`LossInputs.rollout_logprobs`); else `trainer.max_staleness`
    must be 0."""
    skips_zero_advantages: bool = False
    """A sample whose trained tokens all have advantage 0 adds exactly 0 to loss and gradient (layout any): it is
    skipped, but counted in the denominators."""

    def frozen_models(self, references_cached: bool) -> set[str]:
        """Models that only run forward, besides the policy: `reference` and folders. If the reference is cached, its
        model is only kept for passes over other prompts."""
        wanted = {one.model for one in self.passes.values() if one.other_prompts or one.model != REFERENCE}
        if not references_cached and (self.reference_policy or REFERENCE in {p.model for p in self.passes.values()}):
            wanted.add(REFERENCE)
        return wanted - {POLICY}


@dataclass(frozen=True)
class Experience:
    """One training step before the update; samples are numbered group by group."""

    groups: Sequence[Group]
    step: int
    values: Sequence[FloatArray] | None = None
    """Per sample, [T]: the critic's value estimates."""
    policy_logprobs: Sequence[FloatArray] | None = None
    """Per sample, [T]: log-probs under the policy before the update."""
    reference_logprobs: Sequence[FloatArray] | None = None
    """Per sample, [T]: log-probs under the reference policy."""
    logprobs: Mapping[str, Sequence[FloatArray]] = field(default_factory=dict)
    """By name (`AlgorithmNeeds.passes`): log-probs per sample of that pass, [T]."""


@dataclass(frozen=True)
class Advantages:
    """Sequences are per sample."""

    tokens: Sequence[FloatArray]
    """Per sample, [T]: the advantage of each token."""
    keep: NDArray[np.bool_]
    """[B] which samples are in the loss and its denominators."""
    returns: Sequence[FloatArray] | None = None
    """Per sample, [T]: the critic's targets."""
    extras: Mapping[str, Sequence[FloatArray]] = field(default_factory=dict)
    """Further per-token inputs of the loss (per sample, [T])."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, FloatArray] = field(default_factory=dict)
    """Further per-sample inputs of the loss, [B]."""
    pairs: NDArray[np.int64] | None = None
    """[P, 2] samples (better, worse) of one group; for layouts that keep pairs together."""
    pair_values: Mapping[str, FloatArray] = field(default_factory=dict)
    """Further per-pair inputs of the loss, [P]: probability, margin, weight, ..."""

    def check(self, experience: Experience, algorithm: object) -> None:
        """Raise UserError unless there is one number per response token, one `keep` per sample, and valid pairs."""
        samples = [sample for group in experience.groups for sample in group.samples]
        who = f"{type(algorithm).__module__}.{type(algorithm).__name__}.advantages"
        if not len(samples) == len(self.tokens) == len(self.keep):
            raise UserError(
                f"{who}: {len(samples)} samples, but {len(self.tokens)} rows of tokens and "
                f"{len(self.keep)} values of keep"
            )
        for i, (sample, row) in enumerate(zip(samples, self.tokens, strict=True)):
            if len(sample) != len(row):
                raise UserError(f"{who}: sample {i} has {len(sample)} response tokens, but {len(row)} advantages")
        for name, values in self.samples.items():
            if len(values) != len(samples):
                raise UserError(f"{who}: {len(samples)} samples, but {len(values)} values of samples[{name!r}]")
        pairs = np.zeros((0, 2), dtype=np.int64) if self.pairs is None else self.pairs
        group = np.repeat(np.arange(len(experience.groups)), [len(g.samples) for g in experience.groups])
        if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs.size and not 0 <= pairs.min() <= pairs.max() < len(group)):
            raise UserError(f"{who}: pairs must be [P, 2] sample numbers from 0 to {len(group) - 1}")
        if (group[pairs[:, 0]] != group[pairs[:, 1]]).any():
            raise UserError(f"{who}: a pair has samples from two groups")
        for name, values in self.pair_values.items():
            if len(values) != len(pairs):
                raise UserError(f"{who}: {len(pairs)} pairs, but {len(values)} values of pair_values[{name!r}]")


@dataclass(frozen=True)
class Denominators:
    """Totals over the optimizer step: all micro-batches and data-parallel ranks."""

    tokens: float
    """Trained response tokens."""
    sequences: float
    """Samples with a trained token."""
    groups: float
    """Groups with such a sample."""
    pairs: float = 0.0
    """Pairs of such samples."""
    computed_tokens: float | None = None
    """Tokens of the samples that are computed (`AlgorithmNeeds.skips_zero_advantages`); None: all."""

    @property
    def measured(self) -> float:
        """Trained tokens over which metrics are averaged: those in micro-batches."""
        return self.tokens if self.computed_tokens is None else self.computed_tokens


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch as flat rows: R response tokens (trained or not) of S samples, sample after sample.

    On the learner's device; only `logprobs` and `entropy` carry gradients.
    """

    logprobs: Tensor
    """[R] under the policy being trained."""
    entropy: Tensor
    """[R] nats, of the next-token distribution."""
    old_logprobs: Tensor
    """[R] before this step's first update (proximal policy)."""
    rollout_logprobs: Tensor
    """[R] from the sampler (behaviour policy); `old_logprobs` where no sampler gave any."""
    advantages: Tensor
    """[R] from `Advantages.tokens`."""
    mask: Tensor
    """[R] 1.0 on trained tokens."""
    sequence: Tensor
    """[R] int64: sample of each row."""
    group: Tensor
    """[S] int64: group of each sample within the micro-batch."""
    denominators: Denominators
    reference_logprobs: Tensor | None = None
    """[R] under the reference policy, if there is one."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """[R] each."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each."""
    pairs: Tensor | None = None
    """[P, 2] int64: samples (better, worse) of this micro-batch."""
    pair_values: Mapping[str, Tensor] = field(default_factory=dict)
    """[P] each."""

    @property
    def num_sequences(self) -> int:
        return int(self.group.shape[0])


@dataclass(frozen=True)
class ValueLossInputs:
    """One micro-batch of the critic: flat rows [R]. Only `values` carries gradients."""

    values: Tensor
    """[R]"""
    old_values: Tensor
    """[R] from which the advantages were computed."""
    returns: Tensor
    """[R] targets."""
    mask: Tensor
    """[R] 1.0 on trained tokens."""
    sequence: Tensor
    """[R] int64: sample of each row."""
    num_sequences: int
    denominators: Denominators


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the step's loss; shares add up."""

    loss: Tensor
    """Scalar, divided by the global denominators."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalar metrics that add up the same way."""
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalar metrics reported as the maximum over micro-batches and ranks."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """[R] per-token values to be recorded: ratio, weight, clipped."""


class Algorithm(ABC):
    """Base class: subclass it, nest a `Config`, and point `algorithm._target_` to the subclass."""

    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    def needs(self) -> AlgorithmNeeds:
        """Return the requirements. Subclasses of SurrogateAlgorithm extend `super().needs()`, which covers the KL
        penalty."""
        return AlgorithmNeeds()

    def normalises(self) -> bool:
        """Whether the scale of rewards cancels; if not, normalise raw model scores first."""
        return False

    def groups_for(self, name: str, groups: Sequence[Group], render: Render) -> Sequence[Group]:
        """The groups whose samples the pass `name` (`AlgorithmNeeds.passes`) runs over: these, or ones with other
        prompts or responses. Pure."""
        return groups

    @abstractmethod
    def advantages(self, experience: Experience) -> Advantages:
        """Compute the advantages. Pure."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """Compute the loss. Pure, differentiable in `inputs.logprobs` and `inputs.entropy`."""

    def heldout(self, experience: Experience) -> Mapping[str, float]:
        """Metrics of held-out recorded responses; the first is the headline metric, larger is better. Pure.

        The experience has the log-probs of the policy and, if the algorithm needs one, of the reference.
        """
        assert experience.policy_logprobs is not None
        samples = [sample for group in experience.groups for sample in group.samples]
        rows = zip(samples, experience.policy_logprobs, strict=True)
        return {"logprob/heldout": float(np.mean(np.concatenate([row[sample.trained] for sample, row in rows])))}

    def observe(self, metrics: Mapping[str, float]) -> None:  # noqa: B027 (few algorithms have state)
        """Update the algorithm's state, which may change only here; called in the driver after each update. The state
        reaches the loss in `Advantages.scalars`."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        ...

    def value_loss(self, inputs: ValueLossInputs) -> LossOutput:
        raise TypeError(f"{type(self).__name__} says that it needs a critic but defines no value_loss")
