"""Diagnostics by name, or by the dotted path of a user's class."""

from __future__ import annotations

from collections.abc import Mapping

from rlkit.diagnostics.alarms import Hacking
from rlkit.diagnostics.base import Diagnostic, DiagnosticConfig
from rlkit.diagnostics.probes import JudgeFalsePositives
from rlkit.diagnostics.ratios import Drift, RatioShift
from rlkit.diagnostics.scores import RewardGap, Starc
from rlkit.experience.names import NotFoundError, find_class

BUILT_IN = (Hacking, RatioShift, RewardGap, Drift, Starc, JudgeFalsePositives)
DIAGNOSTICS: Mapping[str, type[Diagnostic]] = {cls.Config.model_fields["kind"].default: cls for cls in BUILT_IN}


def diagnostic_class(kind: str) -> type[Diagnostic]:
    """Return the class. Raises NotFoundError for a dotted path without such a class."""
    cls: type[Diagnostic] = DIAGNOSTICS.get(kind) or find_class("diagnostic", kind, Diagnostic)
    if not issubclass(cls.Config, DiagnosticConfig):
        raise NotFoundError(f"its Config must be a subclass of {DiagnosticConfig.__module__}.DiagnosticConfig")
    return cls
