"""All diagnostics of a run: what reaches metrics, tables, screen and checkpoint, and who ends the run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from reward_samples import make_group

from rlkit.diagnostics.base import Diagnostic, DiagnosticConfig, Findings, StepRecord
from rlkit.diagnostics.group import DiagnosedError, Diagnostics, make_diagnostics, measuring
from rlkit.diagnostics.ratios import Drift
from rlkit.experience import Group, GroupScores, Prompt, Score, UserError
from rlkit.experience.types import text_group

LEARNT = {"advantage/mean_absolute": 1.0}


class Counting(Diagnostic):
    """Probes with the step's number, counts its steps, and says what it is told to."""

    class Config(DiagnosticConfig):
        says: Mapping[str, Any] = {}
        """Fields of its findings."""
        metric: str = "counting/steps"
        """Its metric."""

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        self.steps = 0

    def probes(self, step: int, prompts: Sequence[Prompt]) -> list[Group]:
        return [text_group("probe", prompts[0], [str(step)])] if prompts else []

    def check(self, record: StepRecord) -> Findings:
        self.steps += 1
        scored = [score.value for group in record.probed for _, score in group.scored()]
        table = [{"probed": scored, "measured": dict(record.measured)}]
        return Findings({self.config.metric: float(self.steps)}, table, **self.config.says)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class Run:
    def __init__(self, *configs: Counting.Config) -> None:
        self.said: list[str] = []
        self.tables: dict[str, list[Mapping[str, Any]]] = {}
        self.diagnostics = Diagnostics(
            [Counting(config, {}) for config in configs],
            [make_group("g", []).prompt],
            warn=self.said.append,
            write_table=self.write,
            score=self.score,
        )

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self.tables.setdefault(name, []).extend(rows)

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        return [group.with_scores(GroupScores((Score(float(group.samples[0].text)),))) for group in groups]

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        return asyncio.run(self.diagnostics.check(StepRecord(step, metrics, [make_group("g", ["a"])])))


def config(**options: Any) -> Counting.Config:
    return Counting.Config(kind="my_module.Counting", **options)


def test_metrics_tables_and_what_the_learner_measured_reach_their_places() -> None:
    run = Run(config())
    asyncio.run(run.diagnostics.begin())
    metrics = run.check(3, {**LEARNT, "diagnostics/Counting/total": 2.5, "diagnostics/drift/tokens": 9.0})
    assert metrics == {**LEARNT, "counting/steps": 2.0}
    assert run.tables == {
        "Counting": [
            {"step": 0, "probed": [0.0], "measured": {}},
            {"step": 3, "probed": [3.0], "measured": {"total": 2.5}},
        ]
    }
    assert run.said == []
    run.diagnostics.obey()


@pytest.mark.parametrize("name", ["steps", "advantage/mean_absolute"])
def test_a_metric_without_an_area_or_of_another_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"my_module.Counting reports {name}"):
        Run(config(metric=name)).check(1, LEARNT)


def test_a_warning_is_shown_and_with_alarm_stop_ends_the_run_as_a_verdict_does() -> None:
    warned = Run(config(says={"warning": "look there"}))
    warned.check(1, LEARNT)
    assert warned.said == ["look there"]
    warned.diagnostics.obey()
    for ends in (config(says={"warning": "look there"}, alarm="stop"), config(says={"stop": "look there"})):
        run = Run(ends)
        run.check(7, LEARNT)
        assert run.said == []
        with pytest.raises(DiagnosedError, match="diagnostic Counting ends the run after step 7: look there"):
            run.diagnostics.obey()
        with pytest.raises(DiagnosedError, match="before training: look there"):
            asyncio.run(Run(ends).diagnostics.begin())


def test_the_end_of_a_run_says_whether_anything_was_learnt() -> None:
    run = Run()
    run.check(1, {"advantage/mean_absolute": 0.0})
    assert run.diagnostics.conclude({}) == {"nothing_learnt": True}
    assert "nothing was learnt" in run.said[0]


def test_state_goes_through_a_checkpoint_and_old_ones_load() -> None:
    run, again = Run(config()), Run(config())
    run.check(1, {"advantage/mean_absolute": 0.0})
    again.diagnostics.load_state_dict({"diagnostics": json.loads(json.dumps(run.diagnostics.state_dict()))})
    assert again.diagnostics.state_dict() == run.diagnostics.state_dict()
    older = Run()
    older.diagnostics.load_state_dict({"alarm": [{"reward/mean": 1.0}], "signal": {"steps": 3, "learnt": False}})
    assert older.diagnostics.state_dict() == {"no_signal": {"steps": 3, "learnt": False}}
    oldest = Run()
    oldest.diagnostics.load_state_dict({"alarm": []})  # before 0.3
    assert oldest.diagnostics.state_dict() == Run().diagnostics.state_dict()


def test_the_alarms_history_of_an_older_checkpoint_is_that_of_hacking() -> None:
    from rlkit.diagnostics.alarms import Hacking

    (hacking,) = make_diagnostics([Hacking.Config()], {"trainer": {"hacking_alarm_steps": 2}})
    group = Diagnostics([hacking], [], warn=print, write_table=lambda *_: None, score=Run().score)
    history = [{"reward/mean": 1.0}, {"reward/mean": 2.0}]
    group.load_state_dict({"alarm": history, "signal": {"steps": 2, "learnt": True}})
    assert hacking.state_dict() == {"history": history, "quiet": 0}


def test_only_what_measures_goes_to_the_learner() -> None:
    from rlkit.diagnostics.alarms import Hacking

    settings = {"trainer": {"hacking_alarm_steps": 2}}
    assert [type(part) for part in measuring([Hacking.Config(), Drift.Config()], settings)] == [Drift]
