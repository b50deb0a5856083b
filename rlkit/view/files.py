"""Files of a run folder that people read: logs and what describes the run. Paths come from the list alone."""

from __future__ import annotations

from pathlib import Path

from rlkit.view.asked import AboutRun, LogAsked
from rlkit.view.runs import NotThereError, Run
from rlkit.view.schema import FileInfo, FilesResult, LogResult

NAMES = ("config.yaml", "summary.json", "results.json")


def files(run: Run, asked: AboutRun) -> FilesResult:
    del asked
    found = []
    for path, file in _listed(run).items():
        status = file.stat()
        found.append(FileInfo(path=path, bytes=status.st_size, modified=status.st_mtime))
    return FilesResult(files=found)


def log(run: Run, asked: LogAsked) -> LogResult:
    """The last bytes of a file. Raises NotThereError for a path that is not listed."""
    file = _listed(run).get(asked.path)
    if file is None:
        raise NotThereError(f"path={asked.path}: not a file that /api/files lists for run {run.id!r}")
    with file.open("rb") as stream:
        size = file.stat().st_size
        start = max(0, size - asked.tail_bytes)
        stream.seek(start)
        text = stream.read(asked.tail_bytes).decode("utf-8", "replace")
    return LogResult(path=asked.path, text=text, from_=start, bytes=size)


def _listed(run: Run) -> dict[str, Path]:
    """Regular files only: a link could lead out of the folder."""
    candidates = [run.path / name for name in NAMES]
    candidates += [file for file in sorted((run.path / "logs").glob("*")) if file.name != "lock"]
    return {str(file.relative_to(run.path)): file for file in candidates if file.is_file() and not file.is_symlink()}
