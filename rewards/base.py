"""The contract of a reward backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from rlkit.experience import Group, GroupScores
from rlkit.experience.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class RewardConfig(Section):
    """Fields every reward has. A backend nests its own subclass as `Config`."""

    timeout_seconds: float = Field(default=120.0, gt=0)
    """Deadline of one scoring call. After it the worker is killed and replaced, and the call is tried once more."""
    max_failed_share: float = Field(default=0.2, ge=0, le=1)
    """Share of invalid scores in one training step above which the run stops and names the cause (0 to 1)."""
    workers: int = Field(default=1, ge=1)
    """Reward processes that score side by side."""


UpdateWhen = Literal["after", "before", "none"]


@dataclass(frozen=True)
class RewardTraits:
    """What the runtime must know of a reward under its configuration; asked before anything starts."""

    references: bool = False
    """Every prompt needs at least one reference answer."""
    answer: bool = False
    """Every prompt needs a gold final answer."""
    columns: tuple[str, ...] = ()
    """Further data columns that it needs."""
    samples: int = 1
    """Responses to a prompt that it compares with each other; a greedy response counts."""
    judges_texts: bool = True
    """A response's score depends on the texts of prompt and response alone: not on its tokens, nor on the other
    responses of its group. Then texts without tokens can be scored, too."""
    process_rewards: bool = False
    """Scores carry token or span rewards (algorithms may need them)."""
    uses_gpu: bool = True
    """Workers get a share of a GPU where there are any. False for rewards that load no model, or leave it to a
    server."""
    raw_scores: bool = False
    """Values are unbounded scores of a model, whose level and spread differ from prompt to prompt: an algorithm should
    divide them by their spread (in the group or in the batch)."""
    update_when: UpdateWhen = "none"
    """When a TrainableReward learns from a step's groups. after: all scores of a step are taken, then it learns.
    before: it learns, then `rescore` gives the scores that the policy learns from. none: it stays as it is."""
    follows_policy: bool = False
    """`policy_weights` of a TrainableReward must be called with every version of the policy."""


@dataclass(frozen=True)
class RewardContext:
    """Where a reward runs."""

    device: str = "cpu"
    gpus: float = 0.0
    """Share of a GPU that each worker gets."""
    seed: int = 0
    threads: int = 1
    """CPU threads this worker may use."""


@dataclass(frozen=True)
class HelpSection:
    """A section of `--help` beside a reward's `Config`."""

    title: str
    text: str
    model: type[BaseModel]
    prefix: str = ""
    """Precedes its keys: `reward.parts.NAME.`."""


class Reward(ABC):
    """Scores whole groups. Lives in one Ray actor per worker; `start` is called there, once, before `score`."""

    Config: ClassVar[type[RewardConfig]] = RewardConfig

    def __init__(self, config: Any, context: RewardContext) -> None:
        self.config = config
        self.context = context

    @classmethod
    def config_model(cls, section: Mapping[str, Any]) -> type[BaseModel]:
        """The model that validates this section: `Config`, or the same with a typed section for each reward inside."""
        return cls.Config

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """What it needs and how it behaves under this configuration."""
        return RewardTraits()

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Cheap checks before a run (model folders exist, ...), without heavy imports: messages for the user."""
        return []

    @classmethod
    def help_sections(cls) -> Iterable[HelpSection]:
        """What `--help` lists beside the fields of `Config`."""
        return ()

    def start(self) -> None:  # noqa: B027 (a reward without a model has nothing to load)
        """Load models and run a self-test. Raise with a message for the user if scoring cannot work."""

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """One GroupScores per group, in order. A sample that cannot be judged gets `Score.invalid(reason)`.

        An exception means that the backend is broken (the worker is replaced), not that a sample is bad.
        """

    def close(self) -> None:  # noqa: B027
        """Free processes and connections. Called once, also after a failed start."""


class TrainableReward(Reward):
    """A reward that learns during the run (implicit PRM, co-trained verifiers). It has one worker."""

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Two workers would learn two different rewards."""
        traits = cls.traits(config)
        several = config.workers != 1 and (traits.update_when != "none" or traits.follows_policy)
        return [
            *super().check(config),
            *(["a reward that learns or follows the policy has one worker"] if several else []),
        ]

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Learns after the scores of a step are taken."""
        return RewardTraits(update_when="after")

    version: int = 0
    """Number of updates so far."""

    @abstractmethod
    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train on scored groups; returns metrics named `area/name`."""

    def rescore(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Scores after an update, for `update_when = "before"`; groups carry their earlier scores."""
        return self.score(groups)

    def policy_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The policy's current weights under their Hugging Face names (read only), for rewards that follow it."""
        raise TypeError(f"{type(self).__name__} says that it follows the policy but defines no policy_weights")

    def save(self, folder: Path) -> None:
        """Write what was learnt as a plain Hugging Face folder, to be used outside of this run."""

    @abstractmethod
    def state_dict(self) -> Mapping[str, Any]:
        """Everything needed to continue later: weights, optimizer, version."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of state_dict."""
