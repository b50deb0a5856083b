"""Run folders in the viewer: what each run is, its state, and its human-readable files."""

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
from pydantic import Field

import rlkit
from rlkit.experience import UserError
from rlkit.tracking.progress import duration
from rlkit.view.index import SampleIndex, file_state
from rlkit.view.metrics import Metrics
from rlkit.view.rows import parsed, whole
from rlkit.view.schema import AboutRun, FileInfo, FilesResult, Has, LogResult, Results, RunInfo, RunList

State = Literal["running", "ended", "silent"]
T = TypeVar("T")
SILENT_SECONDS = 120.0
"""A run is silent if no process on this machine holds its lock and no line was added for this long or ten steps."""
LISTING_SECONDS = 0.1
"""How long a list of runs waits for the index of each run."""
LOCKS = Path("/proc/locks")


class NotThereError(UserError):
    """A run, row or file does not exist (any more); the message names it."""


class Run:
    """One run folder, read-only."""

    def __init__(self, run_id: str, path: Path) -> None:
        self.id, self.path = run_id, path
        self._remembered: dict[str, tuple[object, Any]] = {}

    @cached_property
    def index(self) -> SampleIndex:
        return SampleIndex(self.path)

    @cached_property
    def _metrics(self) -> Metrics:
        return Metrics(self.path)

    @property
    def metrics(self) -> Metrics:
        """The run's metrics, up to date."""
        self._metrics.follow()
        return self._metrics

    def _kept(self, name: str, state: object, make: Callable[[], T]) -> T:
        """Return the cached result of `make` as long as the state is the same."""
        known = self._remembered.get(name)
        if known is None or known[0] != state:
            known = self._remembered[name] = (state, make())
        result: T = known[1]
        return result

    def remembered(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of a slow `make`, cached until the run or its index changes."""
        return self._kept(name, (self.stamp(), self.index.all("SELECT value FROM meta ORDER BY key")), make)

    def stamp(self) -> list[object]:
        """Return a value that changes whenever the run grows, is truncated, or ends."""
        files = [self.path / name for name in ("metrics.jsonl", "samples.jsonl", "summary.json")]
        return [file_state(file) for file in (*files, *sorted(self.path.glob("rescored/*.jsonl")))]

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as plain data; empty if there is none."""
        return self._kept("config", file_state(self.path / "config.yaml"), self._config)

    def _config(self) -> dict[str, Any]:
        try:
            text = (self.path / "config.yaml").read_text(encoding="utf-8")
            loaded = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def option(self, key: str, default: Any = None) -> Any:
        """Return the value at a dotted key of config.yaml."""
        value: Any = self.config
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return value

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the content of summary.json or results.json; None while there is none."""
        try:
            return parsed((self.path / name).read_bytes())
        except OSError:
            return None

    def state(self) -> tuple[State, str]:
        """Return the state, and its description."""
        metrics, total, summary = self.metrics, self.total_steps, self.read("summary.json")
        of = f"{metrics.step} of {total}" if total else f"{metrics.step}"
        if summary is not None:
            why = f" ({summary['ended']})" if summary.get("ended") else ""
            return "ended", f"ended after step {of}{why}" if metrics.step else f"ended{why}"
        states = [file_state(self.path / name) for name in ("metrics.jsonl", "samples.jsonl")]
        touched = max((state[2] / 1e9 for state in states if state), default=0.0)
        quiet = time.time() - max(touched, metrics.updated or 0.0)
        patience = max(SILENT_SECONDS, 10 * (self.seconds_per_step() or 0.0))
        if _locked(self.path / "logs" / "lock") or quiet < patience:
            return "running", f"running: step {of}"
        last = "; logs/driver.log has its last words" if (self.path / "logs" / "driver.log").exists() else ""
        return "silent", f"silent for {duration(quiet)} after step {of}, without a summary: killed or crashed{last}"

    @property
    def total_steps(self) -> int | None:
        return whole(self.option("trainer.total_steps"))

    @property
    def is_evaluation(self) -> bool:
        return (self.path / "results.json").exists()

    def seconds_per_step(self) -> float | None:
        """The median of the last twenty steps."""
        seconds = sorted(value for _, value in self._metrics.training.points("time/step")[-20:])
        return seconds[len(seconds) // 2] if seconds else None

    def info(self) -> RunInfo:
        state, words = self.state()
        metrics = self._metrics
        samples, groups, tokens, correct, staleness = self.remembered("recorded", self._recorded)
        names = self.index.names()
        return RunInfo(
            id=self.id,
            path=str(self.path),
            kind="evaluation" if self.is_evaluation else "training",
            state=state,
            state_text=words,
            algorithm=_short(self.option("algorithm._target_")),
            reward=str(self.option("reward.function") or _short(self.option("reward._target_"))),
            model=str(self.option("model.path", "")),
            data=str(self.option("data.path") or _short(self.option("data._target_"))),
            step=metrics.step,
            total_steps=self.total_steps,
            began=metrics.began,
            updated=metrics.updated,
            samples=samples,
            kept_groups=groups,
            has=Has(
                tokens=bool(tokens),
                correct=bool(correct),
                staleness=bool(staleness),
                components=list(names["component"]),
                rescored=list(names["rescored"]),
                results=self.is_evaluation,
            ),
        )

    def _recorded(self) -> tuple[int, int, int, int, int]:
        row: tuple[int, int, int, int, int] = self.index.all(
            "SELECT (SELECT count(*) FROM rows), "
            "(SELECT count(*) FROM (SELECT DISTINCT step, group_id FROM rows WHERE dropped IS NULL)), "
            "EXISTS (SELECT 1 FROM token_rows), EXISTS (SELECT 1 FROM rows WHERE correct IS NOT NULL), "
            "EXISTS (SELECT 1 FROM rows WHERE staleness IS NOT NULL)"
        )[0]
        return row

    def files(self) -> dict[str, Path]:
        """Return path -> human-readable file. Regular files only: a link could lead out of the folder."""
        found = [self.path / name for name in ("config.yaml", "summary.json", "results.json")]
        found += [file for file in sorted((self.path / "logs").glob("*")) if file.name != "lock"]
        return {str(file.relative_to(self.path)): file for file in found if file.is_file() and not file.is_symlink()}


def files(run: Run) -> FilesResult:
    """List logs and the files that describe the run."""
    states = [(path, file.stat()) for path, file in run.files().items()]
    return FilesResult(files=[FileInfo(path=path, bytes=s.st_size, modified=s.st_mtime) for path, s in states])


class LogAsked(AboutRun):
    path: str
    """A path from /api/files."""
    tail_bytes: int = Field(default=65536, ge=1, le=2**22)


def log(run: Run, asked: LogAsked) -> LogResult:
    """Return the last bytes of a file. Raises NotThereError for a path that is not listed."""
    file = run.files().get(asked.path)
    if file is None:
        raise NotThereError(f"path={asked.path}: not a file that /api/files lists for run {run.id!r}")
    with file.open("rb") as stream:
        size = file.stat().st_size
        start = stream.seek(max(0, size - asked.tail_bytes))
        text = stream.read(asked.tail_bytes).decode("utf-8", "replace")
    return LogResult(path=asked.path, text=text, from_=start, bytes=size)


def results(run: Run) -> Results:
    found = run.read("results.json")
    if found is None:
        raise NotThereError(f"run {run.id!r} has no results.json: it is not an evaluation, or has not ended")
    return Results(found)


class Runs:
    """The runs in some folders, each of which is a run or holds runs. New runs are found later, and runs whose folders
    are removed are dropped."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Raises UserError for a folder without a run."""
        self._folders = [Path(folder).expanduser().resolve() for folder in folders]
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()
        for folder in self._folders:
            if not _runs_in(folder):
                there = "neither it nor a folder in it has one" if folder.is_dir() else "there is no such folder"
                raise UserError(
                    f"no run in {folder}: a run folder has metrics.jsonl, samples.jsonl or results.json; {there}"
                )

    def all(self) -> list[Run]:
        with self._lock:
            self._runs = {path: run for path, run in self._runs.items() if path.is_dir()}
            for path in (path for folder in self._folders for path in _runs_in(folder)):
                if path not in self._runs:
                    # A comma separates runs in addresses.
                    name, taken = path.name.replace(",", ";") or "run", {run.id for run in self._runs.values()}
                    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
                    self._runs[path] = Run(next(free for free in names if free not in taken), path)
            return list(self._runs.values())

    def get(self, run_id: str) -> Run:
        """Return a run, whose index may lag behind a long file. Raises NotThereError."""
        known = {run.id: run for run in self.all()}
        if run_id not in known:
            raise NotThereError(f"no run {run_id!r}; there are {', '.join(known) or 'none'}")
        return known[run_id]

    def listed(self) -> RunList:
        """Return all runs and their states. An unreadable run does not hide the others."""
        infos = []
        for run in self.all():
            try:
                run.index.follow(LISTING_SECONDS)
                infos.append(run.info())
            except (OSError, sqlite3.Error) as error:
                words = f"cannot be read: {error}"
                infos.append(RunInfo(id=run.id, path=str(run.path), state="silent", state_text=words))
        return RunList(rlkit=rlkit.__version__, runs=infos)


def _runs_in(folder: Path, levels: int = 2) -> list[Path]:
    """Return the folder itself if it is a run, else the runs in it and one level below."""
    if any((folder / name).is_file() for name in ("metrics.jsonl", "samples.jsonl", "results.json")):
        return [folder]
    if not levels:
        return []
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return []
    return [run for child in children for run in _runs_in(child, levels - 1)]


def _locked(lock: Path) -> bool:
    """Whether a process on this machine holds the lock. Trying to take it could block a run that is starting."""
    try:
        inode = str(lock.stat().st_ino)
        held = [line.split() for line in LOCKS.read_text().splitlines()]
    except OSError:
        return False
    return any("FLOCK" in line and len(line) > 5 and line[5].rpartition(":")[2] == inode for line in held)


def _short(target: Any) -> str:
    """`rewards.verifiers.math.MathReward` -> `MathReward`."""
    return str(target or "").rpartition(".")[2]
