"""The contract of a reward backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from rlkit.experience import Group, GroupScores, Prompt
from rlkit.experience.section import Deadline, Section

if TYPE_CHECKING:
    from torch import Tensor


class RewardConfig(Section):
    """Fields of every reward; a backend nests a subclass as `Config`."""

    timeout_seconds: Deadline = 120.0
    """Deadline of one scoring call. When it passes, the worker is replaced and the call retried once."""
    max_failed_share: float = Field(default=0.2, ge=0, le=1)
    """The run stops if the share of invalid scores (0 to 1) in a training step exceeds this."""
    workers: int = Field(default=1, ge=1)
    """Reward processes that score in parallel."""


UpdateWhen = Literal["after", "before", "none"]


@dataclass(frozen=True)
class RewardTraits:
    """What the runtime must know about a reward before anything starts."""

    references: bool = False
    """Every prompt needs a reference answer."""
    answer: bool = False
    """Every prompt needs a gold final answer."""
    columns: tuple[str, ...] = ()
    """Other data columns that it needs."""
    samples: int = 1
    """How many responses to a prompt it compares, including a greedy one."""
    judges_texts: bool = True
    """Scores depend only on the texts of prompt and response, not on tokens or the rest of the group."""
    joins_tokens: bool = False
    """Runs a model over prompt and response tokens as one sequence, so samples of several segments do not work."""
    process_rewards: bool = False
    """Scores carry token or span rewards."""
    process_in_value: bool = False
    """Score values already include the process rewards, so an algorithm that reads only values loses nothing."""
    environment: bool = False
    """Judges the episodes of an environment."""
    outcome_rewards: bool = True
    """Scores carry a value."""
    steps: bool = False
    """Responses must have steps (`Sample.spans`, from `rollout.steps`)."""
    uses_gpu: bool = True
    """Workers get a share of a GPU. False for rewards that do not load a model."""
    raw_scores: bool = False
    """Values are unbounded model scores; their level and spread differ between prompts."""
    update_when: UpdateWhen = "none"
    """When a TrainableReward learns. after: after the step has been scored. before: before the policy learns; `rescore`
    then gives the policy's scores."""
    follows_policy: bool = False
    """A TrainableReward receives every policy version through `policy_weights`."""


@dataclass(frozen=True)
class RewardContext:
    device: str = "cpu"
    gpus: float = 0.0
    """Share of a GPU per worker."""
    seed: int = 0
    threads: int = 1
    """CPU threads per worker."""


@dataclass(frozen=True)
class HelpSection:
    title: str
    text: str
    model: type[BaseModel]
    prefix: str = ""
    """Prefix of its keys: `reward.parts.NAME.`."""


class Reward(ABC):
    """A reward backend. Each worker is one Ray actor, which calls `start` once before `score`."""

    Config: ClassVar[type[RewardConfig]] = RewardConfig

    def __init__(self, config: Any, context: RewardContext) -> None:
        self.config = config
        self.context = context

    @classmethod
    def config_model(cls, section: Mapping[str, Any]) -> type[BaseModel]:
        """Return the model that validates this section; it may also type the sections of inner rewards."""
        return cls.Config

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits()

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Run cheap checks before a run, without heavy imports; return messages for the user."""
        return []

    @classmethod
    def doubts(cls, config: Any, prompts: Sequence[Prompt]) -> list[str]:
        """Return warnings about the training data at the start of a run; look at a few prompts, without a model."""
        return []

    @classmethod
    def vote(cls, config: Any, text: str) -> str | None:
        """Return the final answer of a response, for majority voting; None: no answer that this reward reads."""
        return None

    @classmethod
    def help_sections(cls) -> Iterable[HelpSection]:
        return ()

    def start(self) -> None:  # noqa: B027 (a reward without a model has nothing to load)
        """Load models and run a self-test; on failure raise an exception with a message for the user."""

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Return one GroupScores per group, in order; `Score.invalid(reason)` for a sample that cannot be judged.

        An exception means that the backend is broken: the worker is replaced.
        """

    def close(self) -> None:  # noqa: B027
        """Called once, even if `start` failed."""


class TrainableReward(Reward):
    """A reward that learns during the run."""

    @classmethod
    def check(cls, config: Any) -> list[str]:
        traits = cls.traits(config)
        # With several workers, each would learn a different reward.
        several = config.workers != 1 and (traits.update_when != "none" or traits.follows_policy)
        return [*super().check(config), *(["a reward that learns or follows the policy has one worker"] * several)]

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(update_when="after")

    version: int = 0

    @abstractmethod
    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Learn from scored groups; return metrics named `area/name`."""

    def rescore(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Score again after an update, for `update_when = "before"`; groups carry their earlier scores."""
        return self.score(groups)

    def policy_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Receive the policy's weights by Hugging Face name, read-only; for `follows_policy`."""
        raise TypeError(f"{type(self).__name__} says that it follows the policy but defines no policy_weights")

    def save(self, folder: Path) -> None:
        """Write the learnt model as a plain Hugging Face folder."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """Return tensors and plain values only: the state is loaded without pickle."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
