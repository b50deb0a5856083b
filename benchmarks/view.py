"""Times the view's queries over real HTTP, with several synthetic runs of 100,000 samples.

    python -m benchmarks.view                       # five runs: minutes, and 2 GB in /tmp
    python -m benchmarks.view --samples 1000000 --runs 1

Prints a Markdown table: seconds until the runs are indexed, then for each query the first answer of a server that has
just started, and the median of the next five. Exits with 1 if any is above a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "fixtures"))
from page_fixture import serving
from synthetic_run import make_run

LIMIT_SECONDS = 1.0
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("runs", {}),
    ("overview", {}),
    ("metrics", {"names": "*"}),
    ("samples", {}),
    ("samples", {"sort": "reward", "order": "desc"}),
    ("samples", {"sort": "component:judge", "order": "desc"}),
    ("samples", {"sort": "rescored:strict"}),
    ("samples", {"filter": "reward > 1 and correct = 0 and component.format < 0.5", "sort": "length"}),
    ("samples", {"filter": "reward > rescored.strict"}),
    ("samples", {"filter": "tokens and not valid"}),
    ("samples", {"q": "absolutely"}),
    ("samples", {"q": "boxes pens", "sort": "reward", "order": "desc"}),
    ("samples", {"step": 400}),
    ("histogram", {"key": "reward", "bins": 40}),
    ("histogram", {"key": "component:judge", "bins": 40, "filter": "correct = 0"}),
    ("distribution", {"key": "length", "bins": 30}),
    ("distribution", {"key": "entropy", "bins": 30}),
    ("scatter", {"x": "length", "y": "reward"}),
    ("scatter", {"x": "component:judge", "y": "rescored:strict"}),
    ("sample", {"id": 177}),
    ("tokens", {"id": 0}),
    ("group", {"step": 2, "group": "s000002-g000016"}),
    ("triage", {}),
    ("time", {}),
    ("files", {}),
    ("log", {"path": "logs/console.log"}),
    ("config", {"runs": "run_1"}),
    ("compare", {"runs": "run_1,run_2"}),
    ("compare", {}),
]
"""Queries about `run_1` unless they name `runs`; `compare` without `runs` is about all runs."""


def make_runs(folder: Path, samples: int, runs: int) -> list[Path]:
    return [make_run(folder / f"run_{n}", samples, seed=n, rescored=True) for n in range(1, runs + 1)]


def indexed(client: httpx.Client, samples: int) -> float:
    """Return seconds until the server has indexed all samples of all runs, which can be viewed before that."""
    begun = time.perf_counter()
    while min(run["samples"] for run in client.get("runs").json()["runs"]) < samples * 0.95:
        time.sleep(0.5)
    return time.perf_counter() - begun


def seconds(client: httpx.Client, name: str, asked: dict[str, Any]) -> float:
    parameters = asked if name in ("runs", "config", "compare") else {"run": "run_1", **asked}
    begun = time.perf_counter()
    client.get(name, params=parameters).raise_for_status()
    return time.perf_counter() - begun


def measure(runs: list[Path], samples: int, cache: Path) -> list[str]:
    """Measure all queries; return those above the limit."""
    slow = []
    with serving(*runs, cache=cache) as link, httpx.Client(base_url=f"{link}api/", timeout=600) as client:
        print(
            f"| question | first, s | then, s |\n|---|---|---|\n| index | {indexed(client, samples):.1f} | |",
            flush=True,
        )
    with serving(*runs, cache=cache) as link, httpx.Client(base_url=f"{link}api/", timeout=600) as client:
        for name, asked in QUESTIONS:
            if len(runs) == 1 and name == "compare":
                continue
            first, *more = (seconds(client, name, asked) for _ in range(6))
            question = " ".join([f"`{name}`", *(f"{key}={value}" for key, value in asked.items())])
            print(f"| {question} | {first:.2f} | {statistics.median(more):.2f} |", flush=True)
            if max(first, statistics.median(more)) > LIMIT_SECONDS:
                slow.append(question)
    return slow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slow = measure(make_runs(Path(folder), given.samples, given.runs), given.samples, Path(folder) / "cache")
    if slow:
        print(f"above {LIMIT_SECONDS:g} s: {', '.join(slow)}", file=sys.stderr)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
