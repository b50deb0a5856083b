"""Keys of other frameworks, typed: every one of the tables in the docs is answered with what the table says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rlkit.config.overrides import parse_overrides
from rlkit.config.reference import pages
from rlkit.config.vocabulary import TABLES, rows, words

Typed = Callable[..., str]
CHOSEN = {"trl_preferences": ["algorithm=dpo"]}
PATTERNS = [*words()["wishes"], *words()["commands"], *(one for own in words()["in_section"].values() for one in own)]


def answers(said: str) -> dict[str, str]:
    """The argument as typed -> what is said of it."""
    return dict(line.removeprefix("  - ").split(": ", 1) for line in said.splitlines() if line.startswith("  - "))


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_a_table_is_answered_with_what_the_table_says(name: str, refused: Typed) -> None:
    keys = {key: here for row in rows(name) for key, here in row.keys.items() if here != (key,)}
    assert len(keys) > 20
    typed = {key if "=" in key else f"{key}=1": here for key, here in keys.items()}
    said = answers(refused(*CHOSEN.get(name, []), *typed))
    lacking = [(key, said.get(key)) for key, here in typed.items() if not all(one in said.get(key, "") for one in here)]
    assert lacking == []


def test_the_answer_says_what_differs(refused: Typed) -> None:
    said = answers(refused("actor_rollout_ref.actor.ppo_mini_batch_size=4", "async_queue_size=2", "train_batch_size=8"))
    assert said["actor_rollout_ref.actor.ppo_mini_batch_size=4"] == (
        "no such key; did you mean learner.minibatches_per_step? "
        "(a number of minibatches, not their size: train_batch_size / ppo_mini_batch_size)"
    )
    assert said["async_queue_size=2"].endswith("(a bound in updates, and nothing is dropped (docs/performance.md))")
    both = said["train_batch_size=8"]  # OpenRLHF's, or verl's without its section
    assert "learner.minibatches_per_step or trainer.prompts_per_step?" in both


def test_an_option_with_dashes_is_answered_alike() -> None:
    for row in rows("openrlhf"):
        for key, here in row.keys.items():
            for typed in (f"--{key}", f"--{key}=1", f"--{key.replace('_', '-')}"):
                (problem,) = parse_overrides([typed], {}).problems
                assert all(one in problem.message for one in here), typed


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("algorithm.loss_type=kto_pair", "that is algorithm=kto"),
        ("algorithm.loss_type=[sigmoid]", "that is algorithm=dpo"),
        ("importance_sampling_level=token", "--help lists all keys"),
        ("foo.enable=true", "--help lists all keys"),
        ("critic.lr=1", "did you mean critic.learning_rate?"),
        ("evaluation.max_new_tokens=9", "did you mean evaluation.max_response_tokens?"),
        ("model_path=x", "did you mean model.path or reward.model_path?"),
    ],
)
def test_a_meaning_is_that_of_the_value_and_of_the_section(typed: str, said: str, refused: Typed) -> None:
    assert said in refused(typed)


def test_other_names_are_of_keys_that_exist() -> None:
    """As the tables' are (tests/test_site.py)."""
    known = {key for text in pages().values() for key in re.findall(r"^`([\w.]+)`$", text, flags=re.MULTILINE)}
    here = {name for row in rows("others") for names in row.keys.values() for name in names}
    assert {name for name in here if "=" not in name} <= known


def test_every_pattern_is_one() -> None:
    for pattern, text in (pair for one in PATTERNS for pair in one.items()):
        match = re.compile(pattern)
        assert match and text
