"""Measures how long a reader waits: interactions with `rlkit.view`'s page in headless Chromium, over large runs.

python -m benchmarks.view_page                        # five runs of 100,000 samples: minutes, and 2 GB in /tmp
python -m benchmarks.view_page --samples 10000 --runs 2

Figures are seconds from an action until the page shows its result, including the server's part, as the median of three.
Exits with 1 if any is above a second. Needs chromium and playwright, as tests/view does.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "fixtures"))
from page_fixture import Reader, chromium, reading, serving
from synthetic_run import make_run

LIMIT_SECONDS = 1.0
ROWS = "() => document.querySelectorAll('[role=grid] [aria-selected]').length > 0"
Interaction = Callable[[], None]


def make_runs(folder: Path, samples: int, runs: int) -> list[Path]:
    first = make_run(folder / "run_1", samples)
    paths = [folder / f"run_{number}" for number in range(1, runs + 1)]
    for path in paths[1:]:
        shutil.copytree(first, path)
    return paths


def measure(interaction: Interaction, before: Interaction, times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        before()
        begun = time.perf_counter()
        interaction()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def indexed(reader: Reader, samples: int) -> float:
    """Return seconds until the server has indexed all samples of all runs, which can be viewed before that."""
    begun = time.perf_counter()
    reader.open("overview", run="run_1")
    known = "async () => (await (await fetch('/api/runs')).json()).runs.map(run => run.samples)"
    while min(reader.page.evaluate(known)) < samples * 0.95:
        time.sleep(1.0)
    return time.perf_counter() - begun


def interactions(reader: Reader, runs: int, longest: int) -> dict[str, tuple[Interaction, Interaction]]:
    """Return name -> (the interaction that is timed, the one before it)."""
    page = reader.page
    others = ",".join(f"run_{number}" for number in range(2, runs + 1))
    old = "rows => [...document.querySelectorAll('[role=grid] [aria-selected]')].map(row => row.id).join() !== rows"
    now = "() => [...document.querySelectorAll('[role=grid] [aria-selected]')].map(row => row.id).join()"

    def at(screen: str, **parameters: object) -> Interaction:
        return lambda: reader.go(screen, run="run_1", **parameters)

    def list_after(action: Interaction) -> Interaction:
        def run() -> None:
            rows = page.evaluate(now)
            action()
            reader.until(old, rows)

        return run

    def samples() -> None:
        reader.go("samples", run="run_1")
        reader.until(ROWS)

    def listed() -> None:
        reader.go("time", run="run_1")
        samples()

    def filled(label: str, text: str) -> Interaction:
        def fill() -> None:
            page.get_by_label(label).fill(text)
            page.get_by_label(label).press("Enter")

        return list_after(fill)

    def recoloured(signal: str) -> Interaction:
        def choose() -> None:
            page.get_by_label("Colour by").select_option(signal)
            reader.until("signal => document.querySelector('[role=listbox]').ariaLabel.includes(signal)", signal)

        return choose

    def last_bin() -> None:
        page.get_by_role("toolbar", name="length in tokens: bins").get_by_role("button").last.click()

    def token_sample() -> None:
        reader.go("sample", run="run_1", id=longest)
        page.locator("[data-t='0']").wait_for()

    def curves() -> None:
        reader.go("curves", run="run_1", **{"with": others})
        page.locator("canvas").first.wait_for()

    return {
        "overview": (at("overview"), at("time")),
        f"curves of {runs} runs": (curves, at("overview")),
        "samples": (samples, at("overview")),
        "sort": (
            list_after(lambda: page.get_by_role("columnheader", name="reward").get_by_role("button").click()),
            listed,
        ),
        "filter": (filled("Filter", "reward > 1 and correct = 0"), listed),
        "search of common words": (filled("Text", "certain complete"), listed),
        "search of a phrase": (filled("Text", '"absolutely certain"'), listed),
        "a bin of the histogram": (list_after(last_bin), listed),
        "the next 400 rows": (
            list_after(lambda: page.evaluate("() => { document.querySelector('[role=grid]').scrollTop = 1e9 }")),
            listed,
        ),
        "8,200 tokens": (token_sample, listed),
        "another colour": (recoloured("entropy"), token_sample),
        "distributions": (at("distributions"), listed),
        "triage": (at("triage"), listed),
        "compare two runs": (at("compare", **{"with": "run_2"}), samples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    slow = []
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_runs(Path(temporary) / "runs", given.samples, given.runs)
        cache = Path(temporary) / "cache"
        with chromium() as browser, serving(*paths, cache=cache) as address, reading(browser, address) as reader:
            print(f"{'index of all runs':28} {indexed(reader, given.samples):6.2f} s (it can be read meanwhile)")
            with (paths[0] / "samples.jsonl").open() as lines:
                longest = next(number for number, line in enumerate(lines) if '"length": 8200' in line)
            for name, (interaction, before) in interactions(reader, given.runs, longest).items():
                seconds = measure(interaction, before)
                print(f"{name:28} {seconds:6.2f} s", flush=True)
                if seconds > LIMIT_SECONDS:
                    slow.append(name)
    if slow:
        print(f"above {LIMIT_SECONDS:g} s: {', '.join(slow)}", file=sys.stderr)
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
