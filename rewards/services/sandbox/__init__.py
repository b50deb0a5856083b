"""Isolated execution of model-written code; of this package, only `inside/` runs in the sandbox."""

from rewards.services.sandbox.inside.wire import decode
from rewards.services.sandbox.isolation import Isolation, Job, Limits, Run, Unavailable
from rewards.services.sandbox.options import SandboxOptions

__all__ = ["Isolation", "Job", "Limits", "Run", "SandboxOptions", "Unavailable", "decode"]
