"""Sends the output and logs of libraries to files instead of the screen."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class CapturedOutput:
    """While open, file descriptors 1 and 2 (also of child processes), log records and warnings go to a log file.

    `terminal` is the former standard output: only the console writes to it.
    """

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path

    def __enter__(self) -> CapturedOutput:
        _flush()
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._saved = (os.dup(1), os.dup(2))
        self.terminal: TextIO = os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace", buffering=1)
        _redirect(self._log_path)
        self._handler = logging.FileHandler(self._log_path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(_FORMAT))
        self._level = logging.getLogger().level
        logging.getLogger().addHandler(self._handler)
        logging.getLogger().setLevel(logging.INFO)
        logging.captureWarnings(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().setLevel(self._level)
        self._handler.close()
        _flush()
        self.terminal.close()
        for target, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, target)
            os.close(saved)


class ShowWarnings(logging.Handler):
    """Shows what rlkit's own modules log at level WARNING or above."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._show(record.getMessage())
        except Exception:  # a full disk must not stop the caller
            self.handleError(record)


def actor_logging(log_path: str | Path, level: int = logging.INFO) -> None:
    """Send an actor's prints, logs, warnings and crash stacks to `log_path` permanently; to be called first."""
    path = Path(log_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    _redirect(path)
    for stream in (sys.stdout, sys.stderr):
        # A killed process loses what it has buffered, and its last lines matter most.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    faulthandler.enable(file=2)


def _redirect(path: Path) -> None:
    # In append mode lines stay whole although several writers share the file.
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
