"""All diagnostics of a run as one object."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlkit.diagnostics.alarms import NoSignal
from rlkit.diagnostics.base import MEASURED, Diagnostic, DiagnosticConfig, Findings, StepRecord
from rlkit.diagnostics.known import diagnostic_class
from rlkit.experience import Group, Prompt, UserError

Score = Callable[[Sequence[Group]], Awaitable[Sequence[Group]]]
WriteTable = Callable[[str, Iterable[Mapping[str, Any]]], None]


class DiagnosedError(UserError):
    """A diagnostic ends the run; the message names cause and remedy."""


def make_diagnostics(configs: Iterable[DiagnosticConfig], settings: Mapping[str, Any]) -> list[Diagnostic]:
    """Make diagnostics. `settings`: the run's complete configuration as plain values."""
    return [diagnostic_class(config.kind)(config, settings) for config in configs]


def measuring(configs: Iterable[DiagnosticConfig], settings: Mapping[str, Any]) -> list[Diagnostic]:
    """Make only the diagnostics that measure on the learner."""
    return [part for part in make_diagnostics(configs, settings) if type(part).measure is not Diagnostic.measure]


class Diagnostics:
    """The diagnostics of a run, including the one that is always on: whether anything is learnt at all."""

    def __init__(
        self,
        chosen: Sequence[Diagnostic],
        prompts: Sequence[Prompt],
        *,
        warn: Callable[[str], None],
        write_table: WriteTable,
        score: Score,
    ) -> None:
        """`prompts`: the training data's. `score` scores groups with the run's reward."""
        self.parts = [NoSignal(NoSignal.Config(), {}), *chosen]
        self.prompts = prompts
        self.warn, self.write_table, self.score = warn, write_table, score
        self.verdict = ""

    async def begin(self) -> None:
        """Probe the reward before training. Raises DiagnosedError."""
        for part in self.parts:
            groups = part.probes(0, self.prompts)
            if groups:
                self._report(0, part, part.check(StepRecord(0, probed=await self.score(groups))))
        self.obey()

    async def check(self, record: StepRecord) -> dict[str, float]:
        """Check a step; return its metrics with those of all diagnostics."""
        metrics = {name: value for name, value in record.metrics.items() if not name.startswith(MEASURED)}
        prompts = [group.prompt for group in record.groups]
        added: dict[str, float] = {}
        for part in self.parts:
            groups, own = part.probes(record.step, prompts), f"{MEASURED}{part.config.name}/"
            measured = {name.removeprefix(own): value for name, value in record.metrics.items() if name.startswith(own)}
            probed = await self.score(groups) if groups else ()
            findings = part.check(replace(record, metrics=metrics, measured=measured, probed=probed))
            for name in findings.scalars:
                if "/" not in name or name in metrics or name in added:
                    raise UserError(
                        f"diagnostic {part.config.kind} reports {name}: a metric must be named area/name, and be "
                        "reported only once in a step"
                    )
            added |= findings.scalars
            self._report(record.step, part, findings)
        return metrics | added

    def obey(self) -> None:
        """Raise DiagnosedError if a diagnostic has ended the run."""
        if self.verdict:
            raise DiagnosedError(self.verdict)

    def conclude(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Give the last warnings; return entries for summary.json. `metrics`: the latest known values."""
        entries: dict[str, Any] = {}
        for part in self.parts:
            findings = part.conclude(metrics)
            entries |= findings.scalars
            if findings.warning:
                self.warn(findings.warning)
        return entries

    def _report(self, step: int, part: Diagnostic, findings: Findings) -> None:
        if findings.table:
            self.write_table(part.config.name, [{"step": step, **row} for row in findings.table])
        ends = findings.stop or (findings.warning if part.config.alarm == "stop" else "")
        if findings.warning and findings.warning != ends:
            self.warn(findings.warning)
        if ends and not self.verdict:
            when = f"after step {step}" if step else "before training"
            self.verdict = f"diagnostic {part.config.name} ends the run {when}: {ends}"

    def state_dict(self) -> dict[str, Any]:
        return {part.config.name: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from the run's state. Diagnostics that are not in the checkpoint start fresh."""
        older = {"hacking": {"history": state.get("alarm", ()), "quiet": 0}, "no_signal": state.get("signal")}
        saved = state.get("diagnostics", older)
        for part in self.parts:
            if saved.get(part.config.name):
                part.load_state_dict(saved[part.config.name])
