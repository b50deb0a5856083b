"""The experience buffer as a pure state machine: no Ray, no clock, no threads.

Producers ask for room before they sample (`reserve`) and hand in scored groups (`add`); the learner takes whole
batches (`take`) and announces new policy versions (`advance`).

With n groups per step and a staleness bound s, room is granted while
    accepted + in flight < (version + s + 1) * n,
so group number g (first in, first out) is trained at step g // n with weights at most s versions newer than the ones
it was sampled with, unless others overtake it while it is scored: what became too old is dropped and counted.
s = 0 is synchronous training. There more groups than a step lacks may be asked for (`oversample`): a step then takes
those asked for first, once all are judged, and the others are dropped.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlkit.experience.errors import UserError
from rlkit.experience.filters import GroupFilter, verdict
from rlkit.experience.types import Group

NEARLY_ALL = 0.9
"""Share of a step's rejected groups whose verdict explains why nothing is left."""


class TooManyRejectedError(UserError):
    """The filters leave too little to train on; the message names them."""


class DataSolvedError(TooManyRejectedError):
    """Because the policy answers nearly every problem rightly: the good end of a run."""


@dataclass(frozen=True)
class BufferStats:
    version: int
    ready: int
    in_flight: int
    dropped_stale: int
    rejected: Mapping[str, int]
    """By rule, since the start."""
    verdicts: Mapping[str, int] = field(default_factory=dict)
    """Rejected groups since the start, by `all_right`, `all_wrong` and `mixed`."""
    surplus: int = 0
    """Dropped since the start, because a step had more than it takes."""


def with_surplus(groups: int, oversample: float) -> int:
    """How many groups to ask for where so many are lacking."""
    return math.ceil(groups * oversample - 1e-9)  # 10 x 1.1 is 11, whatever floating point says


class ExperienceBuffer:
    def __init__(
        self,
        groups_per_step: int,
        max_staleness: int,
        rejected_by: GroupFilter,
        max_rejected_share: float,
        oversample: float = 1.0,
    ) -> None:
        """`oversample` above 1 is for `max_staleness` 0."""
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.oversample = oversample
        self._rejected_by = rejected_by
        self._max_rejected_share = max_rejected_share
        self._ready: deque[Group] = deque()
        self._in_flight = 0
        self._accepted = 0
        self._version = 0
        self._dropped_stale = 0
        self._rejected: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._judged_this_step = 0
        self._rejected_this_step: Counter[str] = Counter()
        self._surplus = 0
        self._untrained: list[Group] = []
        """Rejected, or surplus, since they were last taken."""
        self._taken: list[tuple[str, str]] = []
        """(group, prompt) ids of the groups taken since the last version, of a step that has begun, and of its surplus.
        """

    def reserve(self, limit: int) -> int:
        """How many groups a producer may start now, at most `limit`; they count as in flight from here on."""
        room = (self._version + self.max_staleness + 1) * self.groups_per_step - self._accepted - self._in_flight
        granted = max(0, min(limit, with_surplus(room, self.oversample)))
        self._in_flight += granted
        return granted

    def add(self, group: Group) -> bool:
        """Hand in a reserved, scored group. False if a filter rejected it.

        Raises TooManyRejectedError when this step's filters reject more than the configured share (judged only after
        twice the needed number of groups, so that one unlucky draw does not end a run).
        """
        if not self._in_flight:
            raise ValueError("a group was handed in that was not reserved: none is in flight")
        self._in_flight -= 1
        self._judged_this_step += 1
        rule = self._rejected_by(group)
        if rule is not None:
            self._rejected[rule] += 1
            self._rejected_this_step[rule] += 1
            self._verdicts[verdict(group)] += 1
            self._untrained.append(group)
            self._check_rejections()
            return False
        self._ready.append(group)
        self._accepted += 1
        return True

    def take(self) -> list[Group] | None:
        """The first `groups_per_step` groups, sorted by id; None if there are too few. Stale ones are dropped."""
        # Not only the first ones: a group that was scored slowly stands behind younger ones.
        fresh = [group for group in self._ready if self._version - group.policy_version <= self.max_staleness]
        stale = len(self._ready) - len(fresh)
        self._ready = deque(fresh)
        self._dropped_stale += stale
        self._accepted -= stale  # their places are free again, so that a producer can fill them
        if len(self._ready) < self.groups_per_step or (self.oversample > 1 and self._in_flight):
            return None
        self._judged_this_step = 0
        self._rejected_this_step.clear()
        surplus = self._drop_surplus() if self.oversample > 1 else []
        taken = [self._ready.popleft() for _ in range(self.groups_per_step)]
        self._taken = [(group.id, group.prompt.id) for group in (*taken, *surplus)]
        return sorted(taken, key=lambda group: group.id)  # in the order asked for, whoever was scored first

    def _drop_surplus(self) -> list[Group]:
        """Keep what a step takes: those asked for first, whoever was scored first."""
        ready = sorted(self._ready, key=lambda group: group.id)
        self._ready, surplus = deque(ready[: self.groups_per_step]), ready[self.groups_per_step :]
        self._accepted -= len(surplus)
        self._surplus += len(surplus)
        self._untrained += surplus
        return surplus

    def take_rejected(self) -> list[Group]:
        """Rejected, or surplus, since the last call, sorted by id: metrics are of all judged groups."""
        groups, self._untrained = self._untrained, []
        return sorted(groups, key=lambda group: group.id)

    def put_back(self) -> list[tuple[str, str]]:
        """Undo the step that began with the last version and will not be trained, for a checkpoint in its middle.

        Returns (group, prompt) ids of its groups, which must be asked for again: also of those on their way to whoever
        took them. With `oversample`, of all that were accepted for it: which are surplus is known when all are judged.
        """
        taken, self._taken = self._taken, []
        self._accepted -= min(len(taken), self.groups_per_step)
        if self.oversample > 1:
            taken += [(group.id, group.prompt.id) for group in self._ready]
            self._accepted -= len(self._ready)
            self._ready.clear()
        self._version -= 1
        return taken

    def advance(self, version: int) -> None:
        """Weights of `version` are published. Raises ValueError if it does not follow the last."""
        if version != self._version + 1:
            raise ValueError(f"the buffer is at policy version {self._version}, so version {version} cannot follow")
        self._version = version
        self._taken = []

    def stats(self) -> BufferStats:
        return BufferStats(
            self._version,
            len(self._ready),
            self._in_flight,
            self._dropped_stale,
            dict(self._rejected),
            dict(self._verdicts),
            self._surplus,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the groups in flight, which are requested again after a resume."""
        return {
            "ready": list(self._ready),
            "accepted": self._accepted,
            "version": self._version,
            "dropped_stale": self._dropped_stale,
            "rejected": dict(self._rejected),
            "verdicts": dict(self._verdicts),
            "surplus": self._surplus,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ready = deque(state["ready"])
        self._accepted = state["accepted"]
        self._version = state["version"]
        self._dropped_stale = state["dropped_stale"]
        self._rejected = Counter(state["rejected"])
        self._verdicts = Counter(state.get("verdicts", {}))  # checkpoints before 0.3 have none
        self._surplus = state.get("surplus", 0)
        self._in_flight = 0

    def _check_rejections(self) -> None:
        rejected, judged = self._rejected_this_step.total(), self._judged_this_step
        if judged < 2 * self.groups_per_step or rejected <= self._max_rejected_share * judged:
            return
        verdicts = Counter(verdict(group) for group in self._untrained)
        share, most = max((count / rejected, kind) for kind, count in verdicts.items())
        explained = most if share >= NEARLY_ALL else "mixed"
        rules = ", ".join(f"buffer.{rule}: {count}" for rule, count in self._rejected_this_step.most_common())
        counted = (
            f"{rejected} of {judged} groups of one step were rejected ({rules}), more than "
            f"buffer.max_rejected_share={self._max_rejected_share:g}: "
        )
        if explained == "all_right":
            raise DataSolvedError(
                f"the data are solved: {counted}in {verdicts['all_right']} of them every response is right, so nothing "
                "is left to learn from these problems"
            )
        if explained == "all_wrong":
            raise TooManyRejectedError(
                f"{counted}in {verdicts['all_wrong']} of them every response is wrong, so nothing can be learnt: take "
                "easier problems, begin with a better policy (python -m rlkit.sft), or see whether the reward can read "
                "the answers: without the filter (buffer.drop_equal_rewards=false, ...) samples.jsonl shows them"
            )
        seen = ", ".join(f"{kind.replace('_', ' ')}: {count}" for kind, count in sorted(verdicts.items()))
        raise TooManyRejectedError(
            f"{counted}the problems are too easy or too hard for this policy ({seen}), or a bound is wrong"
        )
