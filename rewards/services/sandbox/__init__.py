"""Isolated execution of model-written code; inside the sandbox only `inside/` runs."""

from __future__ import annotations

from typing import Literal

from rewards.services.sandbox.inside.wire import decode
from rewards.services.sandbox.isolation import Isolation, Job, Limits, Run, Unavailable

__all__ = ["Isolation", "Job", "Limits", "Run", "Unavailable", "decode", "open_sandbox"]


def open_sandbox(
    isolation: Literal["bubblewrap", "http"],
    limits: Limits,
    *,
    side_by_side: int = 1,
    python: str | None = None,
    url: str | None = None,
    token_variable: str | None = None,
    max_tries: int = 4,
) -> Isolation:
    """Return a sandbox that is not started yet.

    bubblewrap: on this machine, `side_by_side` programs at a time, with the interpreter `python` (None: the base of
    rlkit's environment). http: the SandboxFusion service at `url`; `token_variable` names an environment variable.
    """
    if isolation == "bubblewrap":
        from rewards.services.sandbox.bubblewrap import Bubblewrap

        return Bubblewrap(limits, side_by_side, python)
    from rewards.services.sandbox.fusion import SandboxFusion

    return SandboxFusion(url or "", limits, token_variable, max_tries)
