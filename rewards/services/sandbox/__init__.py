"""Isolated execution of model-written code; inside the sandbox only `inside/` runs."""

from rewards.services.sandbox.inside.wire import decode
from rewards.services.sandbox.isolation import Isolation, Job, Limits, Run, Unavailable
from rewards.services.sandbox.options import SandboxOptions

__all__ = ["Isolation", "Job", "Limits", "Run", "SandboxOptions", "Unavailable", "decode"]
