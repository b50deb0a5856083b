"""The contract of a diagnostic: it looks at every finished step and may warn, or end the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from algorithms.base import Advantages, AlgorithmNeeds
from rewards.base import RewardTraits
from rlkit.experience import Group, Prompt
from rlkit.experience.section import Named

if TYPE_CHECKING:
    from torch import Tensor

    from algorithms.base import LossInputs


MEASURED = "diagnostics/"
"""Begins the names of the learner's sums for diagnostics: `diagnostics/NAME/SUM`."""


class DiagnosticConfig(Named):
    """Fields of every diagnostic; one nests a subclass as `Config`."""

    alarm: Literal["warn", "stop"] = "warn"
    """What a warning of this diagnostic does: it is shown, or it ends the run (whose last step is saved)."""

    @property
    def name(self) -> str:
        """Of its table, and of its state in checkpoints."""
        return self.kind.rpartition(".")[2]


@dataclass(frozen=True)
class StepRecord:
    """A finished step; step 0 is before training, with probes alone."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    """Trained on, with the run's scores."""
    rejected: Sequence[Group] = ()
    """Scored, but rejected by a filter."""
    judged: Sequence[Group] | None = None
    """`groups` and `rejected` as the verifier scores them; None if the run has no verifier at work."""
    advantages: Advantages | None = None
    """Per sample of `groups`."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What `measure` returned: sums over micro-batches and ranks, means over optimizer steps."""
    probed: Sequence[Group] = ()
    """What `probes` returned, scored by the run's reward."""


@dataclass(frozen=True)
class Findings:
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step, named `area/name`."""
    table: Sequence[Mapping[str, Any]] = ()
    """Rows of `diagnostics/NAME.jsonl` in the run folder; `step` is added."""
    warning: str = ""
    """What is wrong, its cause and a remedy."""
    stop: str = ""
    """The same, where the run must not go on."""


@dataclass(frozen=True)
class RunFacts:
    """What a diagnostic can be refused for before anything starts."""

    settings: Mapping[str, Any]
    """The sections `trainer`, `learner` and `algorithm` as plain values."""
    needs: AlgorithmNeeds
    reward: RewardTraits | None
    """None: no reward is asked."""
    verified: bool
    """A verifier judges training answers, too, and it is not the reward."""
    columns: frozenset[str]
    """What the data provide with every prompt."""


class Diagnostic(ABC):
    """Subclass it, nest a `Config`, and name it by its dotted path in `diagnostics`."""

    Config: ClassVar[type[DiagnosticConfig]] = DiagnosticConfig

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        """`settings`: the run's whole configuration as plain values."""
        self.config = config

    @classmethod
    def objections(cls, config: Any, facts: RunFacts) -> Iterable[str]:
        """Why it cannot work, or has no effect, in this run: messages for the user."""
        return ()

    def probes(self, step: int, prompts: Sequence[Prompt]) -> Sequence[Group]:
        """Groups that the run's reward scores for this `check`; mostly none.

        `prompts` are the step's; before training (step 0) the first of the run.
        """
        return ()

    def measure(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        """On the learner, for each micro-batch: scalars that add up, which `check` gets as `StepRecord.measured`.

        Nothing is differentiated. Here only `config` and `settings` are known: state lives on the driver.
        """
        return {}

    @abstractmethod
    def check(self, record: StepRecord) -> Findings:
        """Called on the driver after each step; only here may state change."""

    def conclude(self, metrics: Mapping[str, float]) -> Findings:
        """At the end of the run: a last warning; its scalars are entries of summary.json."""
        return Findings()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (few diagnostics have state)
        ...


class Windows:
    """Values of the last 2n steps: how a mean changed from the earlier n to the later n. A warning is due at most once
    per n steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.history: deque[dict[str, float]] = deque(maxlen=2 * steps)
        self.quiet = 0

    def add(self, values: Mapping[str, float]) -> None:
        self.history.append(dict(values))
        self.quiet -= 1

    @property
    def due(self) -> bool:
        """Whether both windows are full, and the last warning is n steps ago."""
        return bool(self.steps) and len(self.history) == 2 * self.steps and self.quiet <= 0

    def warned(self) -> None:
        self.quiet = self.steps

    def change(self, name: str) -> tuple[float, float] | None:
        """Means over the earlier and the later window; None if one has no value."""
        rows = list(self.history)
        halves = [[row[name] for row in half if name in row] for half in (rows[: self.steps], rows[self.steps :])]
        return (fmean(halves[0]), fmean(halves[1])) if all(halves) else None

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "quiet": self.quiet}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.clear()
        self.history.extend(state["history"])
        self.quiet = state["quiet"]
