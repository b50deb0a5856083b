"""What `make bench` calls slower."""

from __future__ import annotations

import json

from benchmarks.gate import EXPECTED, RATIOS, ratios, slower

BARE = {"generate_cpu": 0.2, "update_cpu": 0.3, "cpu": 0.5}
RUN = {"generate_cpu": 0.25, "update_cpu": 0.15, "plumbing_cpu": 0.1, "cpu": 0.5}


def test_ratios_are_of_the_same_work_without_a_framework() -> None:
    assert ratios({"bare": BARE, "k0": RUN}) == {
        "k0/generate": 1.25,
        "k0/update": 0.5,
        "k0/plumbing": 0.2,
        "k0/step": 1.0,
    }


def test_only_what_is_above_its_tolerance_is_slower() -> None:
    expected = {"k0/update": {"ratio": 0.5, "tolerance": 1.2}, "k0/step": {"ratio": 2.0, "tolerance": 1.0}}
    assert slower({"k0/update": 0.6, "k0/step": 1.0}, expected) == []
    (line,) = slower({"k0/update": 0.61, "k0/step": 2.0}, expected)
    assert line.startswith("k0/update: 0.61, expected 0.50 and at most 0.60")
    (line,) = slower({"k1/step": 1.0}, expected)
    assert "no figure" in line


def test_every_ratio_is_expected() -> None:
    expected = json.loads(EXPECTED.read_text())
    assert set(expected) == {f"{side}/{name}" for side in ("k0", "k1") for name in RATIOS}
