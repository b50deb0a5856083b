"""Packs the working folder into one archive. Ray's own selection neither lists the files nor limits their size."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rlkit.experience import UserError

MIB = 2**20
ANYWHERE = (
    *(".git", ".hg", ".svn", ".venv", "venv", "node_modules", "*.egg-info", ".cache", ".env", ".netrc"),
    *("__pycache__", "*.pyc", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints"),
    *(".tox", ".nox", ".idea", ".vscode", ".DS_Store"),
)
"""Environments, caches and secrets, excluded in any folder."""
AT_THE_TOP = ("runs", "outputs", "wandb", "mlruns", "build", "dist")
"""Outputs, excluded at the top; further down these names may be code."""
SHOWN = 5


class UploadError(UserError): ...


@dataclass(frozen=True)
class Upload:
    folder: Path
    files: dict[str, int]
    """Path relative to the folder, with `/` -> bytes."""
    too_large: dict[str, int]
    """Files left out for their size."""
    links: list[str]
    """Links to folders: left out with what is behind them. A link to a file is uploaded as that file."""

    def has(self, path: str) -> bool:
        """Return whether `path`, relative to the folder, is a file of the upload, or a folder with one."""
        name = os.path.normpath(path)  # as written: behind a link there is nothing in the archive
        return name in self.files or name == "." or any(file.startswith(f"{name}/") for file in self.files)

    def lines(self) -> list[str]:
        """Return lines for the screen: the size, the links left out, and the files left out for their size."""
        lines = [f"uploading {self.folder}: {len(self.files)} files, {_mib(sum(self.files.values()))}"]
        lines += [f"not uploaded: {name} (a link to a folder)" for name in self.links]
        for name, size in _largest(self.too_large):
            lines.append(f"not uploaded: {name} ({_mib(size)}, above submit.max_file_mib)")
        rest = len(self.too_large) - SHOWN
        return [*lines, f"not uploaded: {rest} more files above submit.max_file_mib"] if rest > 0 else lines


def collect(folder: Path, exclude: Sequence[str], max_file_mib: float, max_upload_mib: float) -> Upload:
    """Choose the files to upload. Raises UploadError if there is too much or nothing."""
    patterns = (*ANYWHERE, *(pattern.rstrip("/") for pattern in exclude))
    names = {name for name in _candidates(folder, patterns) if not _is_excluded(name, patterns)}
    parents = (name.removesuffix("metrics.jsonl") for name in names if name.endswith("/metrics.jsonl"))
    run_folders = tuple(parent for parent in parents if f"{parent}config.yaml" in names)
    names = {name for name in names if not name.startswith(run_folders)}
    links = sorted(name for name in names if (folder / name).is_symlink() and (folder / name).is_dir())
    names = {name for name in names if (folder / name).is_file()}
    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    too_large = {name: size for name, size in sizes.items() if size > max_file_mib * MIB}
    files = {name: size for name, size in sizes.items() if name not in too_large}
    if not files:
        raise UploadError(
            f"{folder} has no file to upload: run this in your project's folder, or submit.code=installed"
        )
    total = sum(files.values())
    if total > max_upload_mib * MIB:
        largest = "".join(f"\n    {_mib(size):>11}  {name}" for name, size in _largest(files))
        raise UploadError(
            f"{folder} has {_mib(total)} to upload in {len(files)} files, more than "
            f"submit.max_upload_mib={max_upload_mib:g}. The largest:{largest}\n"
            "    Leave out what the job does not need: submit.exclude=[FOLDER,'\"*.bin\"'], or .gitignore. Models and "
            "data belong on storage that the cluster sees, named by absolute paths."
        )
    return Upload(folder, files, too_large, links)


def pack(upload: Upload | None, archive: Path, more: Mapping[str, Path]) -> None:
    """Pack the files. Equal files give equal bytes, so that Ray recognises a package that it already has.

    `more` maps names in the archive to further files.
    """
    sources = {} if upload is None else {name: upload.folder / name for name in upload.files}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, source in sorted({**sources, **more}.items()):
            entry = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (source.stat().st_mode & 0o777) << 16
            file.writestr(entry, source.read_bytes())


def _candidates(folder: Path, patterns: Sequence[str]) -> Iterator[str]:
    """Yield relative paths of files and links: in a git checkout those that git does not ignore, elsewhere all outside
    excluded folders."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout
        for root, folders, names in os.walk(folder):
            parent = Path(root).relative_to(folder)
            folders[:] = [
                name
                for name in folders
                if not _is_excluded((parent / name).as_posix(), patterns)
                and not (folder / parent / name / "pyvenv.cfg").exists()
            ]
            links = [name for name in folders if (folder / parent / name).is_symlink()]
            yield from ((parent / name).as_posix() for name in (*names, *links))
        return
    environments = {file.parent for file in folder.glob("*/pyvenv.cfg")}
    for name in os.fsdecode(listing).split("\0"):
        path = folder / name
        if not name or environments & set(path.parents):
            continue
        if (path / ".git").exists() and not path.is_symlink():  # a submodule or other checkout, for git a single name
            yield from (f"{name.rstrip('/')}/{own}" for own in _candidates(path, patterns))
        else:
            yield name


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the path, a folder above it, or one of their names."""
    steps = name.split("/")
    if steps[0] in AT_THE_TOP:
        return True
    paths = ["/".join(steps[: end + 1]) for end in range(len(steps))]
    return any(fnmatch(text, pattern) for pattern in patterns for text in (*steps, *paths))


def _largest(files: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(files.items(), key=lambda item: -item[1])[:SHOWN]


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size >= MIB / 10 else f"{size / 1024:.0f} KiB"
