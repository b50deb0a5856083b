"""How long the view's questions take on a run of 100,000 samples, made up.

    python benchmarks/view.py                       # 100,000 samples, in a temporary folder
    python benchmarks/view.py --samples 1000000

Prints a Markdown table: seconds of the index, then of each question, the median of five. The aim is 0.3 s for each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]

QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("runs", {}),
    ("overview", {}),
    ("metrics", {"names": "*"}),
    ("samples", {"sort": "reward", "order": "desc"}),
    ("samples", {"sort": "component:judge", "order": "desc"}),
    ("samples", {"sort": "rescored:strict"}),
    ("samples", {"filter": "reward > 1 and correct = 0 and component.format < 0.5", "sort": "length"}),
    ("samples", {"filter": "reward > rescored.strict"}),
    ("samples", {"q": "absolutely"}),
    ("samples", {"q": "boxes pens", "sort": "reward", "order": "desc"}),
    ("samples", {"step": 400}),
    ("histogram", {"key": "reward", "bins": 40}),
    ("histogram", {"key": "component:judge", "bins": 40, "filter": "correct = 0"}),
    ("distribution", {"key": "length", "bins": 30}),
    ("distribution", {"key": "entropy", "bins": 30}),
    ("scatter", {"x": "length", "y": "reward"}),
    ("sample", {"id": 77777}),
    ("tokens", {"id": 0}),
    ("triage", {}),
    ("time", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), samples)


def measure(folder: Path, samples: int) -> None:
    from synthetic_run import make_run

    from rlkit.view.index import SampleIndex
    from rlkit.view.query import ask
    from rlkit.view.runs import Runs

    make_run(folder / "run", samples, rescored=True)
    runs = Runs([folder / "run"])
    (run,) = runs.all()
    run.index = SampleIndex(run.path, folder)  # a cache of its own
    began, cpu = time.perf_counter(), time.process_time()
    run.index.follow()
    size = (run.path / "samples.jsonl").stat().st_size / 1e6
    used, seconds_ = time.process_time() - cpu, time.perf_counter() - began
    print(
        f"| question | s |\n|---|---|\n| index {samples} samples, {size:.0f} MB (CPU {used:.1f} s) | {seconds_:.2f} |"
    )
    for name, asked in QUESTIONS:
        parameters = asked if name == "runs" else {"run": run.id, **asked}
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            ask(runs, f"/api/{name}", parameters).model_dump_json()
            seconds.append(time.perf_counter() - began)
        text = ", ".join(f"{key}={value}" for key, value in asked.items())
        first = f" (first {seconds[0]:.2f})" if seconds[0] > 2 * statistics.median(seconds) + 0.05 else ""
        print(f"| {name} {text}{first} | {statistics.median(seconds):.3f} |", flush=True)


if __name__ == "__main__":
    main()
