"""Tracks groups in Ray's object store: tokens are put there once, by the worker that samples them, then referenced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlkit.experience import Group


async def groups_in(batch: Any) -> list[Group]:
    """Return the groups of a batch: a list of groups, or a reference to one."""
    groups: list[Group] = batch if isinstance(batch, list) else await batch
    return groups


class Stored:
    """References by group id, for the groups that a step may still need."""

    def __init__(self) -> None:
        self._references: dict[str, Any] = {}

    def add(self, groups: Iterable[Group], batch: Any) -> None:
        """Note where groups are. `batch`: a reference to a list with them, and perhaps others; a list is ignored."""
        if not isinstance(batch, list):
            self._references |= dict.fromkeys((group.id for group in groups), batch)

    def references(self, groups: Sequence[Group]) -> list[Any]:
        """Return references to lists that contain all `groups` as they were sampled: their scores may differ.

        Groups not in the store, from a checkpoint or recorded, are put there.
        """
        absent = [group for group in groups if group.id not in self._references]
        if absent:
            import ray

            self.add(absent, ray.put(absent))
        return list(dict.fromkeys(self._references[group.id] for group in groups))

    def forget(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self._references.pop(group.id, None)
