"""Run folders as the viewer knows them: what was asked for, what each run is and how it stands."""

from __future__ import annotations

import itertools
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

import rlkit
from rlkit.experience import UserError
from rlkit.tracking.progress import duration
from rlkit.view.index import SampleIndex
from rlkit.view.metrics import Metrics
from rlkit.view.rows import parsed, whole
from rlkit.view.schema import Has, RunInfo, RunList

State = Literal["running", "ended", "silent"]
T = TypeVar("T")
SILENT_SECONDS = 120.0
"""Without a new line for so long, or for ten steps, a run whose lock nobody on this machine holds is silent."""
LISTING_SECONDS = 0.1
"""How long a list of runs waits for the index of each."""
LOCKS = Path("/proc/locks")


class NotThereError(UserError):
    """A run, row or file that does not exist (any more): the message names it."""


class Run:
    """One run folder, read only."""

    def __init__(self, run_id: str, path: Path) -> None:
        self.id, self.path = run_id, path
        self._config: tuple[object, dict[str, Any]] = (None, {})
        self._remembered: dict[str, tuple[object, Any]] = {}

    @cached_property
    def index(self) -> SampleIndex:
        return SampleIndex(self.path)

    @cached_property
    def _metrics(self) -> Metrics:
        return Metrics(self.path)

    @property
    def metrics(self) -> Metrics:
        """Up to date."""
        self._metrics.follow()
        return self._metrics

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as plain data; empty where there is none."""
        file = self.path / "config.yaml"
        try:
            state = file.stat().st_mtime_ns
            if state != self._config[0]:
                loaded = yaml.load(
                    file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
                )
                self._config = (state, loaded if isinstance(loaded, dict) else {})
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return self._config[1]

    def option(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key of config.yaml."""
        value: Any = self.config
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return value

    @property
    def summary(self) -> dict[str, Any] | None:
        """None while there is none."""
        try:
            return parsed((self.path / "summary.json").read_bytes())
        except OSError:
            return None

    @property
    def results(self) -> dict[str, Any] | None:
        try:
            return parsed((self.path / "results.json").read_bytes())
        except OSError:
            return None

    def stamp(self) -> tuple[object, ...]:
        """Changes whenever the run grows, is cut, or ends."""
        return tuple(
            _stamp(self.path / name) for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "rescored")
        )

    def remembered(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, until the run has grown or was cut; for what takes long."""
        stamp = self.stamp()
        known = self._remembered.get(name)
        if known is None or known[0] != stamp:
            known = self._remembered[name] = (stamp, make())
        result: T = known[1]
        return result

    def state(self) -> tuple[State, str]:
        """And in words."""
        metrics, total, summary = self.metrics, self.total_steps, self.summary
        of = f"{metrics.step} of {total}" if total else f"{metrics.step}"
        if summary is not None:
            why = f" ({summary['ended']})" if summary.get("ended") else ""
            return "ended", f"ended after step {of}{why}" if metrics.step else f"ended{why}"
        quiet = time.time() - max(self._touched(), metrics.updated or 0.0)
        patience = max(SILENT_SECONDS, 10 * (self.seconds_per_step() or 0.0))
        if _locked(self.path / "logs" / "lock") or quiet < patience:
            return "running", f"running: step {of}"
        last = "; logs/driver.log has its last words" if (self.path / "logs" / "driver.log").exists() else ""
        return "silent", f"silent for {duration(quiet)} after step {of}, without a summary: killed or crashed{last}"

    def _touched(self) -> float:
        times = [stamp[2] for name in ("metrics.jsonl", "samples.jsonl") if (stamp := _stamp(self.path / name))]
        return max(times, default=0) / 1e9

    @property
    def total_steps(self) -> int | None:
        return whole(self.option("trainer.total_steps"))

    @property
    def is_evaluation(self) -> bool:
        return (self.path / "results.json").exists()

    def seconds_per_step(self) -> float | None:
        """Of the last twenty steps: the middle one."""
        seconds = sorted(value for _, value in self._metrics.training.points("time/step")[-20:])
        return seconds[len(seconds) // 2] if seconds else None

    def info(self) -> RunInfo:
        state, words = self.state()
        metrics = self._metrics
        groups = "SELECT DISTINCT step, group_id FROM rows WHERE dropped IS NULL"
        counts = f"SELECT count(*), (SELECT count(*) FROM ({groups})) FROM rows"
        count, kept = self.index.connection().execute(counts).fetchone()
        return RunInfo(
            id=self.id,
            path=str(self.path),
            kind="evaluation" if self.is_evaluation else "training",
            state=state,
            state_text=words,
            algorithm=_short(self.option("algorithm._target_")),
            reward=_short(self.option("reward._target_")),
            model=str(self.option("model.path", "")),
            data=str(self.option("data.path") or _short(self.option("data._target_"))),
            step=metrics.step,
            total_steps=self.total_steps,
            began=metrics.began,
            updated=metrics.updated,
            samples=count,
            kept_groups=kept,
            has=self.has(),
        )

    def has(self) -> Has:
        names = self.index.names()
        recorded = self.index.connection().execute(
            "SELECT EXISTS (SELECT 1 FROM token_rows), EXISTS (SELECT 1 FROM rows WHERE correct IS NOT NULL), "
            "EXISTS (SELECT 1 FROM rows WHERE staleness IS NOT NULL)"
        )
        tokens, correct, staleness = map(bool, recorded.fetchone())
        return Has(
            tokens=tokens,
            correct=correct,
            staleness=staleness,
            components=names["component"],
            rescored=names["rescored"],
            results=self.is_evaluation,
        )


class Runs:
    """The runs of some folders: each is a run, or holds runs. New ones are found while it lasts."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Raises UserError for a folder without a run."""
        self._folders = [Path(folder).expanduser().resolve() for folder in folders]
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()
        for folder in self._folders:
            if not _runs_in(folder):
                there = (
                    "there is no such folder" if not folder.is_dir() else "it has none of these, nor has a folder in it"
                )
                raise UserError(
                    f"no run in {folder}: a run folder has config.yaml, metrics.jsonl or samples.jsonl; {there}"
                )

    def all(self) -> list[Run]:
        with self._lock:
            for path in (path for folder in self._folders for path in _runs_in(folder)):
                if path not in self._runs:
                    self._runs[path] = Run(self._free(path.name or "run"), path)
            return list(self._runs.values())

    def _free(self, name: str) -> str:
        taken = {run.id for run in self._runs.values()}
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        return next(free for free in names if free not in taken)

    def get(self, run_id: str) -> Run:
        """Its index may lag behind a long file. Raises NotThereError."""
        for run in self.all():
            if run.id == run_id:
                return run
        raise NotThereError(f"no run {run_id!r}; there are {', '.join(run.id for run in self.all())}")

    def listed(self) -> RunList:
        """One that cannot be read hides no other."""
        infos = []
        for run in self.all():
            try:
                run.index.follow(LISTING_SECONDS)
                infos.append(run.info())
            except (OSError, sqlite3.Error) as error:
                infos.append(_unreadable(run, error))
        return RunList(rlkit=rlkit.__version__, runs=infos)


def _unreadable(run: Run, error: Exception) -> RunInfo:
    nothing = Has(tokens=False, rescored=[], correct=False, staleness=False, components=[], results=False)
    return RunInfo(
        id=run.id, path=str(run.path), kind="training", state="silent", state_text=f"cannot be read: {error}",
        algorithm="", reward="", model="", data="", step=0, total_steps=None, began=None, updated=None, samples=0,
        kept_groups=0, has=nothing,
    )  # fmt: skip


def _runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run; else the runs in it, and those one level below."""
    if _is_run(folder):
        return [folder]
    if not folder.is_dir():
        return []
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [run for child in children for run in ([child] if _is_run(child) else _runs_below(child))]


def _runs_below(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if _is_run(child))
    except OSError:
        return []


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", "samples.jsonl", "results.json"))


def _locked(lock: Path) -> bool:
    """Whether a process of this machine holds it. Asking the lock itself could refuse it to a run that begins."""
    try:
        inode = str(lock.stat().st_ino)
        held = LOCKS.read_text().splitlines()
    except OSError:
        return False
    return any(
        "FLOCK" in line and line.split()[5].rpartition(":")[2] == inode for line in held if len(line.split()) > 5
    )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _short(target: Any) -> str:
    """`rewards.verifiers.math.MathReward` -> `MathReward`."""
    return str(target or "").rpartition(".")[2]
