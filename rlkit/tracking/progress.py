"""The current state of a run, and its text form: lines, durations, sparklines, a curve."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SHOWN = (
    ("reward", "reward/mean", "{:7.3f}"),
    ("accuracy", "accuracy/train", "{:6.1%}"),
    ("loss", "preference/loss", "{:6.3f}"),
    ("loss", "policy/loss", "{:6.3f}"),
    ("pairs right", "preference/accuracy", "{:6.1%}"),
    ("margin", "preference/margin", "{:7.3f}"),
    ("reverse KL", "distill/reverse_kl", "{:7.4f}"),
    ("KL", "kl/reference", "{:8.5f}"),
    ("rollout KL", "kl/rollout", "{:8.6f}"),
    ("entropy", "policy/entropy", "{:6.3f}"),
    ("length", "length/mean", "{:6.1f}"),
    ("cut off", "length/truncated_share", "{:4.0%}"),
    ("ratio clipped", "policy/clip_share", "{:6.2%}"),
    ("grad", "policy/grad_norm", "{:7.3f}"),
)
"""(label, metric, format) for the line of a step, in order; absent metrics are left out."""
PHASES = ("generate", "score", "update", "publish")
STEPS_TIMED = 20
"""Steps on which the estimate of the time left is based."""
NARROWEST_CURVE = 30
"""Fewest columns for a curve."""


def duration(seconds: float) -> str:
    """Format a duration: `4.2 s`, `3:07 min`, `2:03:07 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def printable(text: str) -> str:
    """Return the text as one line without control characters: a model's output must not control the terminal."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Return the values averaged into at most `width` bars; non-finite values leave a gap."""
    bars = "_.-~=+*#" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count > 0 else []
    parts = [[v for v in values[start:end] if math.isfinite(v)] for start, end in pairwise(edges)]
    means = [sum(part) / len(part) if part else math.nan for part in parts]
    low = min((m for m in means if not math.isnan(m)), default=0.0)
    high = max((m for m in means if not math.isnan(m)), default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(m) else bars[round((m - low) * scale)] for m in means)


def headline_text(metric: str) -> str:
    """Name a metric in words: `accuracy/heldout` is `held-out accuracy`, `evaluation/math/accuracy` `math accuracy`."""
    area, *rest = metric.split("/")
    name = rest[-1].removeprefix("heldout_") if rest else area
    return " ".join(rest) if area == "evaluation" else f"held-out {area if name == 'heldout' else name}"


def is_share(metric: str) -> bool:
    return "accuracy" in re.split(r"[/_]", metric)


def value_text(metric: str, value: float) -> str:
    return f"{value:.1%}" if is_share(metric) else f"{value:.3f}"


def change_text(metric: str, change: float) -> str:
    return f"{100 * change:+.1f} points" if is_share(metric) else f"{change:+.3f}"


def curve(
    points: Sequence[tuple[int, float]], width: int, height: int, ascii_only: bool = False, shares: bool = True
) -> list[str]:
    """Return the lines of a plot of shares (0 to 1) or other values over steps: measured points, joined by dots. Empty
    if the width is too small or there are too few points."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2 or points[0][0] == points[-1][0] or width < NARROWEST_CURVE:
        return []
    mark, dot, axis, corner, floor = "o.|+-" if ascii_only else "●·┤└─"
    low, high = min(y for _, y in points), max(y for _, y in points)
    least = 0.01 if shares else 0.01 * max(1.0, abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        middle = min(max(middle, least / 2), 1 - least / 2) if shares else middle
        low, high = middle - least / 2, middle + least / 2
    columns, first, last = width - 9, points[0][0], points[-1][0]
    grid = [[" "] * columns for _ in range(height)]

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (height - 1))

    def column(x: float) -> int:
        return round((x - first) / (last - first) * (columns - 1))

    for (x0, y0), (x1, y1) in pairwise(points):
        start, end = column(x0), column(x1)
        for c in range(start, end + 1):
            grid[row(y0 + (c - start) / max(end - start, 1) * (y1 - y0))][c] = dot
    for x, y in points:
        grid[row(y)][column(x)] = mark
    marked = {r: high - (high - low) * r / (height - 1) for r in (0, (height - 1) // 2, height - 1)}
    labels = {r: f"{value:6.1%}" if shares else _short(value) for r, value in marked.items()}
    lines = [f"{labels.get(r, ''):>7} {axis}{''.join(cells)}".rstrip() for r, cells in enumerate(grid)]
    left, right = f"step {first}", f"step {last}"
    return [*lines, " " * 8 + corner + floor * columns, " " * 9 + left + right.rjust(columns - len(left))]


def _short(value: float) -> str:
    """Format a value in at most seven characters."""
    text = f"{value:.3g}"
    return text if len(text) <= 7 else f"{value:.0e}"


@dataclass
class Phase:
    name: str
    began: float
    ended: float | None = None


@dataclass(frozen=True)
class ShownSample:
    rank: str
    prompt: str
    response: str
    reward: float | None
    reason: str

    @property
    def reward_text(self) -> str:
        return f"{self.reward:.3f}" if self.reward is not None else f"invalid: {printable(self.reason)}"


class Progress:
    """Written by the tracker, read by the console's thread; both hold `lock`."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.total_steps = total_steps
        self.clock = clock
        self.began = clock()
        self.phases: list[Phase] = []
        self.activities: dict[str, float] = {}
        """Name -> start time."""
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.rewards: list[float] = []
        self.headline = "accuracy/heldout"
        """The metric shown for held-out evaluations."""
        self.heldout: list[tuple[int, float]] = []
        """(step, value of the headline metric)."""
        self.warnings: dict[str, int] = {}
        """Message -> how often it occurred, the latest last."""
        self.sample: Sequence[ShownSample] = ()
        self._ends: deque[float] = deque(maxlen=STEPS_TIMED + 1)

    def resume(self, step: int, headline: str, heldout: Mapping[int, float]) -> None:
        self.step, self.headline = step, headline
        self.heldout = sorted(heldout.items())

    def begin_phase(self, name: str, parallel: bool) -> None:
        """Begin a phase; end earlier ones, unless it runs in parallel."""
        if not parallel:
            self.end_phases()
        self.phases.append(Phase(name, self.clock()))

    def end_phase(self, name: str) -> float:
        """End a phase; return its seconds. Raises ValueError if none of that name is running."""
        for phase in self.phases:
            if phase.name == name and phase.ended is None:
                phase.ended = self.clock()
                return phase.ended - phase.began
        raise ValueError(f"no phase {name!r} is running")

    def end_phases(self) -> None:
        for phase in self.phases:
            phase.ended = self.clock() if phase.ended is None else phase.ended

    def training_begins(self) -> None:
        """End all phases and start the estimate of the time left; later calls do nothing."""
        if not self._ends:
            self.end_phases()
            self._ends.append(self.clock())

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        self.metrics = self.metrics | dict(metrics)
        self._ends.append(self.clock())
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])

    def end_evaluation(self, step: int, headline: str, metrics: Mapping[str, float]) -> None:
        self.headline = headline
        self.heldout.append((step, metrics[headline]))
        self.metrics = self.metrics | dict(metrics)

    def add_warning(self, message: str) -> int:
        """Count a warning; return how often this message has occurred, including this time."""
        count = self.warnings.pop(message, 0) + 1
        self.warnings[message] = count
        return count

    @property
    def other_sets(self) -> dict[str, float]:
        """Headline metrics of further held-out sets (`evaluation/NAME/accuracy`) and their latest values."""
        pattern = re.compile(r"evaluation/\w+/(accuracy|reward)")
        return {name: v for name, v in self.metrics.items() if pattern.fullmatch(name) and name != self.headline}

    @property
    def elapsed(self) -> float:
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the pace of the last steps, including evaluations; None before the first step is done."""
        if len(self._ends) < 2:
            return None
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, pace * (self.total_steps - self.step) - (self.clock() - self._ends[-1]))

    @property
    def now_doing(self) -> str:
        """The activities, else the phases still running; empty if none."""
        return ", ".join(self.activities or [phase.name for phase in self.phases if phase.ended is None])


def shown(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return the entries of `SHOWN` that have a value; the policy loss only without a reward or a preference loss."""
    tells = {"reward/mean", "preference/loss"} & metrics.keys()
    return [one for one in SHOWN if one[1] in metrics and not (tells and one[1] == "policy/loss")]


def step_line(progress: Progress) -> str:
    m, width = progress.metrics, len(str(progress.total_steps))
    parts = [f"step {progress.step:>{width}}/{progress.total_steps}"]
    hidden = {"kl/rollout"} if "kl/reference" in m else set()
    parts += [f"{label} {form.format(m[name])}" for label, name, form in shown(m) if name not in hidden]
    if m.get("reward/failed"):
        parts.append(f"failed rewards {m['reward/failed']:g}")
    if "time/step" in m:
        times = " ".join(f"{p} {m[f'time/{p}']:.2f}" for p in PHASES if f"time/{p}" in m)
        parts.append(f"{m['time/step']:6.2f} s" + (f" ({times})" if times else ""))
    if progress.seconds_left:
        parts.append(f"left {duration(progress.seconds_left)}")
    return "  ".join(parts)


def evaluation_line(progress: Progress) -> str:
    metric, (first, before), (step, now) = progress.headline, progress.heldout[0], progress.heldout[-1]
    line = f"{headline_text(metric)} {value_text(metric, now):>6} after step {step}"
    if len(progress.heldout) > 1:
        line += f"  ({change_text(metric, now - before)} since step {first})"
    others = [f"{headline_text(name)} {value_text(name, value)}" for name, value in progress.other_sets.items()]
    return "  ".join([line, *others])


def summary_lines(
    progress: Progress, summary: Mapping[str, Any], folder: Path, tensorboard: bool, width: int, ascii_only: bool
) -> list[str]:
    rows: dict[str, str] = {}
    metric = progress.headline
    before, after = (summary.get(f"{metric.partition('/')[0]}_{when}") for when in ("before", "after"))
    if before is not None and after is not None:
        values = f" {'->' if ascii_only else '→'} ".join(value_text(metric, value) for value in (before, after))
        rows[headline_text(metric)] = f"{values} ({change_text(metric, after - before)})"
    rows |= {headline_text(name): value_text(name, value) for name, value in progress.other_sets.items()}
    best = summary.get("best")
    if best is not None and best["step"] != summary.get("steps"):
        rows["best"] = f"{best['metric']} {best['value']:.3f} after step {best['step']}: {best['policy'] or 'not kept'}"
    if progress.rewards:
        rows["reward"] = f"{sparkline(progress.rewards, 40, ascii_only)} {progress.rewards[-1]:.3f}"
    seconds = float(summary.get("wall_seconds") or progress.elapsed)
    rows["steps"] = f"{summary.get('steps', progress.step)} in {duration(seconds)}"
    if summary.get("seconds_per_step"):
        rows["steps"] += f" ({duration(float(summary['seconds_per_step']))} each)"
    if summary.get("reward_failed"):
        rows["failed rewards"] = f"{summary['reward_failed']:g}"
    if progress.warnings:
        rows["warnings"] = f"{sum(progress.warnings.values())} (see logs/console.log)"
    if summary.get("policy"):
        rows["policy"] = f"{summary['policy']} (loads in transformers and in vLLM)"
    rows["run folder"] = str(folder)
    view = "rlkit view" if shutil.which("rlkit") else f"{shlex.quote(sys.executable)} -m rlkit.view"
    rows["look"] = f"{view} {shlex.quote(str(folder))} (--text: in the terminal)"
    if not summary.get("ended"):
        rows["train longer"] = (
            f"the same command with run_dir={shlex.quote(str(folder))} resume=auto trainer.total_steps=..."
        )
    if tensorboard:
        rows["curves"] = f"tensorboard --logdir {folder / 'tensorboard'}"
    lines = [f"{label:<18} {value}" for label, value in rows.items()]
    plot = curve(progress.heldout, width, 9, ascii_only, is_share(metric))
    return [*lines, "", headline_text(metric), *plot] if plot else lines
