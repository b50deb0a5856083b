"""Loading a configuration: what is accepted, and what the user reads when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun, config_text

Load = Callable[..., ResolvedRun]
Problems = Callable[..., list[str]]

PARTS = '''
from pydantic import Field
from algorithms.base import Algorithm, AlgorithmConfig, AlgorithmNeeds
from rewards.base import Reward, RewardConfig, RewardTraits
from rlkit.data.base import DataConfig, DataSource

class MyReward(Reward):
    """A user's reward."""
    @classmethod
    def traits(cls, config):
        return RewardTraits(references=True, columns=("rubric",))
    class Config(RewardConfig):
        threshold: float = Field(default=0.5, ge=0, le=1)
        mode: str = "plain"
    def score(self, groups):
        return []

class MyData(DataSource):
    class Config(DataConfig):
        size: int
    def load(self, split):
        return [], []
    def provides(self):
        return frozenset({"references", "rubric"})

class MyAlgorithm(Algorithm):
    class Config(AlgorithmConfig):
        clip: float = 0.2
    def needs(self):
        return AlgorithmNeeds(min_samples_per_prompt=2, layout="full_group")
    def advantages(self, experience):
        raise NotImplementedError
    def loss(self, inputs):
        raise NotImplementedError

class HalfReward(Reward):
    pass

class FussyReward(MyReward):
    @classmethod
    def traits(cls, config):
        return RewardTraits()
    @classmethod
    def check(cls, config):
        return [f"mode={config.mode}: no such folder"]

class FussyData(MyData):
    def __init__(self, config, seed):
        raise RuntimeError("no luck")

not_a_class = 3
'''


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a user with a module of own classes."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "my_parts.py").write_text(PARTS)
    (folder / "broken_module.py").write_text("import math\nvalue = 1 / 0\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("my_parts", None)


@pytest.fixture
def load(user_folder: Path, bare_model: Path) -> Load:
    """Load overrides on a configuration that is valid: a model folder and the rule reward."""
    return lambda *overrides, **more: load_config([f"model.path={bare_model}", "reward=rule", *overrides], **more)


@pytest.fixture
def problems(load: Load) -> Problems:
    """The messages of a configuration that must be refused."""

    def refused(*overrides: str, **more: Path) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, **more)
        return [str(problem) for problem in caught.value.problems]

    return refused


def test_defaults_resolve_to_typed_parts(load: Load) -> None:
    run = load()
    assert run.algorithm_class.__name__ == "GRPO"
    assert run.algorithm_config.samples_per_prompt == 8
    assert run.reward_class.__name__ == "MathReward"
    assert run.config.reward["timeout_seconds"] == run.reward_config.timeout_seconds
    assert run.config.run_dir.is_absolute()
    assert run.config.run_dir.parent.name == "runs"
    assert run.config.run_dir.name.endswith("_grpo_rule")


def test_command_line_beats_the_model_s_recipe(load: Load) -> None:
    assert load().config.learner.learning_rate != load("model=hf").config.learner.learning_rate
    assert load("learner.learning_rate=0.05").config.learner.learning_rate == 0.05


def test_later_arguments_beat_earlier_ones(load: Load) -> None:
    assert load("trainer.total_steps=3", "trainer.total_steps=4").config.trainer.total_steps == 4


@pytest.mark.parametrize("prefix", ["+", "++"])
def test_hydra_prefixes_mean_the_same_key(load: Load, prefix: str) -> None:
    assert load(f"{prefix}trainer.total_steps=3").config.trainer.total_steps == 3


def test_an_experiment_chooses_parts_and_values(problems: Problems) -> None:
    (problem,) = problems("experiment=gsm8k")
    assert problem.startswith("data.path: needs a value; write data.path=VALUE (File with the training problems")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward=polr", "reward=polr: no such option; did you mean polar? available: code, combined, "),
        ("cluster=gpu", "cluster=gpu: no such option; for one GPU use cluster=single_gpu, for a machine of eight "),
        ("cluster=multi_gpus", "cluster=multi_gpus: no such option; did you mean multi_gpu? available: local_cpu, "),
        ("reward=zzz", "reward=zzz: no such option; available: code, combined, "),
        ("reward=null", "reward=null: a run needs one; available: code, "),
        ("reward=my_parts.MyReward", "reward._target_=my_parts.MyReward"),
        ("trainer.total_step=3", "trainer.total_step=3: no such key; did you mean trainer.total_steps?"),
        ("trainer.total=3", "trainer.total=3: no such key; did you mean trainer.total_steps?"),
        ("total_steps=3", "did you mean trainer.total_steps?"),
        ("optimizer.learning_rate=3", "learner.learning_rate"),
        ("lr=3", "lr=3: no such key; did you mean learner.learning_rate?"),
        ("learner.lr=3", "learner.lr=3: no such key; did you mean learner.learning_rate?"),
        ("samples_per_prompt=4", "did you mean algorithm.samples_per_prompt?"),
        ("trainer.samples_per_prompt=4", "did you mean algorithm.samples_per_prompt?"),
        ("+foo.bar=3", "+foo.bar=3: no such key"),
        ("reward.tiemout_seconds=3", "did you mean reward.timeout_seconds?"),
        ("trainer={total_step: 3}", "did you mean trainer.total_steps?"),
        (
            "data.prompt_column=q",
            "Arithmetic does not have it (it belongs to data=chat, data=csv, data=hf, data=jsonl, data=pairs, "
            "data=parquet and data=responses)",
        ),
        ("trainer.total_steps=0", "trainer.total_steps=0: must be an integer, at least 1"),
        ("trainer.total_steps=2.5", "trainer.total_steps=2.5: must be an integer"),
        ("trainer.total_steps=many", "trainer.total_steps=many: must be an integer"),
        ("trainer.total_steps=true", "trainer.total_steps=true: must be an integer"),
        ("trainer.total_steps=null", "trainer.total_steps=null: must be an integer"),
        ("algorithm.samples_per_prompt=0", "algorithm.samples_per_prompt=0: must be an integer, at least 1"),
        ("rollout.top_p=1.5", "rollout.top_p=1.5: must be a number, above 0 and at most 1"),
        ("learner.learning_rate=inf", "learner.learning_rate=inf: must be finite"),
        ("learner.learning_rate=nan", "learner.learning_rate=nan: must be finite: a number, above 0"),
        ("learner.betas=[0.9,1.5]", "must be a list of 2 (a number, at least 0 and below 1, a number"),
        ("rollout.dtype=flot32", "rollout.dtype=flot32: did you mean float32? must be one of auto, float32"),
        ("tracking.console=loud", "tracking.console=loud: must be one of auto, live, plain, off"),
        ("seed.x=1", "seed.x=1: must be an integer"),
        ("run_dir=${nope}", "run_dir=${nope}: Interpolation key 'nope' not found"),
        ("~seed", "~seed: keys cannot be removed"),
        ("--seed=3", "--seed=3: options have no dashes here; write seed=3"),
        ("dry_run", "dry_run: did you mean dry_run=true?"),
        ("seed=1,2", "seed=1,2: one run takes one value, not a sweep"),
        ("seed =1", "seed =1: remove the spaces around `=`"),
        ("run_dir=a(b", "run_dir=a(b: cannot be parsed"),
        ("reward@x=rule", "packages (`@x`) are not used here; write reward=OPTION"),
        ("hydra.run.dir=x", "its own settings have no effect"),
        ("model.path=???", "model.path: needs a value; write model.path=VALUE"),
        ("model.path=5", "model.path=5: must be text"),
        ("model.path=nowhere", "model.path=nowhere: no such folder: "),
        ("model.path=some/model", "hf download some/model"),
        ("model.path=embedded:nothing", "there is no embedded model"),
    ],
)
def test_each_mistake_has_its_message(problems: Problems, override: str, message: str) -> None:
    found = problems(override)
    assert len(found) == 1, found
    assert message in found[0]


def test_all_problems_are_reported_together(problems: Problems) -> None:
    found = problems("reward=polr", "trainer.total_step=1", "lr=1", "rollout.top_p=3", "a b", "data._target_=no.Such")
    keys = ["reward=polr", "trainer.total_step=1", "lr=1", "rollout.top_p=3", "a b", "data._target_=no.Such"]
    for key in keys:
        assert any(line.startswith(key) for line in found), (key, found)


def test_abbreviations_are_never_accepted(problems: Problems) -> None:
    assert len(problems("train.total_steps=3")) == 1
    assert len(problems("trainer.total_s=3")) == 1
    assert len(problems("reward=rul")) == 1


def test_a_class_of_the_user_s_brings_its_own_fields(load: Load) -> None:
    run = load(
        "reward._target_=my_parts.MyReward",
        "reward.threshold=0.25",
        "data._target_=my_parts.MyData",
        "data.size=7",
        "algorithm._target_=my_parts.MyAlgorithm",
        "algorithm.clip=0.3",
    )
    assert run.reward_config.threshold == 0.25  # type: ignore[attr-defined]
    assert run.config.reward["_target_"] == "my_parts.MyReward"
    assert run.config.data == {"_target_": "my_parts.MyData", "max_bad_row_share": 0.01, "size": 7}
    assert run.make_algorithm().config.clip == 0.3
    assert run.config.run_dir.name.endswith("_MyAlgorithm_MyReward")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward._target_=my_parts.MyReward", "reward.treshold=1"], "did you mean reward.threshold?"),
        (["data._target_=my_parts.MyData"], "data.size: needs a value"),
        (["data._target_=my_parts.FussyData", "data.size=1"], "cannot be created: RuntimeError: no luck"),
        (["reward._target_=my_parts.FussyReward"], "reward._target_=my_parts.FussyReward: mode=plain: no such folder"),
        (["reward._target_=my_parts.MyRewrd"], "did you mean my_parts.MyReward?"),
        (["reward._target_=my_parts.HalfReward"], "lacks score()"),
        (["reward._target_=my_parts.MyData"], "is not a subclass of rewards.base.Reward"),
        (["reward._target_=my_parts.not_a_class"], "is not a class but int"),
        (["reward._target_=no_such_module.X"], "there is no module no_such_module"),
        (["reward._target_=broken_module.X"], "ZeroDivisionError: division by zero ("),
        (["reward._target_=MyReward"], "must be the dotted path of a class"),
        (["reward._target_=5"], "must be the dotted path of a class"),
        (["reward._target_=my_parts.MyReward"], "MyReward needs rubric with every prompt, but Arithmetic provides"),
    ],
)
def test_a_class_that_cannot_be_used_says_why(problems: Problems, overrides: list[str], message: str) -> None:
    found = problems(*overrides)
    assert len(found) == 1, found
    assert message in found[0]


def test_a_broken_module_is_named_with_its_line(problems: Problems) -> None:
    assert "broken_module.py:2)" in problems("reward._target_=broken_module.X")[0]


def test_written_configuration_gives_the_same_run_again(load: Load, tmp_path: Path) -> None:
    first = load(
        "reward._target_=my_parts.MyReward", "data._target_=my_parts.MyData", "data.size=7", "learner.betas=[0.8,0.9]"
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_text(first.config))
    again = load_config([], file)
    assert again.reward_config == first.reward_config
    before, after = first.config.model_dump(), again.config.model_dump()
    assert before.pop("run_dir").parent == after.pop("run_dir").parent
    assert before == after
    assert load_config(["trainer.total_steps=3"], file).config.trainer.total_steps == 3


def test_file_values_are_checked_and_named(load: Load, problems: Problems, user_folder: Path) -> None:
    file = user_folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"total_step": 3}, "learner": {"ranks": 0}}))
    found = problems(file=file)
    assert found == [
        f"{file}: trainer.total_step=3: no such key; did you mean trainer.total_steps?",
        f"{file}: learner.ranks=0: must be an integer, at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "cannot be read"), ("- 1", "must be a mapping"), (None, "cannot be read")]
)
def test_a_file_that_is_no_configuration(problems: Problems, user_folder: Path, text: str | None, message: str) -> None:
    file = user_folder / "mine.yaml"
    if text is not None:
        file.write_text(text)
    assert any(message in line for line in problems(file=file))


def test_an_option_and_a_file_for_one_part_exclude_each_other(problems: Problems, user_folder: Path) -> None:
    file = user_folder / "mine.yaml"
    file.write_text("reward: {_target_: my_parts.MyReward}\n")
    assert any("already sets reward" in line for line in problems(file=file))


def test_the_verifier_is_a_part_of_its_own(load: Load, tmp_path: Path) -> None:
    run = load("reward=rule", "reward.max_failed_share=0.3")
    assert run.verifier_class is run.reward_class
    assert run.verifier_config == run.verifier_class.Config() != run.reward_config

    chosen = load("verifier=gsm8k", "verifier.timeout_seconds=7")
    assert chosen.config.verifier["markers"] == ["####", "A:"]
    assert chosen.config.verifier["timeout_seconds"] == 7
    assert chosen.config.reward["timeout_seconds"] == 120


def test_a_file_from_before_there_was_a_verifier_gets_the_default(load: Load, tmp_path: Path) -> None:
    saved = yaml.safe_load(config_text(load().config))
    del saved["reward"], saved["run_dir"]
    default = saved.pop("verifier")
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(saved))

    assert load(file=file).config.verifier == default


def test_messages_about_the_verifier_name_its_keys(problems: Problems) -> None:
    asked = "set one of verifier.pattern and verifier.pattern_column"
    assert any(asked in line for line in problems("verifier=regex_match"))
