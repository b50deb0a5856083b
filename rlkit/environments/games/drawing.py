"""Tasks drawn by a seed; a hash of what a task is about decides whether it is held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from pydantic import Field

from rlkit.environments.base import EnvironmentConfig

Split = Literal["train", "heldout"]
T = TypeVar("T")
_HELDOUT_BUCKETS = 8


class DrawnConfig(EnvironmentConfig):
    train_tasks: int = Field(default=2048, ge=1)
    """Tasks to train on."""
    heldout_tasks: int = Field(default=256, ge=1)
    """Tasks used only for evaluation."""

    def tasks_of(self, split: Split) -> int:
        return self.train_tasks if split == "train" else self.heldout_tasks


def of_split(tasks: Iterable[T], key: Callable[[T], str], split: Split) -> list[T]:
    """Return the tasks of a split, each key once. No key is in both splits, whatever the seed."""
    return [task for name, task in {key(task): task for task in tasks}.items() if _split_of(name) == split]


def drawn(draw: Callable[[random.Random], T], key: Callable[[T], str], split: Split, seed: int, count: int) -> list[T]:
    """Draw `count` tasks of a split with different keys, or as many as appear in 100 draws for each."""
    rng = random.Random(f"{seed}/{split}")
    tasks: dict[str, T] = {}
    for _ in range(100 * count):
        if len(tasks) == count:
            break
        task = draw(rng)
        name = key(task)
        if _split_of(name) == split:
            tasks[name] = task
    return list(tasks.values())


def _split_of(key: str) -> Split:
    return "heldout" if hashlib.sha256(key.encode()).digest()[0] % _HELDOUT_BUCKETS == 0 else "train"
