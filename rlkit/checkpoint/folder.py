"""A checkpoint on disk: written to a partial folder, synced, sealed with a manifest and renamed; then old ones are
pruned.

`step_NNNNNN` is always complete; an interrupted write leaves `.step_NNNNNN.partial`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.experience import UserError

if TYPE_CHECKING:
    from rlkit.weights.tensor_file import WrittenFile

FORMAT = 1
MANIFEST, RUN_STATE = "manifest.json", "run.json"
RUN_CONFIG = "run.yaml"
"""The configuration of the run that wrote it, for `--config`. Older checkpoints have none."""
CHUNK = 2**22


class BadCheckpointError(UserError):
    """A folder is not a complete checkpoint; the message says why."""


@dataclass(frozen=True)
class Sealed:
    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def run_state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.path / RUN_STATE).read_text(encoding="utf-8"))
        return state


class DiskFullError(UserError): ...


def stage(checkpoints: Path, step: int, needed: int = 0) -> Path:
    """Create an empty folder for the checkpoint of `step`, and remove the remains of interrupted writes.

    Raises DiskFullError if there is no room for `needed` bytes.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_partial(checkpoints)
    if needed > shutil.disk_usage(checkpoints).free:
        raise disk_full(checkpoints, step, needed)
    folder = checkpoints / f".step_{step:06d}.partial"
    folder.mkdir()
    return folder


def disk_full(checkpoints: Path, step: int, needed: int) -> DiskFullError:
    free = shutil.disk_usage(checkpoints).free
    return DiskFullError(
        f"no room for the checkpoint of step {step} in {checkpoints}: it needs {needed / 2**30:.3g} GiB "
        f"({needed} bytes), but only {free / 2**30:.3g} GiB ({free} bytes) are free. Free some space there, or lower "
        "trainer.keep_checkpoints, or move the run's folder to a larger disk; then start the same command with "
        "resume=auto"
    )


SAID_BY_LIBRARIES = ("No space left on device", "iostream error", "PytorchStreamWriter failed", "unexpected pos")
"""Messages of safetensors, and of torch.save, which gives no reason."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full, also if an actor's error says so, whose cause Ray keeps in `cause`."""
    errors = [error, getattr(error, "cause", None)]
    return any(getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for one in errors) or any(
        words in str(one) for one in errors for words in SAID_BY_LIBRARIES
    )


def remove_partial(checkpoints: Path) -> None:
    """Remove the remains of interrupted writes. A checkpoint is put back if its replacement did not take its place."""
    for leftover in checkpoints.glob(".step_*"):
        place = checkpoints / leftover.stem[1:]
        if leftover.suffix == ".replaced" and not place.exists():
            leftover.rename(place)
        else:
            shutil.rmtree(leftover)


def seal(
    staged: Path, about: Mapping[str, Any], required: Sequence[str] = (), written: Sequence[WrittenFile] = ()
) -> Sealed:
    """Sync the files, write the manifest (`about`, sizes, hashes) and rename the folder.

    `written` are files that were hashed while they were written; the others are read. Raises BadCheckpointError if a
    required file is missing or a written one has a different size.
    """
    hashed = {file.path: file for file in written}
    absent = [
        name
        for name in [*required, *(str(path.relative_to(staged)) for path in hashed)]
        if not (staged / name).is_file()
    ]
    if absent:
        raise BadCheckpointError(
            f"{', '.join(absent)} did not arrive in {staged}: with several nodes, run_dir must be on a file "
            "system that all of them share"
        )
    files = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        size = path.stat().st_size
        if path in hashed and size != hashed[path].bytes:
            raise BadCheckpointError(f"{path} has {size} bytes; {hashed[path].bytes} were written")
        _sync(path)
        digest = hashed[path].blake2b if path in hashed else _digest(path)
        files[str(path.relative_to(staged))] = {"bytes": size, "blake2b": digest}
    manifest = {"format": FORMAT, **about, "files": files}
    with (staged / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    for folder in [*(path for path in staged.rglob("*") if path.is_dir()), staged]:
        _sync(folder)
    final = staged.parent / f"step_{int(about['step']):06d}"
    if final.exists():  # left by a run that was resumed from an earlier step
        doomed = staged.parent / f".{final.name}.replaced"
        final.rename(doomed)
        staged.rename(final)
        shutil.rmtree(doomed)
    else:
        staged.rename(final)
    _sync(final.parent)
    return Sealed(final, manifest)


def open_checkpoint(folder: Path) -> Sealed:
    """Open a checkpoint, checking every byte against its manifest. Raises BadCheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpointError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise BadCheckpointError(f"its {MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadCheckpointError(f"its {MANIFEST} is not in format {FORMAT}")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise BadCheckpointError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise BadCheckpointError(f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}")
        if _digest(file) != expected["blake2b"]:
            raise BadCheckpointError(f"{name} is damaged: its hash differs from the manifest's")
    return Sealed(folder, manifest)


def sealed_folders(checkpoints: Path) -> list[Path]:
    """Folders named like a checkpoint, newest first; not checked."""
    folders = [path for path in checkpoints.glob("step_*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: -int(path.name[5:]))


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Rename checkpoints of later steps to `abandoned_step_NNNNNN`, so that they do not outlive the new ones."""
    for folder in sealed_folders(checkpoints):
        if int(folder.name[5:]) > step:
            aside = folder.with_name(f"abandoned_{folder.name}")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Remove all checkpoints but the newest `keep` and the best by the manifest's `best` (the earliest if equal);
    return the removed ones."""
    folders = sealed_folders(checkpoints)
    values = {}
    for folder in folders:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not judged here, but never the best
        best = manifest.get("best")
        if best is not None and math.isfinite(best):
            values[folder] = float(best)
    best_first = sorted(values, key=lambda folder: (-values[folder], int(folder.name[5:])))
    kept = {*folders[:keep], *best_first[:1]}
    gone = [folder for folder in folders if folder not in kept]
    for folder in gone:
        doomed = folder.with_name(f".{folder.name}.pruned")
        folder.rename(doomed)  # so that no checkpoint's name ever stands for half a checkpoint
        shutil.rmtree(doomed)
    return gone


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Sync a file or a folder, whichever process wrote it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
