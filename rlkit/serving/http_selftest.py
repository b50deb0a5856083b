"""The self-test of a served reward, and the name of what is served."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import rlkit
from rlkit.config.parts import import_part
from rlkit.embedded import PREFIX, model_folder
from rlkit.experience import Group, Message, Prompt, Sample
from rlkit.serving.results import ScoreReport

EDGE_BYTES = 2**20
"""Of large files the first and last so many bytes are looked at: other weights differ there."""


def first_group(target: str, options: Mapping[str, Any]) -> Group:
    """A group with whatever the reward says it needs: a right and a wrong answer to 6 times 7."""
    kind = import_part("reward", target)
    needs = kind.needs(kind.Config(**options))
    prompt = Prompt(
        id="self-test",
        messages=(Message("user", "What is 6 times 7?"),),
        token_ids=(1, 2, 3),
        references=("6 * 7 = 42\n#### 42",),
        answer="42",
        columns=dict.fromkeys(needs.columns, ""),
    )
    return Group("self-test", prompt, tuple(_sample(i, text) for i, text in enumerate(("#### 42", "#### 41"))))


def verdict(report: ScoreReport, seconds: float) -> dict[str, Any]:
    """What /health shows of it. Invalid scores are no failure: the group may lack what this reward looks for."""
    shown: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "samples": report.samples,
        "invalid": dict(report.examples),
    }
    if report.error:
        shown["error"] = report.error.strip().splitlines()[-1]
    return shown


def model_version(reward: Mapping[str, Any]) -> str:
    """A name that changes with the class, its options, rlkit's version and the content of model folders named."""
    digest = hashlib.sha256(rlkit.__version__.encode())
    digest.update(json.dumps(reward, sort_keys=True, default=str).encode())
    for folder in sorted(set(_folders(reward))):
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE_BYTES))
                stream.seek(max(0, file.stat().st_size - EDGE_BYTES))
                digest.update(stream.read(EDGE_BYTES))
    return f"{str(reward['_target_']).rpartition('.')[2]}-{digest.hexdigest()[:12]}"


def _folders(value: Any) -> Iterator[Path]:
    """Every model folder that a value of the configuration names."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _folders(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _folders(inner)
    elif isinstance(value, str) and (value.startswith(PREFIX) or "/" in value):
        folder = model_folder(value)
        try:
            found = (folder / "config.json").is_file()
        except OSError:  # no path: a text with a `/`, longer than a file's name may be
            found = False
        if found:
            yield folder


def _sample(index: int, text: str) -> Sample:
    tokens = len(text.split())
    return Sample(index, np.arange(tokens, dtype=np.int32), np.full(tokens, -0.1, np.float32), text, "stop", (0, 0), 0)
