"""Every recipe of conf/algorithm is a valid run with the data it is for, and stands in docs/algorithms.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

RECIPES = sorted(file.stem for file in (ROOT / "conf" / "algorithm").glob("*.yaml"))
PREFERENCES = [r for r in RECIPES if "Preference" in (ROOT / "conf" / "algorithm" / f"{r}.yaml").read_text()]
FRESH = ("cream", "dno", "pacs", "rdp", "copg", "mm_dpo")
"""Preferences that are about the policy's own responses, or scores."""
STEPS = ("prime", "pure", "grpo_process", "rloo_process", "episode_plus_step", "turn_discounted")
TURNS = ("turn_grpo", "gigpo", "ppo_turns")
OTHERS = {
    "distill": ["algorithm.teacher=embedded:policy"],
    "igpo": ["environment=hidden_facts"],
    "gdpo": ["algorithm.components={correct: 1}"],
    "pacs": ["reward=rule"],
    **{name: ["reward=implicit_prm"] for name in STEPS},
    **{name: ["environment=maze"] for name in TURNS},
}


PAIRS = ("data=pairs", "data.path=pairs.jsonl")


@pytest.fixture(autouse=True)
def pairs(folder: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": f"{i}!"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_with_its_data(recipe: str, accepted: Callable[..., str]) -> None:
    options = list(OTHERS.get(recipe, ()))
    if recipe in PREFERENCES and recipe not in FRESH:
        options += PAIRS
    if recipe == "tgdpo":
        options += ["algorithm.guide=embedded:policy"]
    if recipe == "sft":
        options += ["data=jsonl", "data.path=train.jsonl"]
    text = accepted(f"algorithm={recipe}", *options)
    assert ("the data have the responses" in text) == ("data=pairs" in options or recipe == "sft")


def test_ppo_says_where_turns_would_count_twice(accepted: Callable[..., str]) -> None:
    assert "they count twice" in accepted("algorithm=ppo_turns", "environment=maze")
    assert "they count twice" not in accepted("algorithm=ppo_turns", "environment=maze", "reward.value=none")
    assert "they count twice" not in accepted("algorithm=gigpo", "environment=maze")
    assert "they count twice" not in accepted("algorithm=ppo", "reward=[rule,format]"), "without process rewards"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_in_the_docs(recipe: str) -> None:
    assert f"`{recipe}`" in (ROOT / "docs" / "algorithms.md").read_text()


@pytest.mark.parametrize(("typed", "passes"), [("trainer.total_steps=60", None), ("trainer.total_epochs=2", 2)])
def test_the_plan_of_recorded_responses_counts_them(
    typed: str, passes: int | None, accepted: Callable[..., str]
) -> None:
    text = accepted("algorithm=dpo", *PAIRS, typed, "trainer.prompts_per_step=4", "learner.epochs_per_step=2")
    prompts, responses, pairs = re.findall(r"training data +(\d+) prompts, (\d+) responses, (\d+) pairs", text)[0]
    assert int(prompts) == int(pairs) == int(responses) / 2 > 30
    steps = round(2 * int(prompts) / 4) if passes else 60
    expected = (
        f"{steps} steps x 2 = {2 * steps} optimizer steps, {passes or 240 / int(prompts):.3g} passes over the data"
    )
    assert expected in text
    assert "Polar" not in text, "no reward starts"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("algorithm=dpo algorithm.bta=1", "did you mean algorithm.beta?"),
        ("algorithm=grpo", "Recorded pairs train algorithm=dpo"),
        ("algorithm=dpo trainer.max_staleness=1", "trainer.max_staleness=1: has no effect"),
        ("algorithm=dpo rollout.workers=2", "rollout.workers=2: has no effect"),
        ("algorithm=dpo trainer.max_mismatch=1", "trainer.max_mismatch=1: has no effect"),
    ],
)
def test_what_does_not_fit_recorded_pairs_is_said_once(typed: str, words: str, refused: Callable[..., str]) -> None:
    answer = refused(*typed.split(), *PAIRS)
    assert words in answer
    assert "1 problem " in answer, answer
