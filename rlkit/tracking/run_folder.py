"""The folder of a run. Only this module writes config, metrics, samples and summary."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from rlkit.experience import UserError
from rlkit.experience.texts import encodable
from rlkit.tracking.writer import Writer


class RunFolderError(UserError):
    """The folder cannot hold this run; the message names it and the remedy."""


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `samples.jsonl`, `tokens/`, `diagnostics/`, `summary.json`, `tensorboard/`,
    `checkpoints/`, `logs/`."""

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        """Raises RunFolderError if the folder already holds a run, is not writable, or is in use.

        `resume`: it may hold a run, whose files `keep_only` then truncates.
        """
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.tokens = self.path / "tokens"
        self.tables = self.path / "diagnostics"
        self.summary = self.path / "summary.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        for file in (self.config, self.metrics, self.samples, self.summary):
            if not resume and file.exists():
                raise RunFolderError(
                    f"run_dir={self.path} already holds a run ({file.name} is there): name another folder, or move it."
                )
        self.sample_reader: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None
        """Called with the rows appended to samples.jsonl."""
        self._new = not any(path.exists() for path in self._of_a_run())
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._lock = (self.logs / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._metrics = self.metrics.open("a", encoding="utf-8")
            self.samples.touch()
        except BlockingIOError:
            raise RunFolderError(f"run_dir={self.path} is in use by a run that has not ended: end it first") from None
        except OSError as error:
            raise RunFolderError(f"run_dir={self.path} cannot be written: {error.strerror or error}") from error
        self.writer = Writer(self.path)
        """Writes in the background while the run continues."""

    def _of_a_run(self) -> tuple[Path, ...]:
        return self.config, self.metrics, self.samples, self.summary, self.checkpoints

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """If an error occurs before anything is recorded, leave the folder free for another try. `logs/` stays, and so
        does anything from an earlier run."""
        try:
            yield
        except BaseException:
            self.writer.settle()
            recorded = any(file.stat().st_size for file in (self.metrics, self.samples))
            if self._new and not (recorded or self.summary.exists() or self.checkpoints.exists()):
                for file in (self.config, self.metrics, self.samples):
                    file.unlink(missing_ok=True)
            raise

    def policy(self, step: int) -> Path:
        """Return where the policy after `step` steps is saved, as a Hugging Face folder."""
        return self.checkpoints / f"step_{step:06d}" / "policy"

    def sizes(self) -> dict[str, int]:
        """Sync the growing files; return each one's size in bytes, by its path in the folder. Raises UnwrittenError."""
        self.writer.settle()
        files = self._growing()
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        return {str(file.relative_to(self.path)): file.stat().st_size for file in files}

    def _growing(self) -> list[Path]:
        """Return the files for metrics, samples and tables that exist."""
        return [file for file in (self.metrics, self.samples, *sorted(self.tables.glob("*.jsonl"))) if file.exists()]

    def keep_only(self, keep: Mapping[str, int], step: int = 0) -> None:
        """Truncate the growing files to these sizes (unnamed ones to 0), and remove the summary and the tokens of steps
        after `step`.

        Raises RunFolderError if a file is shorter.
        """
        self.summary.unlink(missing_ok=True)
        for file in self.tokens.glob("*step_*.parquet"):
            if file.name.startswith(".") or int(file.stem.rpartition("_")[2]) > step:
                file.unlink()
        for file in self._growing():
            size = keep.get(str(file.relative_to(self.path)), 0)
            if file.stat().st_size < size:
                raise RunFolderError(
                    f"{file} is shorter than when the checkpoint was made: it was edited. Name another run_dir and "
                    "resume=CHECKPOINT to continue there."
                )
            os.truncate(file, size)

    def write_config(self, text: str) -> None:
        write_atomically(self.config, text)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(json_text(record) + "\n")
        self._metrics.flush()

    def append_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        rows = list(records)
        text, size = "".join(json_text(record) + "\n" for record in rows), self.samples.stat().st_size
        try:
            with self.samples.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:  # a full disk: leave no half line to which the next one would be appended
            os.truncate(self.samples, size)
            raise
        if rows:
            self.sample_reader(rows)

    def append_table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `diagnostics/NAME.jsonl`."""
        self.tables.mkdir(exist_ok=True)
        with (self.tables / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json_text(row) + "\n" for row in rows))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.summary, json_text(summary, indent=2) + "\n")

    def close(self) -> None:
        """Close the folder, even if it raises UnwrittenError; may be called again."""
        with ExitStack() as closing:
            for each in (self._lock, self._metrics, self.writer):  # closed in reverse order
                closing.callback(each.close)
            self.writer.settle()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see either the whole old file or the whole new one, even after a crash."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def json_text(value: Any, indent: int | None = None) -> str:
    """Return standard JSON: non-finite numbers become the strings "NaN", "Infinity" and "-Infinity"."""
    try:
        return to_json(value, indent=indent, inf_nan_mode="strings", fallback=_plain).decode()
    except ValueError:  # half a character, or a type that is not JSON
        return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        if value.dtype.kind in "biu":  # token ids: no need to look at the elements
            return value.tolist()
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return encodable(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")
