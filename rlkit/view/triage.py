"""Triage of reward hacking."""

from __future__ import annotations

from rlkit.view.asked import AboutRun
from rlkit.view.runs import Run
from rlkit.view.schema import TriageResult


def triage(run: Run, asked: AboutRun) -> TriageResult:
    del asked
    return TriageResult(verifier=False, findings=[], missing=[])
