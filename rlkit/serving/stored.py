"""Where groups lie in Ray's object store: tokens are put there once, by who samples them, and then referred to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlkit.experience import Group


async def groups_in(batch: Any) -> list[Group]:
    """`batch`: a list of groups, or a reference to one."""
    groups: list[Group] = batch if isinstance(batch, list) else await batch
    return groups


class Stored:
    """References by group, of the groups that a step may still ask about."""

    def __init__(self) -> None:
        self._references: dict[str, Any] = {}

    def add(self, groups: Iterable[Group], batch: Any) -> None:
        """`batch`: a reference to a list with all of them, and perhaps others; lists are not in the store."""
        if not isinstance(batch, list):
            self._references |= dict.fromkeys((group.id for group in groups), batch)

    def references(self, groups: Sequence[Group]) -> list[Any]:
        """To lists that have all `groups` among them, as they were sampled: their scores may be others.

        Puts there what is not: groups of a checkpoint, and recorded ones.
        """
        absent = [group for group in groups if group.id not in self._references]
        if absent:
            import ray

            self.add(absent, ray.put(absent))
        return list(dict.fromkeys(self._references[group.id] for group in groups))

    def forget(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self._references.pop(group.id, None)
