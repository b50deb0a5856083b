"""`data=reasoning_gym`: the questions of a reasoning-gym data set, drawn with a seed.

They are drawn in a separate process with fixed hashes and global random numbers, on which some data sets depend.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pydantic import Field

from rlkit.data.base import BadRow, DataConfig, DataError, DataSource, Problem, Split
from rlkit.experience import Message
from rlkit.experience.extras import lacking
from rlkit.experience.section import Seed

COLUMN = "reasoning_gym"
"""Column of the problems: data set, its options, and the entry that the package judges by, as a Python literal. JSON
would change tuples and keys, and with them the scores of some data sets."""
PREVIEWED: dict[Split, int] = {"train": 8, "heldout": 2}
QUIET_SECONDS = 600
"""Drawing is given up after this long without a new question: some data sets' options cannot be satisfied."""
_HELDOUT_BUCKETS = 8
_CHUNK = 256
_FRUITLESS_CHUNKS = 4


class ReasoningGymConfig(DataConfig):
    name: str
    """A reasoning-gym data set: chain_sum, countdown, zebra_puzzles, ..."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the data set, as `reasoning_gym.create_dataset` takes them: {min_terms:2,max_terms:4}."""
    train_problems: int = Field(default=2048, ge=1)
    """Number of distinct training questions. Some data sets take a second or more for each."""
    heldout_problems: int = Field(default=256, ge=1)
    """Number of questions used only for evaluation, none of them for training."""
    problem_seed: Seed = 2026
    """Seed for drawing the questions. Separate from the run's `seed`, so that all runs share the held-out ones."""
    instructions: str = "Give the final answer alone between <answer> and </answer>."
    """Appended to every question; see reward.answer_in. Empty: nothing."""


class ReasoningGymSource(DataSource):
    """Questions of a reasoning-gym data set, for `reward=reasoning_gym` or `environment=reasoning_gym`."""

    Config = ReasoningGymConfig

    def check(self) -> list[str]:
        if missing := lacking("reasoning_gym"):
            return missing
        try:
            self.preview("train")
        except DataError as error:
            return [str(error)]
        return []

    def preview(self, split: Split) -> list[Problem]:
        return self._few[split]

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        return self._all[split], []

    def provides(self) -> frozenset[str]:
        try:
            answered = all(problem.answer is not None for problem in self.preview("train"))
        except DataError:
            answered = False
        return frozenset({COLUMN, "answer"} if answered else {COLUMN})

    @cached_property
    def _few(self) -> dict[Split, list[Problem]]:
        return self._drawn(PREVIEWED)

    @cached_property
    def _all(self) -> dict[Split, list[Problem]]:
        counts: dict[Split, int] = {"train": self.config.train_problems, "heldout": self.config.heldout_problems}
        problems = self._drawn(counts)
        for split, count in counts.items():
            if (came := len(problems[split])) < count:
                raise DataError(
                    f"data.name={self.config.name}: only {came} different {split} questions came up; ask for fewer "
                    f"than {count} (data.{split}_problems), or widen data.options"
                )
        return problems

    def _drawn(self, counts: Mapping[Split, int]) -> dict[Split, list[Problem]]:
        """Draw the questions of each split. Raises DataError."""
        config = self.config
        asked = {"name": config.name, "options": config.options, "seed": config.problem_seed, "counts": counts}
        asked["seconds"] = QUIET_SECONDS
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        with tempfile.TemporaryDirectory() as folder:  # some data sets write files to the working directory
            done = subprocess.run(
                [sys.executable, "-c", f"from {__name__} import main; main()"],
                input=json.dumps(asked),
                env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": paths},
                cwd=folder,
                capture_output=True,
                text=True,
            )
        if done.returncode == -signal.SIGALRM:
            raise DataError(
                f"data.name={config.name}: reasoning-gym has given no new question for {QUIET_SECONDS} s; change "
                "data.options, or choose another data set"
            )
        if done.returncode != 0:
            last = next(iter(done.stderr.strip().splitlines()[-1:]), "it ended without a message")
            raise DataError(f"data.name={config.name}: reasoning-gym cannot draw its questions: {last}")
        problems: dict[Split, list[Problem]] = {split: [] for split in counts}
        for line in done.stdout.splitlines():  # a literal contains no line ends
            split, entry = ast.literal_eval(line)
            problems[split].append(self._problem(entry))
        return problems

    def _problem(self, entry: Mapping[str, Any]) -> Problem:
        config = self.config
        asked = "\n\n".join(part for part in (entry["question"], config.instructions) if part)
        digest = hashlib.sha256(entry["question"].encode()).hexdigest()[:16]
        return Problem(
            id=f"{config.name}/{digest}",
            messages=(Message("user", asked),),
            answer=entry["answer"],
            columns={COLUMN: repr({"name": config.name, "options": config.options, "entry": entry})},
            origin=f"reasoning_gym:{config.name}",
        )


# -- in the process that draws -----------------------------------------------------------------------------------------


def main() -> None:
    """Print `(split, entry)`, one per line."""
    asked = json.load(sys.stdin)
    signal.alarm(asked["seconds"])  # which ends the process
    lines, sys.stdout = sys.stdout, sys.stderr  # some data sets print
    left: dict[Split, int] = asked["counts"]
    seen: set[str] = set()
    fruitless = 0
    for chunk in _chunks(asked["name"], asked["options"], asked["seed"]):
        before = len(seen)
        for entry in chunk:
            question = entry["question"]
            bucket = hashlib.sha256(question.encode()).digest()[0] % _HELDOUT_BUCKETS
            split: Split = "heldout" if bucket == 0 else "train"
            if question not in seen and left[split]:
                print(repr((split, _plain(dict(entry)))), file=lines)
                left[split] -= 1
            if question not in seen:
                signal.alarm(asked["seconds"])
            seen.add(question)
            if not any(left.values()):
                return
        fruitless = fruitless + 1 if len(seen) == before else 0
        if fruitless == _FRUITLESS_CHUNKS:
            return


def _chunks(name: str, options: Mapping[str, Any], seed: int) -> Iterator[Any]:
    """Yield chunks of the data set. An entry depends on seed + index."""
    import random

    import numpy as np
    import reasoning_gym

    while True:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield reasoning_gym.create_dataset(name, seed=seed % 2**31, size=_CHUNK, **options)
        seed += _CHUNK


def _plain(value: Any) -> Any:
    """Convert a value to types that `ast.literal_eval` reads."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(_plain(item) for item in value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
