"""The experience buffer as a pure state machine: no Ray, no clock, no threads.

Producers reserve slots before they sample (`reserve`) and hand in scored groups (`add`); the learner takes whole steps
(`take`) and announces new policy versions (`advance`) as it publishes them.

A slot belongs to a training step. With a staleness bound s, steps version + 1 to version + 1 + s may be sampled for.
The first of them that lacks groups gets the next slot, so replacements for rejected groups come first and are sampled
with the newest weights. A step is trained once its n groups are complete, and not before: no group becomes too stale,
none is dropped, and no fast group takes the slot of a slow one. A group that was started with policy version v is
trained with weights of version v + s at the latest. Which groups a step trains does not depend on timing, unless
filters reject some and s > 0: the replacement's prompt is then whichever is next at the moment of the rejection.

s = 0 is synchronous training. With it, more groups than a step lacks may be requested (`oversample`): once all are
judged, the step takes those requested first and drops the others.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlkit.experience.errors import UserError
from rlkit.experience.filters import GroupFilter, verdict
from rlkit.experience.types import Group

NEARLY_ALL = 0.9
"""Share of a step's rejected groups that must have the same verdict for it to explain why nothing is left."""


class TooManyRejectedError(UserError):
    """Raised when the filters leave too little to train on; the message names them."""


class DataSolvedError(TooManyRejectedError):
    """Raised when the policy answers nearly every problem correctly: the good end of a run."""


@dataclass(frozen=True)
class BufferStats:
    version: int
    ready: int
    in_flight: int
    rejected: Mapping[str, int]
    """Rejected groups since the start, by rule."""
    verdicts: Mapping[str, int] = field(default_factory=dict)
    """Rejected groups since the start, by verdict: `all_right`, `all_wrong` or `mixed`."""
    surplus: int = 0
    """Groups dropped since the start because their step had more than it takes."""


def with_surplus(groups: int, oversample: float) -> int:
    """Return how many groups to request when `groups` are missing."""
    return math.ceil(groups * oversample - 1e-9)  # 10 x 1.1 is 11, whatever floating point says


@dataclass
class _Judged:
    """What the filters have made of a step's groups so far."""

    groups: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By rule."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Of those rejected."""

    @property
    def share(self) -> float:
        return self.rejected.total() / self.groups

    def failure(self, max_rejected_share: float) -> TooManyRejectedError:
        """Return the error that says why too many were rejected."""
        rejected = self.rejected.total()
        most, count = self.verdicts.most_common(1)[0]
        rules = ", ".join(f"buffer.{rule}: {times}" for rule, times in self.rejected.most_common())
        counted = (
            f"{rejected} of {self.groups} groups of one step were rejected ({rules}), more than "
            f"buffer.max_rejected_share={max_rejected_share:g}: "
        )
        explained = most if count >= NEARLY_ALL * rejected else "mixed"
        if explained == "all_right":
            return DataSolvedError(
                f"the data are solved: {counted}in {count} of them every response is right, so nothing is left to "
                "learn from these problems"
            )
        if explained == "all_wrong":
            return TooManyRejectedError(
                f"{counted}in {count} of them every response is wrong, so nothing can be learnt: use easier problems, "
                "start from a better policy (python -m rlkit.sft), or check whether the reward can read the answers: "
                "without the filter (buffer.drop_equal_rewards=false, ...) samples.jsonl shows them"
            )
        seen = ", ".join(f"{kind.replace('_', ' ')}: {times}" for kind, times in sorted(self.verdicts.items()))
        return TooManyRejectedError(
            f"{counted}the problems are too easy or too hard for this policy ({seen}), or a bound is wrong"
        )


class ExperienceBuffer:
    def __init__(
        self,
        groups_per_step: int,
        max_staleness: int,
        rejected_by: GroupFilter,
        max_rejected_share: float,
        oversample: float = 1.0,
        last_step: int = sys.maxsize,
    ) -> None:
        """`oversample` may exceed 1 only if `max_staleness` is 0. Nothing is sampled for steps after `last_step`."""
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.oversample = oversample
        self.last_step = last_step
        self._rejected_by = rejected_by
        self._max_rejected_share = max_rejected_share
        self._ready: defaultdict[int, list[Group]] = defaultdict(list)
        """Accepted groups by step."""
        self._in_flight: Counter[int] = Counter()
        """Number of groups by step."""
        self._version = 0
        self._taken_step = 0
        """The last step that the learner took."""
        self._rejected: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._judged: defaultdict[int, _Judged] = defaultdict(_Judged)
        """By step, from the next one on."""
        self._failures: dict[int, TooManyRejectedError] = {}
        """By step, for which nothing more is sampled."""
        self._surplus = 0
        self._untrained: list[Group] = []
        """Groups rejected or dropped as surplus since the last `take_rejected`."""
        self._taken: list[tuple[str, str]] = []
        """(group, prompt) ids of the groups, surplus included, of a step begun since the last version."""

    def reserve(self, limit: int) -> list[int]:
        """Return the steps of the groups, at most `limit`, that a producer may start now; they are then in flight."""
        places: list[int] = []
        last = min(self._version + self.max_staleness + 1, self.last_step)
        for step in range(max(self._version, self._taken_step) + 1, last + 1):
            if step in self._failures:
                break
            lacking = self.groups_per_step - len(self._ready[step]) - self._in_flight[step]
            count = max(0, min(limit - len(places), with_surplus(lacking, self.oversample)))
            self._in_flight[step] += count
            places += [step] * count
        return places

    def add(self, group: Group) -> bool:
        """Hand in a scored group, whose step is that of its slot. Returns False if a filter rejects it.

        When the filters reject more than the configured share of a step's groups, `take` raises (checked only after
        twice the number of groups needed, so that one unlucky draw does not end a run).
        """
        if not self._in_flight[group.step]:
            raise ValueError(f"group {group.id} was handed in for step {group.step}, which has none in flight")
        self._in_flight[group.step] -= 1
        judged = self._judged[group.step]
        judged.groups += 1
        rule = self._rejected_by(group)
        if rule is not None:
            self._rejected[rule] += 1
            self._verdicts[verdict(group)] += 1
            judged.rejected[rule] += 1
            judged.verdicts[verdict(group)] += 1
            self._untrained.append(group)
            if judged.groups >= 2 * self.groups_per_step and judged.share > self._max_rejected_share:
                self._failures[group.step] = judged.failure(self._max_rejected_share)
            return False
        self._ready[group.step].append(group)
        return True

    def take(self) -> list[Group] | None:
        """Return the next step's groups in the order requested, not in order of scoring; None if some are missing.

        Raises TooManyRejectedError when the filters have rejected too many of them. Earlier steps are trained before.
        """
        step = self._version + 1
        if step in self._failures:
            raise self._failures[step]
        if len(self._ready[step]) < self.groups_per_step or (self.oversample > 1 and self._in_flight[step]):
            return None
        ready = sorted(self._ready.pop(step), key=lambda group: group.id)
        taken, surplus = ready[: self.groups_per_step], ready[self.groups_per_step :]
        self._judged.pop(step, None)
        self._surplus += len(surplus)
        self._untrained += surplus
        self._taken_step = step
        self._taken = [(group.id, group.prompt.id) for group in ready]
        return taken

    def take_rejected(self) -> list[Group]:
        """Return the groups rejected or surplus since the last call, sorted by id: metrics cover all judged groups."""
        groups, self._untrained = self._untrained, []
        return sorted(groups, key=lambda group: group.id)

    def put_back(self) -> list[tuple[str, str]]:
        """Undo the step that began with the last version and will not be trained, for a checkpoint in mid-step.

        Returns the (group, prompt) ids of its groups, which must be requested again, even if `take` handed them out.
        With `oversample` these are all groups accepted for it: which are surplus is known only once all are judged.
        """
        taken, self._taken = self._taken, []
        if self.oversample > 1:
            taken += [(group.id, group.prompt.id) for group in self._ready.pop(self._version + 1, [])]
        self._taken_step = self._version
        self._version -= 1
        return taken

    def advance(self, version: int) -> None:
        """Note that weights of `version` are on their way. Raises ValueError if it does not follow the last version."""
        if version != self._version + 1:
            raise ValueError(f"the buffer is at policy version {self._version}, so version {version} cannot follow")
        self._version = version
        self._taken = []

    def stats(self) -> BufferStats:
        return BufferStats(
            self._version,
            sum(map(len, self._ready.values())),
            self._in_flight.total(),
            dict(self._rejected),
            dict(self._verdicts),
            self._surplus,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything except the groups in flight, which are requested again after a resume."""
        return {
            "ready": [group for step in sorted(self._ready) for group in self._ready[step]],
            "version": self._version,
            "taken_step": self._taken_step,
            "rejected": dict(self._rejected),
            "verdicts": dict(self._verdicts),
            "surplus": self._surplus,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._version = state["version"]
        ready = state["ready"]
        if "taken_step" not in state:  # before 0.5 slots had no step, and checkpoints were written after whole steps
            n = self.groups_per_step
            ready = [replace(group, step=self._version + 2 + i // n) for i, group in enumerate(ready)]
        self._taken_step = state.get("taken_step", self._version + 1)
        self._ready.clear()
        for group in ready:
            self._ready[group.step].append(group)
        self._rejected = Counter(state["rejected"])
        self._verdicts = Counter(state.get("verdicts", {}))  # checkpoints before 0.3 have none
        self._surplus = state.get("surplus", 0)
        self._in_flight.clear()
