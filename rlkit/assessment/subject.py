"""Finds what a command is about: a run, one of its checkpoints, or a model's folder, each given by one word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlkit.checkpoint.folder import sealed_folders
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.config.overrides import quoted
from rlkit.experience.names import nearest
from rlkit.models.folder import PREFIX


@dataclass(frozen=True)
class Subject:
    run: Path | None
    """None: a model that belongs to no run."""
    step: int | None
    """Step of a checkpoint; None: the whole run, or a model."""
    model: str
    """Folder of a checkpoint or a model; for a run, that of its newest checkpoint, or empty if it has none."""

    def overrides(self) -> list[str]:
        """Return the arguments of an evaluation that name the subject."""
        if self.run is None:
            return ["model=hf", f"model.path={quoted(self.model)}"]
        return [f"run={quoted(str(self.run))}", *([] if self.step is None else [f"checkpoints=[{self.step}]"])]


def find_subject(named: str) -> Subject:
    """Find the subject. Raises ConfigError for a word that names none."""
    path = Path(named).expanduser()
    if named.startswith(PREFIX):
        return Subject(None, None, named)
    if (path / "config.json").is_file() and not _is_policy(path):
        return Subject(None, None, str(path))
    checkpoint = path.parent if _is_policy(path) else path
    if (checkpoint / "policy").is_dir():
        run = checkpoint.parent.parent
        step = checkpoint.name.removeprefix("step_")
        of_run = step.isdecimal() and (run / "config.yaml").is_file()
        return Subject(run if of_run else None, int(step) if of_run else None, str(checkpoint / "policy"))
    if any((path / name).exists() for name in ("config.yaml", "samples.jsonl", "checkpoints")):
        saved = sealed_folders(path / "checkpoints")
        return Subject(path, None, str(saved[0] / "policy") if saved else "")
    why = _meant(path) or ("it has none of their files" if path.is_dir() else "there is no such folder")
    remedy = "name a run (runs/x), a checkpoint (runs/x/checkpoints/step_000060) or a model's folder"
    raise ConfigError([ConfigIssue(named, f"is not the folder of a run, checkpoint or model: {why}; {remedy}")])


def config_of(run: Path) -> dict[str, Any]:
    """Return the run's configuration; empty if there is none."""
    file = run / "config.yaml"
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def _is_policy(path: Path) -> bool:
    """Whether the folder is a checkpoint's policy: RUN/checkpoints/step_000060/policy."""
    return path.name == "policy" and path.parent.name.startswith("step_")


def _meant(path: Path) -> str | None:
    if path.exists() or not path.parent.is_dir():
        return None
    guess = nearest(path.name, (other.name for other in path.parent.iterdir() if other.is_dir()))
    return f"did you mean {path.parent / guess}?" if guess else None
