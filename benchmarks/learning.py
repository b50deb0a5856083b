"""Checks that training improves held-out accuracy, and does so honestly: before and after, per reward, with controls.

    python benchmarks/learning.py                       # 3 seeds of each setting; writes docs/results.md
    python benchmarks/learning.py --only rloo           # only settings with this in their name; keeps the other rows
    python benchmarks/learning.py --seeds 0 --no-table  # prints, and does not change docs/results.md

Each run is `python -m rlkit.train` in a separate process, one after the other. Accuracy is always judged by the rule
verifier (in games it is the success rate), at temperature 1, on the same held-out problems. A setting's row is written
as soon as it is complete. The exit code is 1 if a row misses its bar.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from benchmarks.controls import write_random_discriminator
from rlkit.models.folder import model_folder

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    overrides: tuple[str, ...]
    least_gain: float = -100.0
    """Points that every seed must gain."""
    largest_gain: float = 100.0
    """Points that no seed may gain (controls)."""
    seconds: float = 480.0
    """Time limit of each run's process, alone on two cores."""

    @property
    def bar(self) -> str:
        """Return in words what the row must show."""
        if self.largest_gain < 100:
            return f"at most {self.largest_gain:+.0f} points"
        return f"at least {self.least_gain:+.0f} points within {self.seconds:.0f} s"

    def missed(self, runs: list[dict[str, Any]]) -> bool:
        """Whether any seed misses the bar."""
        gains = [100 * (run["accuracy_after"] - run["accuracy_before"]) for run in runs]
        slowest = max(run["process_seconds"] for run in runs)
        return min(gains) < self.least_gain or max(gains) > self.largest_gain or slowest > self.seconds


RUN_DEADLINE_SECONDS = 1800.0
OFTEN = ("trainer.prompts_per_step=64", "trainer.total_steps=12", "trainer.evaluate_every_steps=2")
"""PRIME solves the task in fewer steps than others, so both rows of the comparison are short and evaluated often."""


SHORT = ("trainer.total_steps=20", "trainer.evaluate_every_steps=10")
"""Steps of 256 responses each."""
GAME = ("trainer.total_steps=30", "trainer.evaluation_prompts=128", "trainer.evaluate_every_steps=10")
DPO = ("algorithm=dpo", "algorithm.pairs=all", "reward=rule", "learner.learning_rate=3e-4")
TEACHER = "algorithm.teacher=?"
"""Placeholder for the policy of DPO's first seed."""
DISTILL = (
    "algorithm=distill",
    "algorithm.samples_per_prompt=4",
    "trainer.total_steps=15",
    "trainer.evaluate_every_steps=5",
    TEACHER,
)
PPO = ("algorithm=ppo", "reward=rule", "trainer.prompts_per_step=256", "critic.learning_rate=1e-3")
PPO = (*PPO, "trainer.total_steps=15", "trainer.evaluate_every_steps=5")


def teacher(scratch: Path) -> Path:
    """Return the teacher's folder; train it if it does not exist."""
    run = scratch / "algorithm_dpo_20_steps_0"
    if not run.is_dir():
        train(Setting("algorithm=dpo, 20 steps", (*DPO, *SHORT)), 0, scratch, [])
    return run / "checkpoints" / "step_000020" / "policy"


def settings(scratch: Path) -> list[Setting]:
    """Return the rows; the random discriminator is written to `scratch`."""
    random_model = scratch / "random_discriminator"
    if not random_model.is_dir():
        write_random_discriminator(model_folder("embedded:polar"), random_model, seed=0)
    return [
        Setting("reward=rule", ("reward=rule",), 30, seconds=300),
        Setting("reward=polar", ("reward=polar",), 15),
        Setting(
            "algorithm=ppo",
            ("algorithm=ppo", "reward=rule", "trainer.prompts_per_step=256", "critic.learning_rate=1e-3"),
            20,
        ),
        Setting("algorithm=rloo", ("algorithm=rloo", "reward=rule", "trainer.prompts_per_step=64"), 20),
        Setting("algorithm=rloo, 12 steps", ("algorithm=rloo", "reward=rule", *OFTEN), 20),
        Setting(
            "algorithm=prime, 12 steps",
            ("algorithm=prime", "reward=implicit_prm", "reward.learning_rate=1e-4", *OFTEN),
            20,
        ),
        Setting("algorithm=grpo, 20 steps", ("reward=rule", *SHORT), 50),
        *(
            Setting(f"max_staleness={k}, {name}", (*overrides, f"trainer.max_staleness={k}"), least)
            for name, overrides, least in (
                ("20 steps", ("reward=rule", *SHORT), 50),
                ("hidden_facts, 30 steps", ("environment=hidden_facts", *GAME), 50),
            )
            for k in (1, 2, 4)
        ),
        Setting("max_staleness=4, 60 steps", ("reward=rule", "trainer.max_staleness=4"), 55),
        Setting("algorithm=dpo, 20 steps", (*DPO, *SHORT), 60),
        Setting("algorithm=distill, 15 steps of 128", DISTILL, 50),
        Setting("algorithm=sft, 20 steps", ("algorithm=sft", "evaluation.generate=true", *SHORT), 20),
        Setting("algorithm=ppo, 15 steps", PPO, 20),
        Setting(
            "algorithm=ppo, 15 steps of 4 epochs", (*PPO, "learner.epochs_per_step=4", "critic.epochs_per_step=4"), 20
        ),
        Setting(
            "control: frozen random discriminator",
            ("reward=polar", f"reward.model_path={random_model}"),
            largest_gain=3,
        ),
        Setting(
            "control: shuffled references",
            ("reward=polar", "data._target_=benchmarks.controls.ShuffledReferences"),
            largest_gain=3,
        ),
        *games(),
    ]


def games() -> list[Setting]:
    """Return the rows of the package's games and their controls."""
    least = {"guess_number": 12, "calculator": 30, "hidden_facts": 50, "maze": 20}
    shuffled = "reward._target_=benchmarks.controls.ShuffledRewards"
    rows = []
    for game, gain in least.items():
        overrides = (f"environment={game}", *GAME)
        rows.append(Setting(f"environment={game}, 30 steps", overrides, gain))
        rows.append(Setting(f"control: {game}, shuffled rewards", (*overrides, shuffled), largest_gain=10))
    return rows


def train(setting: Setting, seed: int, scratch: Path, extra: list[str]) -> dict[str, Any]:
    """Train once; return the run's summary with the process's wall-clock time and the metrics of each step."""
    run_dir = scratch / f"{re.sub('[^a-z0-9]+', '_', setting.name)}_{seed}"
    named = f"algorithm.teacher={teacher(scratch)}" if TEACHER in setting.overrides else TEACHER
    overrides = [named if override == TEACHER else override for override in setting.overrides]
    command = [
        sys.executable, "-m", "rlkit.train", "trainer.evaluation_prompts=512", *overrides, f"seed={seed}",
        f"run_dir={run_dir}", "tracking.console=plain", *extra,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_DEADLINE_SECONDS)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["process_seconds"] = time.perf_counter() - began
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary["pair_accuracy"] = [r["prm/pair_accuracy"] for r in records if "prm/pair_accuracy" in r]
    return summary


def steps_to(accuracy: float, run: dict[str, Any]) -> int | None:
    """Return the first evaluated step with at least this held-out accuracy."""
    reached = [int(step) for step, value in run["accuracy_by_step"].items() if value >= accuracy]
    return min(reached, default=None)


def path_of(run: dict[str, Any]) -> str:
    """Describe how fast a run learned, for settings that are evaluated often, and how well a PRM ranked meanwhile."""
    reached = ", ".join(f"{steps_to(level, run) or 'not'} ({level:.0%})" for level in (0.6, 0.7, 0.8))
    pairs = run["pair_accuracy"]
    if not pairs:
        return f"| {reached} | |"
    parts = [statistics.mean(part) for part in (pairs[:1], pairs[1:6], pairs[-5:])]
    return f"| {reached} | {', '.join(f'{part:.2f}' for part in parts)} |"


def row(setting: Setting, runs: list[dict[str, Any]]) -> str:
    """Return a line of the Markdown table."""
    before = [100 * run["accuracy_before"] for run in runs]
    after = [100 * run["accuracy_after"] for run in runs]
    gains = [b - a for a, b in zip(before, after, strict=True)]
    seconds = [run["process_seconds"] for run in runs]
    shown = ", ".join(f"{gain:+.1f}" for gain in gains)
    each = statistics.mean(run["seconds_per_step"] for run in runs)
    return (
        f"| {setting.name} | {statistics.mean(before):.1f} % | {statistics.mean(after):.1f} % | "
        f"{statistics.mean(gains):+.1f} ({shown}) | {setting.bar} | {statistics.mean(seconds):.0f} s "
        f"(at most {max(seconds):.0f}) | {runs[0]['steps']:.0f} x {each:.2f} s | {time.strftime('%Y-%m-%d')} |"
    )


TABLES = {
    "learning": (
        "| setting | before | after | gain in points (per seed) | bar | wall time of the process | steps | measured |",
        "|---|---|---|---|---|---|---|---|",
    ),
    "speed of learning": (
        "| setting, seed | steps to (held-out accuracy) | PRM pair accuracy before its update: step 1, 2-6, last 5 |",
        "|---|---|---|",
    ),
}


def write_rows(table: str, rows: list[str]) -> None:
    """Write rows to a table of docs/results.md, replacing those with the same first cell."""
    file = ROOT / "docs" / "results.md"
    begin, end = f"<!-- {table}: begin -->", f"<!-- {table}: end -->"
    head, _, rest = file.read_text().partition(begin)
    old, _, tail = rest.partition(end)
    kept = {line.split("|")[1]: line for line in old.splitlines() if line.startswith("|")}
    body = [line for key, line in kept.items() if line not in TABLES[table] and not key.startswith("---")]
    for new in rows:
        at = next((i for i, line in enumerate(body) if line.split("|")[1] == new.split("|")[1]), len(body))
        body[at : at + 1] = [new]
    file.write_text("\n".join([head + begin, *TABLES[table], *body, end + tail]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", help="settings whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder that keeps the run folders")
    parser.add_argument("--no-table", action="store_true", help="print only, leave docs/results.md alone")
    parser.add_argument("overrides", nargs="*", help="further overrides for every run (after --)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.keep or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        missed = []
        for setting in settings(scratch):
            if arguments.only and arguments.only not in setting.name:
                continue
            runs = []
            for seed in arguments.seeds:
                runs.append(train(setting, seed, scratch, arguments.overrides))
                print(f"{setting.name} seed {seed}: {json.dumps(runs[-1])}", flush=True)
            made = row(setting, runs)
            print(made, flush=True)
            if setting.missed(runs):
                missed.append(setting.name)
            if not arguments.no_table:
                write_rows("learning", [made])
                if "12 steps" in setting.name:
                    seeds = zip(arguments.seeds, runs, strict=True)
                    write_rows("speed of learning", [f"| {setting.name}, seed {s} {path_of(run)}" for s, run in seeds])
    if missed:
        raise SystemExit(f"missed its bar: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
