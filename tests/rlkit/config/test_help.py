"""Commands that are none, --help, --version, and the names that a user may mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlkit import cli, train
from rlkit.experience.names import edits, nearest

Typed = Callable[..., str]
KINDS = ("dpo", "kto", "simpo")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("samples", "did you mean view?"),
        ("compare", "rlkit view RUN [RUN ...] shows"),
        ("infer", "rlkit generate"),
        ("validate", "did you mean evaluate?"),
        ("dpo", "rlkit train algorithm=NAME"),
        ("lora", "model.lora.rank=16 trains a low-rank adapter"),
        ("grpo", "rlkit train algorithm=NAME"),
        ("trian", "did you mean train?"),
        ("train_rewards", "did you mean train-reward?"),
        ("--verison", "did you mean --version?"),
        ("--dry-run", "a command comes first, like rlkit train --dry-run"),
        ("frobnicate", "no such command; available: chat, convert-polar"),
    ],
)
def test_a_command_that_is_none(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command]) == 2
    answer = capsys.readouterr().err
    assert words in answer
    assert "did you mean convert-polar?" not in answer


@pytest.mark.parametrize("name", [None, *sorted(cli.COMMANDS)])
def test_every_command_has_a_version(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*([name] if name else []), "--version"]) == 0
    assert re.fullmatch(r"rlkit \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.fixture
def help_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        assert train.main(["--help", *words]) == 0
        return capsys.readouterr().out

    return run


def test_help_on_a_section_has_its_keys_alone(help_on: Typed) -> None:
    text = help_on("trainer")
    assert "trainer.total_steps  an integer, at least 1; default 60 (model=tiny; else 100)" in text
    assert "learner." not in re.sub(r"`[^`]*`", "", text)


def test_help_shows_what_the_chosen_model_sets(help_on: Typed) -> None:
    assert "default 1e-06\n" in help_on("model=hf", "learner.learning_rate")
    assert "default 0.0003 (model=tiny; else 1e-06)" in help_on("learner.learning_rate")
    assert "default cuda (cluster=multi_gpu; else cpu)" in help_on("cluster=multi_gpu", "cluster.device")


def test_help_on_an_option(help_on: Typed) -> None:
    text = help_on("reward=math")
    assert "reward.strip_units  true or false; default true (reward=math; else false)" in text
    assert "reward=polar" not in text
    assert "algorithm.gae_lambda" in help_on("algorithm=ppo")
    assert "algorithm.clip_high  a number, above 0; default 0.28 (algorithm=dapo; else 0.2)" in help_on(
        "algorithm=dapo"
    )
    assert "verifier.markers" in help_on("verifier=gsm8k")
    assert "rollout.workers=8" in help_on("cluster=multi_gpu")


def test_help_on_a_recipe_has_what_acts_there(help_on: Typed) -> None:
    kto = help_on("kto")
    assert kto == help_on("algorithm=kto")
    assert "algorithm=kto  KTO (arXiv 2402.01306)" in kto
    assert "Also sets learner.learning_rate=5e-06, unless model=NAME does" in kto
    assert "algorithm.desirable_weight" in kto
    of_pairs = {"algorithm.nll_coefficient", "algorithm.guide", "algorithm.guide_weight", "algorithm.better_prompt"}
    keys = {recipe: set(re.findall(r"^  (algorithm\.\w+)", help_on(recipe), flags=re.MULTILINE)) for recipe in KINDS}
    assert not of_pairs & keys["kto"]
    assert of_pairs <= keys["dpo"]
    assert not {"algorithm.desirable_weight", "algorithm.clip", "algorithm.target_margin"} & keys["dpo"]
    assert "algorithm.target_margin" in keys["simpo"]


def test_help_on_a_part_lists_its_options(help_on: Typed) -> None:
    text = help_on("algorithm")
    assert "Dr. GRPO (arXiv 2503.20783)" in text
    assert "algorithm.clip_low" not in text


def test_help_on_a_word_finds_keys(help_on: Typed) -> None:
    text = help_on("clip")
    assert "algorithm.clip_low" in text
    assert "trainer." not in text


def test_help_on_a_metric(help_on: Typed) -> None:
    text = help_on("reward/failed/timeout")
    assert "should be 0" in text
    assert "reward.timeout_seconds" in text
    assert "trainer.total_steps" not in help_on("accuracy/heldout")
    assert "trainer.total_steps" in help_on("accuracy/heldout", "trainer")
    assert "tokens/per_second" in help_on("metrics")
    assert "group/all_equal_share" in help_on("group/all")
    assert "accuracy/train" in help_on("accuracy")


def test_help_on_a_class_of_the_user(help_on: Typed, folder: Path) -> None:
    (folder / "my_rewards.py").write_text(
        "from rewards.base import Reward, RewardConfig\n"
        "class Mine(Reward):\n"
        '    """Mine alone."""\n'
        "    class Config(RewardConfig):\n"
        "        threshold: float = 0.5\n"
        "    def score(self, groups):\n"
        "        return []\n"
    )
    text = help_on("reward._target_=my_rewards.Mine")
    assert "Mine alone." in text
    assert "reward.threshold  a number; default 0.5" in text


def test_help_on_nothing_says_so(refused: Typed) -> None:
    assert "did you mean trainer?" in refused("--help", "tranier")
    assert "no such option; did you mean math?" in refused("--help", "reward=mth")
    assert "did you mean reward/mean?" in refused("--help", "reward/meen")
    assert "--help metrics all metrics" in refused("--help", "x/y")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "valid", "meant"),
    [
        ("trian", ["train", "serve"], "train"),
        ("nope", ["pure", "ppo"], None),
        ("view", ["convert-polar", "serve"], None),
        ("gpu", ["multi_gpu", "multi_node"], "multi_gpu"),
        ("POLAR", ["polar", "rule"], "polar"),
        ("reinforce++", ["reinforce_pp", "rloo"], "reinforce_pp"),
        ("x", ["ppo", "x1"], None),
        ("tools", ["top_p", "top_k"], None),
        ("", ["a", "b"], None),
    ],
)
def test_a_name_is_meant_only_if_it_is_near(name: str, valid: list[str], meant: str | None) -> None:
    assert nearest(name, valid) == meant


@pytest.mark.parametrize(
    ("left", "right", "count"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "acb", 1), ("polr", "polar", 1), ("kitten", "sitting", 3)],
)
def test_slips_between_two_texts(left: str, right: str, count: int) -> None:
    assert edits(left, right) == edits(right, left) == count
