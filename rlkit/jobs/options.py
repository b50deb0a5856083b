"""The arguments of `rlkit.submit`: those about the job are taken out, the others are the run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlkit.config.compose import parse_overrides
from rlkit.config.messages import Problem, all_fields, validate
from rlkit.config.schema import Section

ADDRESS = "cluster.address"


class SubmitConfig(Section):
    """How a run becomes a job of a Ray cluster."""

    code: Literal["upload", "installed"] = "upload"
    """upload: send the working folder, without outputs and virtual environments; installed: use the cluster's rlkit."""
    python: str = "python"
    """The Python of the job, on the cluster: a command or an absolute path."""
    exclude: tuple[str, ...] = ()
    """More names or patterns that are not uploaded: [data,"*.ckpt"]. What git ignores never is."""
    max_file_mib: float = Field(default=20.0, gt=0)
    """Larger files are not uploaded; a message names each."""
    max_upload_mib: float = Field(default=100.0, gt=0, le=450)
    """A larger folder (before compression) is refused. Ray itself takes packages below 512 MiB."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for the job and its workers: {NAME: value}. Whoever may see the cluster's jobs can read them."""
    pass_environment: tuple[str, ...] = ()
    """Names of variables whose values here the job gets, too. The same people can read them."""
    autoscaling: bool = False
    """The cluster adds nodes when they are asked for: missing GPUs are then a warning."""
    follow: bool = True
    """Show the log until the job ends, and exit with its code."""
    reconnect_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Following gives up when the cluster has not answered for so long; the job is left alone."""
    stop_seconds: int = Field(default=60, ge=1)
    """How long the job may take to end in order after `stop`, before it is killed."""


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart."""

    address: str | None
    """`cluster.address`, as it was given."""
    submit: SubmitConfig
    overrides: list[str]
    """What `rlkit.train` gets, as it was typed."""
    file: Path | None
    """`--config FILE`."""
    problems: list[Problem]
    """What is wrong with the part that is about the job."""


def read_arguments(overrides: Sequence[str], file: Path | None) -> Arguments:
    """Sort the arguments; problems of the job's own keys are collected in the result."""
    about_job = [text for text in overrides if _key(text).startswith("submit.") or _key(text) in ("submit", ADDRESS)]
    parsed = parse_overrides(about_job, {})
    tree: dict[str, Any] = {}
    address, problems = None, list(parsed.problems)
    for key, value in parsed.values.items():
        if key == ADDRESS:
            address = str(value)
        elif key == "submit":
            problems.append(
                Problem(parsed.typed[key], "is a section; set its keys one by one, like submit.code=upload")
            )
        else:
            tree[key.removeprefix("submit.")] = value
    known = [key for key, _ in all_fields(SubmitConfig, "submit.")]
    section, more = validate(
        SubmitConfig, tree, "submit.", known, lambda key, value: parsed.typed.get(key, f"{key}={value}"), {}
    )
    return Arguments(
        address=address,
        submit=section if isinstance(section, SubmitConfig) else SubmitConfig(),
        overrides=[text for text in overrides if text not in about_job],
        file=file,
        problems=[*problems, *more],
    )


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~").strip()
