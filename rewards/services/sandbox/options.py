"""The user's options for sandboxes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rewards.services.sandbox.isolation import Isolation, Limits
from rlkit.experience.section import Section

_BUBBLEWRAP_ONLY = {"cpu_seconds", "max_processes", "file_mib", "output_kib", "python"}
_HTTP_ONLY = {"url", "token_variable", "max_tries"}


class SandboxOptions(Section):
    isolation: Literal["bubblewrap", "http"]
    """Where model-written code runs. bubblewrap: sandboxes on this machine; http: a SandboxFusion service. There is
    no unisolated mode."""
    processes: int = Field(default=2, ge=1)
    """Concurrent programs of one worker (with http: requests)."""
    wall_seconds: float = Field(default=10.0, gt=0)
    """Deadline of one program: for all its assert statements or calls together, or for each standard input."""
    cpu_seconds: int = Field(default=5, ge=1)
    """CPU time of each process of the program (bubblewrap)."""
    memory_mib: int = Field(default=1024, ge=64)
    """Address space of each process of the program."""
    max_processes: int = Field(default=8, ge=1)
    """Concurrent processes and threads of a program (bubblewrap)."""
    file_mib: int = Field(default=16, ge=1)
    """Total size of the files that a program may write (bubblewrap)."""
    output_kib: int = Field(default=1024, ge=1)
    """A program that prints more than this is ended (bubblewrap)."""
    python: str | None = None
    """Python interpreter of the programs (bubblewrap), for example one with numpy; null: the base interpreter of
    rlkit's environment, without packages."""
    url: str | None = None
    """Address of the service (http), such as `http://127.0.0.1:8080`."""
    token_variable: str | None = None
    """Environment variable with the service's bearer token (http)."""
    max_tries: int = Field(default=4, ge=1)
    """Tries of a request that fails on the service's side (http)."""

    @model_validator(mode="after")
    def _options_belong_to_the_isolation(self) -> Self:
        foreign = _BUBBLEWRAP_ONLY if self.isolation == "http" else _HTTP_ONLY
        # Compare values, because a configuration that was written out names every field.
        fields = type(self).model_fields
        idle = sorted(name for name in foreign if getattr(self, name) != fields[name].default)
        if idle:
            raise ValueError(f"{', '.join(idle)} has no effect with isolation={self.isolation}")
        if self.isolation == "http" and self.url is None:
            raise ValueError("isolation=http needs url, the address of a SandboxFusion service")
        return self

    def sandbox(self) -> Isolation:
        """Return a sandbox that is not started yet."""
        limits = Limits(
            wall_seconds=self.wall_seconds,
            cpu_seconds=self.cpu_seconds,
            memory_mib=self.memory_mib,
            processes=self.max_processes,
            file_mib=self.file_mib,
            output_kib=self.output_kib,
        )
        if self.isolation == "bubblewrap":
            from rewards.services.sandbox.bubblewrap import Bubblewrap

            return Bubblewrap(limits, self.processes, self.python)
        from rewards.services.sandbox.fusion import SandboxFusion

        return SandboxFusion(self.url or "", limits, self.token_variable, self.max_tries)
