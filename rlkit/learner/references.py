"""Log-probs of the reference policy on recorded responses: computed once, after which the reference is not needed."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlkit.experience import Group, Prompt, Sample, UserError
from rlkit.experience.types import FloatArray

KEY_BYTES = 16
PIECES, PIECE_BYTES = 1024, 4096
"""Pieces of each weights file, evenly spaced, that tell models apart: every large tensor contains some of them."""
SAVED_AT_ONCE = 64
"""Save the results after this many calls of `compute`."""
Compute = Callable[[Sequence[Group]], Awaitable[Sequence[FloatArray]]]
"""Returns log-probs [T] of every sample, in order."""


class ReferenceError(UserError): ...


def fingerprint(folder: Path, *facts: object) -> bytes:
    """Hash of a model's weights, and of the facts on which its log-probs also depend."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=KEY_BYTES)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for place in np.linspace(0, max(0, size - PIECE_BYTES), PIECES, dtype=np.int64):
                stream.seek(int(place))
                digest.update(stream.read(PIECE_BYTES))
    return digest.digest()


class ReferenceCache:
    """Log-prob rows by a hash of model, prompt and response, in one safetensors file."""

    def __init__(self, file: Path, model: bytes) -> None:
        """`model`: its fingerprint. Raises ReferenceError if the file is not such a cache."""
        self.file, self.model = file, model
        self.rows = self._saved()

    def _saved(self) -> dict[bytes, FloatArray]:
        if not self.file.is_file():
            return {}
        try:
            saved = load_file(self.file)
            rows = np.split(saved["logprobs"], np.cumsum(saved["lengths"])[:-1])
            return dict(zip(map(bytes, saved["keys"]), rows, strict=True))
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ReferenceError(
                f"{self.file} is not a complete cache of reference log-probs ({error}): delete it, or name another "
                "file with learner.reference_cache"
            ) from error

    def of(self, groups: Sequence[Group]) -> list[FloatArray]:
        """Log-probs [T] of every sample, in order. Raises ReferenceError for a response that is not in the cache."""
        try:
            return [self.rows[self._key(group.prompt, sample)] for group in groups for sample in group.samples]
        except KeyError:
            raise ReferenceError(f"{self.file} has no reference log-probs for some of the data: delete it") from None

    async def fill(self, groups: Iterable[Group], compute: Compute, at_once: int) -> int:
        """Compute what is missing, `at_once` groups at a time, saving at intervals; return the number of samples
        computed."""
        missing: Iterator[Group] = (group for group in groups if not self._known(group))
        count = calls = 0
        while some := list(islice(missing, at_once)):
            keys = [self._key(group.prompt, sample) for group in some for sample in group.samples]
            self.rows.update(zip(keys, await compute(some), strict=True))
            count, calls = count + len(keys), calls + 1
            if calls % SAVED_AT_ONCE == 0:
                self._save()
        if calls % SAVED_AT_ONCE:
            self._save()
        return count

    def _known(self, group: Group) -> bool:
        return all(self._key(group.prompt, sample) in self.rows for sample in group.samples)

    def _key(self, prompt: Prompt, sample: Sample) -> bytes:
        digest = hashlib.blake2b(self.model, digest_size=KEY_BYTES)
        digest.update(np.asarray(prompt.token_ids, np.int32).tobytes())
        digest.update(b"|" + np.asarray(sample.token_ids, np.int32).tobytes())
        return digest.digest()

    def _save(self) -> None:
        """Write the file, keeping what another run has saved in the meantime."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = {**self._saved(), **self.rows}
        partial = self.file.with_name(f".{self.file.name}.{socket.gethostname()}.{os.getpid()}")
        rows = list(self.rows.values())
        save_file(
            {
                "keys": np.frombuffer(b"".join(self.rows), np.uint8).reshape(-1, KEY_BYTES),
                "lengths": np.array([len(row) for row in rows], np.int64),
                "logprobs": np.concatenate(rows).astype(np.float32),
            },
            partial,
        )
        partial.replace(self.file)
