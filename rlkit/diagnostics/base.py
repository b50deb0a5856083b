"""The contract of a diagnostic, which looks at every finished step and may warn or end the run."""

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
"""Prefix of the learner's sums for diagnostics: `diagnostics/NAME/SUM`."""


class DiagnosticConfig(Named):
    """Fields of every diagnostic. A diagnostic nests a subclass as `Config`."""

    alarm: Literal["warn", "stop"] = "warn"
    """What a warning of this diagnostic does. warn: it is shown; stop: it ends the run, whose last step is saved."""

    @property
    def name(self) -> str:
        """Name of its table, and of its state in checkpoints."""
        return self.kind.rpartition(".")[2]


@dataclass(frozen=True)
class StepRecord:
    """A finished step. Step 0 is before training and has only probes."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    """Groups trained on, with the run's scores."""
    rejected: Sequence[Group] = ()
    """Groups that were scored but rejected by a filter."""
    judged: Sequence[Group] | None = None
    """`groups` and `rejected` as the verifier scores them; None if no verifier is in use."""
    advantages: Advantages | None = None
    """Advantages of each sample in `groups`."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Results of `measure`: sums over micro-batches and ranks, means over optimizer steps."""
    probed: Sequence[Group] = ()
    """Groups that `probes` returned, scored by the run's reward."""


@dataclass(frozen=True)
class Findings:
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step, named `area/name`."""
    table: Sequence[Mapping[str, Any]] = ()
    """Rows for `diagnostics/NAME.jsonl` in the run folder; `step` is added."""
    warning: str = ""
    """What is wrong, its cause and a remedy."""
    stop: str = ""
    """Likewise, if the run must not continue."""


@dataclass(frozen=True)
class RunFacts:
    """Facts for which a diagnostic can be refused before anything starts."""

    settings: Mapping[str, Any]
    """The sections `trainer`, `learner` and `algorithm` as plain values."""
    needs: AlgorithmNeeds
    reward: RewardTraits | None
    """None: no reward is used."""
    verified: bool
    """Whether a verifier that is not the reward also judges training answers."""
    columns: frozenset[str]
    """Columns that the data provide with every prompt."""


class Diagnostic(ABC):
    """Subclass it, nest a `Config`, and name it by its dotted path in `diagnostics`."""

    Config: ClassVar[type[DiagnosticConfig]] = DiagnosticConfig

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        """`settings`: the run's complete configuration as plain values."""
        self.config = config

    @classmethod
    def objections(cls, config: Any, facts: RunFacts) -> Iterable[str]:
        """Yield why the diagnostic cannot work, or has no effect, in this run: messages for the user."""
        return ()

    def probes(self, step: int, prompts: Sequence[Prompt]) -> Sequence[Group]:
        """Return groups for the run's reward to score for the next `check`; usually none.

        `prompts`: the step's, or before training (step 0) the run's first.
        """
        return ()

    def measure(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        """Measure a micro-batch on the learner: return scalars that add up, for `check` in `StepRecord.measured`.

        Nothing is differentiated. Only `config` and `settings` are available here: state is kept on the driver.
        """
        return {}

    @abstractmethod
    def check(self, record: StepRecord) -> Findings:
        """Check a step, on the driver after each step. State may change only here."""

    def conclude(self, metrics: Mapping[str, float]) -> Findings:
        """Return findings at the end of the run: a last warning, and scalars, which become entries of summary.json."""
        return Findings()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (few diagnostics have state)
        ...


class Windows:
    """Values of the last 2n steps, to compare means of the earlier n and the later n. A warning is due at most once per
    n steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.history: deque[dict[str, float]] = deque(maxlen=2 * steps)
        self.quiet = 0

    def add(self, values: Mapping[str, float]) -> None:
        self.history.append(dict(values))
        self.quiet -= 1

    @property
    def due(self) -> bool:
        """Whether both windows are full and the last warning is at least n steps ago."""
        return bool(self.steps) and len(self.history) == 2 * self.steps and self.quiet <= 0

    def warned(self) -> None:
        self.quiet = self.steps

    def change(self, name: str) -> tuple[float, float] | None:
        """Return the means over the earlier and the later window; None if one has no value."""
        rows = list(self.history)
        halves = [[row[name] for row in half if name in row] for half in (rows[: self.steps], rows[self.steps :])]
        return (fmean(halves[0]), fmean(halves[1])) if all(halves) else None

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "quiet": self.quiet}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.clear()
        self.history.extend(state["history"])
        self.quiet = state["quiet"]
