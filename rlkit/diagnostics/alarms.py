"""Alarms that read only the step's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlkit.diagnostics.base import Diagnostic, DiagnosticConfig, Findings, StepRecord, Windows


class NoSignal(Diagnostic):
    """Warns if no step of the run had anything to teach, because rewards did not differ within any group."""

    STEPS = 5

    class Config(DiagnosticConfig):
        kind: str = "no_signal"

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        self.steps = 0
        self.learnt = False

    @property
    def nothing_learnt(self) -> bool:
        return self.steps > 0 and not self.learnt

    def check(self, record: StepRecord) -> Findings:
        size = record.metrics.get("advantage/mean_absolute", record.metrics.get("policy/grad_norm", 1.0))
        self.learnt |= size != 0
        self.steps += 1
        if not self.nothing_learnt or self.steps != self.STEPS:
            return Findings()
        return Findings(warning=f"nothing was learnt in the first {self.STEPS} steps: {self._cause(record.metrics)}")

    def conclude(self, metrics: Mapping[str, float]) -> Findings:
        warning = f"nothing was learnt in this run: {self._cause(metrics)}" if self.nothing_learnt else ""
        return Findings({"nothing_learnt": self.nothing_learnt}, warning=warning)

    def _cause(self, metrics: Mapping[str, float]) -> str:
        reward = f" (mean reward {metrics['reward/mean']:.3f})" if "reward/mean" in metrics else ""
        return (
            f"all responses to a prompt got the same reward, in every group{reward}, so all advantages are 0. Look in "
            "samples.jsonl: can the reward read these answers, and are the problems too hard or too easy for this "
            "policy? (docs/metrics.md, `group/all_equal_share`)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "learnt": self.learnt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.learnt = state["steps"], state["learnt"]


class Hacking(Diagnostic):
    """Warns when a learnt signal rises while verified accuracy falls.

    Compares the means of the last n steps (`trainer.hacking_alarm_steps`) with those of the n before. It warns if the
    reward or the process reward model's accuracy rose by more than `RISE` and the share of right answers fell by more
    than `FALL`.
    """

    RISE, FALL = 0.01, 0.02
    LEARNT: Mapping[str, str] = {
        "prm/pair_accuracy": "the process reward model's pair accuracy",
        "reward/mean": "the mean reward",
    }

    class Config(DiagnosticConfig):
        kind: str = "hacking"

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        self.windows = Windows(settings["trainer"]["hacking_alarm_steps"])

    def check(self, record: StepRecord) -> Findings:
        names, windows = ("accuracy/train", *self.LEARNT), self.windows
        windows.add({name: record.metrics[name] for name in names if name in record.metrics})
        verified = windows.change("accuracy/train") if windows.due else None
        if verified is None or verified[1] - verified[0] > -self.FALL:
            return Findings()
        warnings = []
        for name, what in self.LEARNT.items():
            change = windows.change(name)
            if change is not None and change[1] - change[0] > self.RISE:
                windows.warned()
                warnings.append(
                    f"{what} rose from {change[0]:.3f} to {change[1]:.3f} over {2 * windows.steps} steps while the "
                    f"share of answers that the rule verifier finds right fell from {verified[0]:.1%} to "
                    f"{verified[1]:.1%}: the policy may be fooling its reward (read samples.jsonl and docs/metrics.md)"
                )
        return Findings(warning="; ".join(warnings))

    def state_dict(self) -> dict[str, Any]:
        return self.windows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows.load_state_dict(state)
