"""Checks whether anything became slower: compares the benchmarks' ratios, never seconds, with the committed ones.

    make bench                            # a few minutes
    python -m benchmarks.gate --quick     # in CI: fewer steps, only synchronous training
    python -m benchmarks.gate --accept    # rewrite benchmarks/expected.json, for an intended change

A ratio is rlkit's CPU seconds divided by the CPU seconds of the same work without a framework, measured one after the
other (benchmarks/speed.py), so the machine's speed cancels out and other jobs on it matter little. A ratio above its
tolerance is measured once more, and the lower value counts. Exits with 1 if anything is slower than allowed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.speed import Benchmark, Figures, measure

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = ROOT / "benchmarks" / "expected.json"
ASYNCHRONY = ROOT / "benchmarks" / "asynchrony.py"
"""Checks its own figures, which are simulated and so the same on every machine."""
STEPS = {"quick": 12, "whole": 24}
"""Many steps in one round rather than many rounds, because most of a round's time is the start."""
RATIOS = {
    "generate": "the sampler's CPU seconds over those of bare vLLM",
    "update": "the learner's CPU seconds over those of bare torch",
    "plumbing": "CPU seconds of everything else (driver, reward, Ray) over those of bare vLLM and torch",
    "step": "all CPU seconds over those of bare vLLM and torch",
}
Ratios = dict[str, float]
"""`SIDE/NAME` -> ratio."""


def ratios(figures: Mapping[str, Figures]) -> Ratios:
    floor, result = figures["bare"], {}
    for side in set(figures) - {"bare"}:
        own = figures[side]
        result |= {
            f"{side}/generate": own["generate_cpu"] / floor["generate_cpu"],
            f"{side}/update": own["update_cpu"] / floor["update_cpu"],
            f"{side}/plumbing": own["plumbing_cpu"] / floor["cpu"],
            f"{side}/step": own["cpu"] / floor["cpu"],
        }
    return result


def slower(now: Ratios, expected: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Describe ratios above their tolerance, and ratios without an expected value."""
    lines = []
    for name, value in sorted(now.items()):
        side, _, kind = name.partition("/")
        if name not in expected:
            lines.append(f"{name}: {value:.2f}, and {EXPECTED.name} has no figure for it")
        elif value > (most := expected[name]["ratio"] * expected[name]["tolerance"]):
            lines.append(
                f"{name}: {value:.2f}, expected {expected[name]['ratio']:.2f} and at most {most:.2f}. It is "
                f"{RATIOS[kind]}, with trainer.max_staleness={side.removeprefix('k')}"
            )
    return lines


def speed(sides: list[str], steps: int) -> Ratios:
    with tempfile.TemporaryDirectory() as scratch:
        return ratios(measure(Benchmark("W1", steps, 2, Path(scratch), None), ["bare", *sides], repeats=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="synchronous training alone, fewer steps")
    parser.add_argument("--accept", action="store_true", help="write what is measured as what is expected")
    arguments = parser.parse_args()
    sides, steps = (["k0"], STEPS["quick"]) if arguments.quick else (["k0", "k1"], STEPS["whole"])
    expected = json.loads(EXPECTED.read_text())
    now = speed(sides, steps)
    if arguments.accept:
        tolerances = {name: one["tolerance"] for name, one in expected.items()}
        accepted = {name: {"ratio": round(now[name], 2), "tolerance": tolerances.get(name, 1.3)} for name in now}
        EXPECTED.write_text(json.dumps(expected | accepted, indent=2, sort_keys=True) + "\n")
        print(f"wrote {EXPECTED}")
        return
    if slower(now, expected):
        again = speed(sides, steps)
        now = {name: min(value, again[name]) for name, value in now.items()}
    for name, value in sorted(now.items()):
        print(f"{name}: {value:.2f} (expected {expected.get(name, {}).get('ratio', 'nothing')})")
    complaints = slower(now, expected)
    if ASYNCHRONY.is_file() and subprocess.run([sys.executable, str(ASYNCHRONY), "--quick"], cwd=ROOT).returncode:
        complaints.append("benchmarks/asynchrony.py --quick failed: see above")
    if complaints:
        print("\nslower than it was:", *complaints, sep="\n- ", file=sys.stderr)
        print(
            "\n`python benchmarks/speed.py` shows where the time goes. For a change that is meant: make bench "
            "BENCH_ARGS=--accept, and commit benchmarks/expected.json with the reason.",
            file=sys.stderr,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
