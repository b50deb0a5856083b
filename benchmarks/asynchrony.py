"""Compares asynchronous rollouts (the real producer, pool and buffer) with other schedules on a virtual clock.

    python benchmarks/asynchrony.py           # the table of docs/performance.md; --write puts it there, with a picture
    python benchmarks/asynchrony.py --quick   # for the gate

All schedules use the same response lengths and the same machine (benchmarks/simulation.py):

- `synchronous`: `trainer.max_staleness=0`.
- `one-step-off`: the next round is sampled while the last one trains, and finished before engines get new weights.
- `rlkit`: `trainer.max_staleness=k`.
- `best`: an ideal with the same order and bound. Samples move between engines at no cost, so that all run equally many,
  and all news arrives at once. It uses the fastest of several limits on running samples, but does not know lengths.
- `limit`: what no schedule with this order and bound can beat, even if it knows all lengths: every sample alone on an
  engine from the moment that the bound allows; engines always as full as possible; publishing during the update.
- `ready-first`: the learner takes whatever is ready and drops groups that have become older than k.

Prints the table and, as the last line, JSON. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from benchmarks.simulation import Case, Run, simulate
from rlkit.experience import Group
from rlkit.experience.buffer import BufferStats
from rlkit.experience.filters import BufferConfig
from rlkit.experience.waiting_buffer import WaitingBuffer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BOUNDS = (1, 2, 4)
SHARES_OF_PLACES = (0.25, 0.5, 0.75, 1.0)
"""Limits on running samples, from which the best schedule is chosen."""


def sampling_seconds(case: Case, lengths: Sequence[int]) -> float:
    """Return the time of one engine that gets all these responses at once."""
    waiting, running, decoded, seconds = deque(lengths), [], 0.0, 0.0
    while waiting or running:
        while waiting and len(running) < case.places:
            heapq.heappush(running, decoded + waiting.popleft())
        seconds += (running[0] - decoded) * case.token_seconds(len(running))
        decoded = heapq.heappop(running)
    return seconds


def in_rounds(case: Case, overlap: bool) -> float:
    """Return seconds per step if each round is distributed at its start; `overlap`: it is sampled during the update."""
    steps = []
    for step in range(case.uncounted, case.steps):
        groups = case.lengths[step * case.groups_per_step : (step + 1) * case.groups_per_step]
        sampling = max(sampling_seconds(case, groups[i :: case.engines].ravel()) for i in range(case.engines))
        sampling += case.reward_seconds
        update = case.update_seconds
        steps.append((max(sampling, update) if overlap else sampling + update) + case.publish_seconds)
    return float(np.mean(steps))


class Ideal:
    """All engines as one; samples run at the speed of an engine that has the mean number of samples."""

    def __init__(self, case: Case, places: float) -> None:
        self.case, self.places = case, int(places * case.engines)
        self.now = self.decoded = 0.0
        self.running: list[tuple[float, int, float]] = []
        """A heap: decoded tokens at its end, step, decoded tokens at its start."""
        self.left = dict.fromkeys(range(1, case.steps + case.staleness + 2), case.groups_per_step * case.samples)
        self.whole_at: dict[int, float] = {}
        self.waiting: deque[tuple[int, int]] = deque()
        """Length and step of each sample."""
        self.allowed = 0

    def allow(self, step: int) -> None:
        n = self.case.groups_per_step
        for allowed in range(self.allowed + 1, step + 1):
            self.waiting += ((length, allowed) for length in self.case.lengths[(allowed - 1) * n : allowed * n].ravel())
        self.allowed = step

    def sample(self, until: float | None, whole: int | None = None) -> None:
        """Sample until a moment, or until a step is complete."""
        while self.now != until and not (until is None and whole in self.whole_at):
            while self.waiting and len(self.running) < self.places:
                length, step = self.waiting.popleft()
                heapq.heappush(self.running, (self.decoded + length, step, self.decoded))
            token = self.case.token_seconds(max(1.0, len(self.running) / self.case.engines))
            end = self.now + (self.running[0][0] - self.decoded) * token if self.running else np.inf
            if until is not None and end > until:
                self.decoded += (until - self.now) / token
                self.now = until
                return
            self.now = end
            self.decoded, step, _ = heapq.heappop(self.running)
            self.left[step] -= 1
            if not self.left[step]:
                self.whole_at[step] = self.now

    def seconds_per_step(self) -> float:
        case, ended = self.case, []
        for step in range(1, case.steps + 1):
            self.allow(step + case.staleness)
            self.sample(None, whole=step)
            begun = max(self.now, self.whole_at[step] + case.reward_seconds)
            self.sample(begun + case.update_seconds)
            cached = sum(self.decoded - began for *_, began in self.running) / case.engines
            ended.append(self.now + case.publish_seconds)
            self.now = ended[-1] + cached * case.recompute_seconds
        return Run(ended).seconds_per_step(case.uncounted)


def best(case: Case) -> float:
    return min(Ideal(case, share * case.places).seconds_per_step() for share in SHARES_OF_PLACES)


def limit(case: Case) -> float:
    """Return seconds per step. Step t cannot begin before version t - 1 - k is published; the engines cannot decode
    faster than with all samples that the bound allows, spread evenly; no sample is faster than alone on an engine."""
    n, k = case.groups_per_step, case.staleness
    most = min(case.places, case.groups * case.samples * (k + 1))
    rate = case.engines * most / case.token_seconds(most)
    steps = [case.lengths[step * n : (step + 1) * n] for step in range(case.steps)]
    published, update_ended = [0.0], 0.0
    for step in range(1, case.steps + 1):
        alone = published[max(0, step - 1 - k)] + steps[step - 1].max() * case.token_seconds(1)
        tokens, sampled = 0, alone
        for first in range(step, 0, -1):
            tokens += int(steps[first - 1].sum())
            sampled = max(sampled, published[max(0, first - 1 - k)] + tokens / rate)
        update_ended = max(sampled + case.reward_seconds, update_ended) + case.update_seconds
        published.append(update_ended + case.publish_seconds)
    return Run(published[1:]).seconds_per_step(case.uncounted)


def oldest(group: Group) -> int:
    """Return the oldest policy version that any of the group's tokens came from."""
    return min(sample.policy_versions[0] for sample in group.samples)


class ReadyFirst:
    """Replaces `ExperienceBuffer`: returns groups in the order in which they become ready, and drops stale ones."""

    def __init__(self, case: Case) -> None:
        self.n, self.max_staleness = case.groups_per_step, case.staleness
        self.version = self.dropped = self.asked = 0
        self.ready: list[Group] = []

    def reserve(self, limit: int) -> list[int]:
        count = min(limit, (self.version + self.max_staleness + 1) * self.n - self.asked)
        self.asked += count
        return [self.version + 1] * count

    def add(self, group: Group) -> None:
        self.ready.append(group)
        self._drop(self.ready[-1:])

    def take(self) -> list[Group] | None:
        if len(self.ready) < self.n:
            return None
        taken, self.ready = self.ready[: self.n], self.ready[self.n :]
        return taken

    def advance(self, version: int) -> None:
        self.version = version
        self._drop(self.ready)

    def _drop(self, looked_at: list[Group]) -> None:
        stale = {group.id for group in looked_at if self.version - oldest(group) > self.max_staleness}
        if stale:
            self.ready = [group for group in self.ready if group.id not in stale]
            self.dropped += len(stale)
            self.asked -= len(stale)

    def stats(self) -> BufferStats:
        return BufferStats(self.version, len(self.ready), 0, {})


def ready_first(case: Case) -> WaitingBuffer:
    waiting: Any = WaitingBuffer(case.groups_per_step, case.staleness, BufferConfig())
    waiting.buffer = ReadyFirst(case)
    return waiting


def length_ratio(case: Case, run: Run, groups: int) -> float:
    """Return the mean length of trained responses, divided by that of the first groups requested."""
    return float(np.mean(run.lengths) / case.lengths[:groups].mean())


@dataclass(frozen=True)
class Row:
    name: str
    synchronous: float
    """Seconds per step, as for the other schedules."""
    one_step_off: float
    rlkit: dict[int, float]
    """Seconds per step by staleness bound."""
    best: dict[int, float]
    limit: dict[int, float]
    staleness: dict[int, float]
    """Mean staleness of first tokens, by bound."""
    dropped: int
    length_ratio: dict[int, float]
    ready_first: tuple[float, float, float]
    """Seconds per step, share of dropped groups and length ratio, at k=2."""


def measure(name: str, case: Case) -> Row:
    runs = {k: simulate(replace(case, staleness=k)) for k in (0, *BOUNDS)}
    cases = {k: replace(case, staleness=k) for k in BOUNDS}
    for k, run in runs.items():
        expected = [[f"{i:08d}" for i in range(s * len(ids), (s + 1) * len(ids))] for s, ids in enumerate(run.trained)]
        assert run.trained == expected, f"{name}: other groups than those asked for"
        assert max(run.staleness) <= k, f"{name}: older than allowed"
    loose = simulate(cases[2], ready_first)
    u = case.uncounted
    return Row(
        name,
        runs[0].seconds_per_step(u),
        in_rounds(case, overlap=True),
        {k: runs[k].seconds_per_step(u) for k in BOUNDS},
        {k: best(c) for k, c in cases.items()},
        {k: limit(c) for k, c in cases.items()},
        {k: float(np.mean(runs[k].staleness)) for k in BOUNDS},
        sum(run.dropped for run in runs.values()),
        {k: length_ratio(case, runs[k], case.steps * case.groups_per_step) for k in BOUNDS},
        (loose.seconds_per_step(u), loose.dropped / loose.started, length_ratio(case, loose, loose.started)),
    )


TAILS = Case(groups=16)
ROWS = {
    "8 engines, 4 groups": Case(),
    "8 engines, 16 groups": TAILS,
    "8 engines, 64 groups": Case(groups=64, steps=16),
    "1 engine, 4 groups": Case(engines=1, steps=60),
    "64 engines, 4 groups": Case(engines=64, steps=16),
    "128 engines, 4 groups": Case(engines=128, steps=16),
    "short tails (sigma 0.5)": replace(TAILS, sigma=0.5),
    "reward takes 20 s": replace(TAILS, reward_seconds=20.0),
    "publishing takes 20 s": replace(TAILS, publish_seconds=20.0),
    "an engine dies every 300 s": replace(TAILS, death_every=300.0),
    "an evaluation every 2 steps": replace(TAILS, evaluate_every=2),
    "1,024 engines, 4 groups": Case(engines=1024, steps=8, uncounted=4),
}
"""Rows have long tails unless their name says otherwise, and 8 engines with 16 groups if it has no numbers."""
QUICK = {name: ROWS[name] for name in ("8 engines, 4 groups", "8 engines, 16 groups")}
TAILED = [name for name in ROWS if "engines, 4 groups" in name or "engines, 16 groups" in name]
"""Rows that the speed bars apply to; in the others even the best schedule is below, or close to, the bar for k=1."""
BARS = {"speedup_k1": 1.8, "speedup_k2": 2.3, "share_of_best": 0.95}
LONGER = 0.02
"""Largest relative deviation of the mean trained length from the mean sampled length."""


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| | synchronous, s a step | one-step-off | k=1 | k=2 | k=4 | of the best (k = 1, 2, 4) | of the limit | "
        "staleness (k = 1, 2, 4) | ready-first, k=2 (dropped, length) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        faster = {k: row.synchronous / seconds for k, seconds in row.rlkit.items()}
        loose, dropped, length = row.ready_first
        cells = [
            row.name,
            f"{row.synchronous:.0f}",
            f"{row.synchronous / row.one_step_off:.2f}",
            *(f"{faster[k]:.2f}" for k in BOUNDS),
            " / ".join(f"{row.best[k] / row.rlkit[k]:.0%}" for k in BOUNDS),
            " / ".join(f"{row.limit[k] / row.rlkit[k]:.0%}" for k in BOUNDS),
            " / ".join(f"{row.staleness[k]:.1f}" for k in BOUNDS),
            f"{row.synchronous / loose:.2f} ({dropped:.0%}, {length:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def picture(row: Row) -> list[str]:
    def times(seconds: Sequence[float]) -> str:
        return ", ".join(f"{row.synchronous / value:.2f}" for value in (row.synchronous, *seconds))

    return [
        "```mermaid",
        "xychart-beta",
        f'    title "{row.name}, long tails: times synchronous"',
        '    x-axis "trainer.max_staleness" [0, 1, 2, 4]',
        '    y-axis "times synchronous" 0 --> 5',
        f"    bar [{times([row.rlkit[k] for k in BOUNDS])}]",
        f"    line [{times([row.best[k] for k in BOUNDS])}]",
        f"    line [{times([row.one_step_off] * len(BOUNDS))}]",
        "```",
    ]


def write(rows: Sequence[Row]) -> None:
    """Write the table into the page, between the marks."""
    start, end = "<!-- table: benchmarks/asynchrony.py --write -->", "<!-- end of table -->"
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(start)
    lines = [
        f"`python benchmarks/asynchrony.py --write` on {date.today()}:",
        "",
        *table(rows),
        "",
        *picture(rows[:2][-1]),
    ]
    PAGE.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return the worst figures of all rows; speedups only of TAILED rows, share_of_best only of those without deaths or
    evaluations, which `best` does not take into account."""
    tailed = [row for row in rows if row.name in TAILED]
    known = [row for row in rows if not (ROWS[row.name].death_every or ROWS[row.name].evaluate_every)]
    return {
        **{f"speedup_k{k}": round(min(row.synchronous / row.rlkit[k] for row in tailed), 3) for k in BOUNDS},
        "share_of_best": round(min(row.best[k] / row.rlkit[k] for row in known for k in BOUNDS), 3),
        "dropped": sum(row.dropped for row in rows),
        "length_error": round(max(abs(ratio - 1) for row in rows for ratio in row.length_ratio.values()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    arguments = parser.parse_args()
    rows = []
    for name, case in (QUICK if arguments.quick else ROWS).items():
        if arguments.only in name:
            began = time.process_time()
            rows.append(measure(name, case))
            print(table(rows)[-1], f"{time.process_time() - began:.0f} s", flush=True)
            if arguments.write:
                write(rows)
    result = summary(rows)
    print(json.dumps(result))
    missed = [f"{name} is below {bar}" for name, bar in BARS.items() if result[name] < bar]
    missed += ["groups were dropped"] * bool(result["dropped"])
    missed += [f"length_error is above {LONGER}"] * (result["length_error"] > LONGER)
    if missed:
        raise SystemExit("missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
