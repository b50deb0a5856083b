"""From checked arguments to a job of Ray: its command, its environment, its id."""

from __future__ import annotations

import os
import re
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.checkpoint.resume import find_resume
from rlkit.config.compose import quoted
from rlkit.config.messages import ConfigError, Problem
from rlkit.config.parts import ResolvedRun, plain
from rlkit.config.schema import RunConfig
from rlkit.jobs.cluster import RUN_FOLDER, RUN_NAME
from rlkit.jobs.options import SubmitConfig
from rlkit.jobs.upload import Upload

CONFIG_IN_ARCHIVE = "submitted_config.yaml"
PATH_KEYS = ("path", "template", "file", "folder", "dir")
"""Fields whose names end in one of these name files."""


@dataclass(frozen=True)
class Job:
    """What Ray's job client is given besides the files."""

    submission_id: str
    entrypoint: str
    environment: dict[str, str]
    metadata: dict[str, str]


def make_job(run: ResolvedRun, overrides: Sequence[str], has_config_file: bool, submit: SubmitConfig) -> Job:
    """The job that trains `run`, which `overrides` (and a configuration file) describe."""
    folder = run.config.run_dir
    arguments = ["-m", "rlkit.train", *(["--config", CONFIG_IN_ARCHIVE] if has_config_file else [])]
    arguments += [text for text in overrides if text.partition("=")[0] not in ("run_dir", "dry_run")]
    arguments.append(f"run_dir={quoted(str(folder))}")
    name = re.sub(r"[^\w.-]+", "-", folder.name)
    return Job(
        submission_id=f"{name}-{uuid.uuid4().hex[:6]}",
        entrypoint=f"exec {shlex.join([submit.python, *arguments])}",
        environment=environment(submit),
        metadata={RUN_NAME: folder.name, RUN_FOLDER: str(folder)},
    )


def environment(submit: SubmitConfig) -> dict[str, str]:
    """Variables of the driver and all its actors; an actor's own settings come on top."""
    passed = {name: os.environ[name] for name in submit.pass_environment if name in os.environ}
    return {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        # Actors without a GPU keep the device variables as they are.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Between SIGTERM and SIGKILL; Ray's own 3 s are too few for a run to end in order.
        "RAY_JOB_STOP_WAIT_TIME_S": str(submit.stop_seconds),
        **passed,
        **submit.environment,
    }


def environment_problems(submit: SubmitConfig) -> list[Problem]:
    """Variables that are to be passed and are not set."""
    absent = [name for name in submit.pass_environment if name not in os.environ]
    return [Problem(f"submit.pass_environment=[{name}]", f"{name} is not set here") for name in absent]


def relative_path_problems(run: ResolvedRun, upload: Upload | None, here: Path) -> list[Problem]:
    """Relative paths that exist here but not where the job starts: in the files that were uploaded."""
    problems = []
    for key, value in _texts(plain(run.config)):
        path = Path(value)
        if not key.endswith(PATH_KEYS) or path.is_absolute() or value.startswith("~") or not (here / path).exists():
            continue
        if upload is None:
            why = "with submit.code=installed the job does not start in this folder"
        elif upload.has(here / path):
            continue
        else:
            why = "it is not among the uploaded files (outside this folder, ignored, or too large)"
        problems.append(Problem(f"{key}={value}", f"{why}; name it by an absolute path on storage the cluster sees"))
    return problems


def resume_problems(config: RunConfig) -> list[Problem]:
    """`resume=PATH` that means another folder where the job starts."""
    if config.resume in ("auto", "never") or Path(config.resume).expanduser().is_absolute():
        return []
    why = "the job starts in a copy of this folder, without its runs; name the run by an absolute path"
    return [Problem(f"resume={config.resume}", why)]


def resume_warnings(config: RunConfig) -> list[str]:
    """What `resume` finds here. On storage that the cluster shares, the job finds the same."""
    try:
        point = find_resume(config)
    except ConfigError as error:
        return [f"{problem.where}: {problem.message}" for problem in error.problems]
    return [] if point is None else [f"resume: goes on from {point.checkpoint.path}", *point.notices]


def _texts(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            found.append((f"{prefix}{key}", value))
    return found
