"""Does it learn, and honestly? Held-out accuracy before and after training, per reward, with controls.

    python benchmarks/learning.py                       # 3 seeds of each setting; writes docs/results.md
    python benchmarks/learning.py --only rule --seeds 0    # prints, and leaves docs/results.md alone

Each run is `python -m rlkit.train` in a process of its own, one after the other. Accuracy is always judged by the rule
verifier, at temperature 1, on the same held-out problems. A setting's row is written as soon as it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from benchmarks.controls import write_random_discriminator
from rlkit.embedded import model_folder

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- learning: begin -->", "<!-- learning: end -->"


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    overrides: tuple[str, ...]
    bar: str
    """What the row must show."""


def settings(scratch: Path) -> list[Setting]:
    """The rows; `scratch` receives the random discriminator."""
    random_model = scratch / "random_discriminator"
    if not random_model.is_dir():
        write_random_discriminator(model_folder("embedded:polar"), random_model, seed=0)
    return [
        Setting("reward=rule", ("reward=rule",), "at least +30 points within 300 s"),
        Setting("reward=polar", ("reward=polar",), "at least +15 points"),
        Setting(
            "control: frozen random discriminator",
            ("reward=polar", f"reward.model_path={random_model}"),
            "at most +3 points",
        ),
        Setting(
            "control: shuffled references",
            ("reward=polar", "data._target_=benchmarks.controls.ShuffledReferences"),
            "at most +3 points",
        ),
    ]


def train(setting: Setting, seed: int, scratch: Path, extra: list[str]) -> dict[str, float]:
    """One run; returns its summary with the wall time of the whole process. Raises if the run fails."""
    run_dir = scratch / f"{re.sub('[^a-z]+', '_', setting.name)}_{seed}"
    command = [
        sys.executable, "-m", "rlkit.train", *setting.overrides, f"seed={seed}", f"run_dir={run_dir}",
        "trainer.evaluation_prompts=512", "tracking.console=plain", *extra,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["process_seconds"] = time.perf_counter() - began
    return summary


def row(setting: Setting, runs: list[dict[str, float]]) -> str:
    """A line of the Markdown table."""
    before = [100 * run["accuracy_before"] for run in runs]
    after = [100 * run["accuracy_after"] for run in runs]
    gains = [b - a for a, b in zip(before, after, strict=True)]
    seconds = [run["process_seconds"] for run in runs]
    shown = ", ".join(f"{gain:+.1f}" for gain in gains)
    each = statistics.mean(run["seconds_per_step"] for run in runs)
    return (
        f"| {setting.name} | {statistics.mean(before):.1f} % | {statistics.mean(after):.1f} % | "
        f"{statistics.mean(gains):+.1f} ({shown}) | {setting.bar} | {statistics.mean(seconds):.0f} s "
        f"(at most {max(seconds):.0f}) | {runs[0]['steps']:.0f} x {each:.2f} s |"
    )


def write_table(rows: list[str], command: str) -> None:
    """Replace the table between the markers in docs/results.md."""
    file = ROOT / "docs" / "results.md"
    text = file.read_text() if file.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    table = "\n".join(
        [
            BEGIN,
            f"`{command}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores; "
            "means over seeds, each seed's gain in brackets.",
            "",
            "| setting | before | after | gain in points (per seed) | bar | wall time of the process | steps |",
            "|---|---|---|---|---|---|---|",
            *rows,
            END,
        ]
    )
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    file.write_text(head + table + tail)


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
        rows = []
        for setting in settings(scratch):
            if arguments.only and arguments.only not in setting.name:
                continue
            runs = []
            for seed in arguments.seeds:
                runs.append(train(setting, seed, scratch, arguments.overrides))
                print(f"{setting.name} seed {seed}: {json.dumps(runs[-1])}", flush=True)
            rows.append(row(setting, runs))
            print(rows[-1], flush=True)
            if not arguments.no_table and not arguments.only:  # a part of the table would replace the whole
                write_table(rows, " ".join(["python", "benchmarks/learning.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
