"""Every recipe of conf/algorithm is a valid run with the data it is for, and stands in docs/algorithms.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

RECIPES = sorted(file.stem for file in (ROOT / "conf" / "algorithm").glob("*.yaml"))
PREFERENCES = [r for r in RECIPES if "Preference" in (ROOT / "conf" / "algorithm" / f"{r}.yaml").read_text()]
FRESH = ("cream", "dno", "pacs", "rdp", "copg", "mm_dpo")
"""Preferences that are about the policy's own responses, or scores."""
STEPS = ("prime", "pure", "grpo_process", "rloo_process", "episode_plus_step", "turn_discounted")
OTHERS = {
    "distill": ["algorithm.teacher=embedded:policy"],
    "gdpo": ["algorithm.components={correct: 1}"],
    "pacs": ["reward=rule"],
    **{name: ["reward=implicit_prm"] for name in STEPS},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_with_its_data(recipe: str, folder: Path, accepted: Callable[..., str]) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": f"{i}!"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = list(OTHERS.get(recipe, ()))
    if recipe in PREFERENCES and recipe not in FRESH:
        options += ["data=pairs", "data.path=pairs.jsonl"]
    if recipe == "tgdpo":
        options += ["algorithm.guide=embedded:policy"]
    if recipe == "sft":
        options += ["data=jsonl", "data.path=train.jsonl"]
    text = accepted(f"algorithm={recipe}", *options)
    assert ("the data bring the responses" in text) == ("data=pairs" in options or recipe == "sft")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_in_the_docs(recipe: str) -> None:
    assert f"`{recipe}`" in (ROOT / "docs" / "algorithms.md").read_text()
