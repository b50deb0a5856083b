"""Where a run resumes: the newest complete checkpoint, and whether it belongs to this configuration."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlkit.checkpoint.folder import RUN_CONFIG, BadCheckpointError, Sealed, open_checkpoint, sealed_folders
from rlkit.config.compose import default_part
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.config.parts import CONTRACTS, plain, with_present_targets
from rlkit.config.report import Line
from rlkit.config.schema import RunConfig

FIXED = (
    "model",
    "data",
    "algorithm",
    "reward._target_",
    "environment._target_",
    "seed",
    "trainer.prompts_per_step",
    "rollout.source",
    "rollout.temperature",
)
"""Keys and sections that a resumed run must share with its checkpoint."""
RESOLVED = (
    "algorithm.rollout_correction",
    "algorithm.largest_weight",
    "algorithm.overlong_max_tokens",
    "algorithm.constant_length",
)
"""Keys whose default depends on a key that may change: `trainer.max_staleness`, `rollout.max_response_tokens`."""
_WEIGHT = re.compile(r"data\.sources\.\w+\.weight")
FREE = ("run_dir", "resume", "dry_run", "tracking")
"""Keys and sections whose changes are not reported."""


@dataclass(frozen=True)
class ResumePoint:
    checkpoint: Sealed
    notices: tuple[str, ...]
    """Checkpoints that were skipped, and permitted differences."""
    same_run: bool
    """Whether the checkpoint is in this run's own folder, whose metrics and samples are then continued."""

    def nothing_left(self, total_steps: int) -> str | None:
        """A message if the checkpoint has all steps, and the last evaluation if the run had any; else None."""
        step = self.checkpoint.step
        if step < total_steps or self._lacks_its_evaluation():
            return None
        return f"nothing left to do: {self.checkpoint.path} has all {step} steps"

    def _lacks_its_evaluation(self) -> bool:
        evaluated = self.checkpoint.run_state["accuracies"]
        return bool(evaluated) and str(self.checkpoint.step) not in evaluated

    def plan(self) -> list[Line]:
        start = f"{self.checkpoint.path} (after {self.checkpoint.step} steps)"
        return [Line("resume", "from", start), *(Line("resume", "", notice) for notice in self.notices)]


def find_resume(config: RunConfig) -> ResumePoint | None:
    """Find the checkpoint that `resume` asks for; None for a new run.

    Raises ConfigError if there is none, or if its model, data or algorithm differ.
    """
    if config.resume == "never":
        return None
    own = (Path(config.run_dir).expanduser().absolute()) / "checkpoints"
    if config.resume == "auto":
        checkpoint, skipped = _newest(own)
        if checkpoint is None and skipped:
            raise ConfigError([ConfigIssue("resume=auto", f"no checkpoint in {own} is intact: {'; '.join(skipped)}")])
    else:
        checkpoint, skipped = _named(Path(config.resume).expanduser().absolute())
    if checkpoint is None:
        return None
    differences = _differences(checkpoint, config)
    _refuse_another_run(checkpoint, config, differences)
    # The number of steps per epoch follows from the data.
    counted = () if config.trainer.total_epochs is None else ("trainer.total_steps",)
    changed = [
        f"{key} was {_shown(old)} and is {_shown(new)} now"
        for key, old, new in differences
        if not _is_fixed(key) and not _is_one_of(key, (*FREE, *counted))
    ]
    if changed:
        changed.append(f"to keep the old values: {_own_configuration(checkpoint)}")
    notices = [f"checkpoint {text}" for text in skipped] + changed
    return ResumePoint(checkpoint, tuple(notices), same_run=checkpoint.path.parent == own)


def _newest(checkpoints: Path) -> tuple[Sealed | None, list[str]]:
    skipped: list[str] = []
    for folder in sealed_folders(checkpoints):
        try:
            return open_checkpoint(folder), skipped
        except BadCheckpointError as error:
            skipped.append(f"{folder.name} skipped: {error}")
    return None, skipped


def _named(path: Path) -> tuple[Sealed, list[str]]:
    """Open a checkpoint's own folder, or the newest one in a run's folder."""
    where = f"resume={path}"
    if not path.is_dir():
        raise ConfigError([ConfigIssue(where, "there is no such folder; name a checkpoint (.../step_NNNNNN) or a run")])
    if (path / "checkpoints").is_dir():
        checkpoint, skipped = _newest(path / "checkpoints")
        if checkpoint is None:
            raise ConfigError(
                [ConfigIssue(where, f"has no intact checkpoint{': ' if skipped else ''}{'; '.join(skipped)}")]
            )
        return checkpoint, skipped
    try:
        return open_checkpoint(path), []
    except BadCheckpointError as error:
        raise ConfigError([ConfigIssue(where, f"is not an intact checkpoint: {error}")]) from None


def _refuse_another_run(checkpoint: Sealed, config: RunConfig, differences: Sequence[tuple[str, Any, Any]]) -> None:
    problems = [
        ConfigIssue(key, f"is {_shown(new)}, but {checkpoint.path} was made with {_shown(old)}; that is another run")
        for key, old, new in differences
        if _is_fixed(key)
    ]
    if config.trainer.total_epochs is None and config.trainer.total_steps < checkpoint.step:
        problems.append(
            ConfigIssue(
                f"trainer.total_steps={config.trainer.total_steps}",
                f"{checkpoint.path} already has {checkpoint.step} steps; ask for more, or name an earlier checkpoint",
            )
        )
    if problems and differences and problems[0].where != f"trainer.total_steps={config.trainer.total_steps}":
        hint = f"{problems[-1].message}; to continue with its own configuration: {_own_configuration(checkpoint)}"
        problems[-1] = replace(problems[-1], message=hint)
    if problems:
        raise ConfigError(problems)


def _own_configuration(checkpoint: Sealed) -> str:
    run, file = checkpoint.path.parent.parent, checkpoint.path / RUN_CONFIG
    if not file.is_file():
        file = run / "config.yaml"  # from the run's last start
    return f"run_dir={shlex.quote(str(run))} --config {shlex.quote(str(file))} resume=auto"


def _is_fixed(key: str) -> bool:
    return _is_one_of(key, FIXED) and key not in RESOLVED and not _WEIGHT.fullmatch(key)


def _is_one_of(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differences(checkpoint: Sealed, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (full key, the checkpoint's value, the run's) for every leaf that differs.

    A part that the checkpoint is too old to have counts as the default one.
    """
    old, new = with_present_targets(checkpoint.manifest["config"]), plain(config)
    added = {kind: default_part(kind) for kind in CONTRACTS if kind not in old}
    return list(_different_leaves({**old, **added}, new))


def _different_leaves(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _different_leaves(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield key, old, new


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
