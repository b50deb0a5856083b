"""What new users typed that was wrong: what they read, and that nothing starts (exit code 2).

The cases are the rows of the tables of a newcomer's study: messages that misled, and values that were accepted.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlkit import cli, train
from rlkit.config.metric_names import FAMILIES, METRICS
from rlkit.config.vocabulary import COMMANDS, OTHER_NAMES, WISHES
from rlkit.experience.names import edits, nearest

Typed = Callable[..., str]

REWARDS = "def exact(completions, **columns):\n    return [0.0] * len(completions)\n"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which is also the home, of a user."""
    here = tmp_path / "user"
    (here / "things" / "photos").mkdir(parents=True)
    (here / "empty").mkdir()
    (here / "my_rewards.py").write_text(REWARDS)
    rows = "".join(f'{{"question": "What is {n} + 1?", "answer": "{n + 1}"}}\n' for n in range(64))
    (here / "train.jsonl").write_text(rows)
    (here / "copy.jsonl").write_text(rows)
    (here / "template.jinja").write_text(TEMPLATE)
    (here / "no_messages.jinja").write_text("{{ prompt }}")
    (here / "broken.jinja").write_text("{% for message in messages %}")
    for name in "abcd":
        (here / "things" / f"{name}.txt").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.syspath_prepend(str(here))
    yield here
    sys.modules.pop("my_rewards", None)


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    def run(*arguments: str) -> str:
        assert train.main([*arguments, "dry_run=true"]) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Output and warnings of a configuration that is right."""

    def run(*arguments: str) -> str:
        code = train.main([*arguments, "dry_run=true"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out + printed.err

    return run


MISLEADING = {
    "algorithm.eps_clip=-1": ["algorithm.clip_low and algorithm.clip_high"],
    "reward=null": ["a run needs one", "rule"],
    "rewards=rule": ["did you mean reward?"],
    "reward=rule.yaml": ["reward=rule"],
    "learner.betas=[0.9]": ["learner.betas=[0.9]: must be a list of 2", "like [0.9,0.999]"],
    "reward=function reward.function=my_rewards.py": ["names a file", "my_rewards.exact"],
    "reward=function reward.function=my_rewards.exakt": ["did you mean my_rewards.exact?"],
    "resume=true": ["did you mean resume=auto?"],
    "resume=latest": ["did you mean resume=auto?"],
    "resume=false": ["did you mean resume=never?"],
    "resume=auto": ["add run_dir=FOLDER"],
    "--config": ["--config: needs a file"],
    "--config trainer.total_steps=3": ["--config: needs a file"],
    "--multirun": ["there are no sweeps"],
    "-m": ["there are no sweeps"],
    "--cfg=job": ["dry_run=true prints the plan"],
    "trainer.total_steps:␣3": ["write trainer.total_steps=3"],
    "rollout.temperature=0": ["must be above 0", "all responses to a prompt are the same", "evaluation.greedy=true"],
    "algorithm=dapo algorithm.gae_lambda=.9": ["it belongs to algorithm=ppo"],
    "algorithm.gama=1": ["did you mean algorithm.gamma?", "it belongs to algorithm=ppo"],
    "algorithm.nothing=1": ["--help algorithm lists the keys"],
    "model.lora_rank=8": ["LoRA is not supported"],
    "model.lora.rank=8": ["LoRA is not supported"],
    "peft=lora": ["LoRA is not supported"],
    "tracking.wandb=true": ["W&B is not supported", "tracking.tensorboard"],
    "tracking=wandb": ["W&B is not supported", "available: default"],
    "tracking=mlflow": ["this tracker is not supported"],
    "trainer.logger=wandb": ["another tracker is not supported"],
    "rollout.name=hf": ["the sampler is vLLM"],
    "reward=[rule,length] reward.parts.length.weight=0": ["reward.parts.length: set reward.parts.length.max_tokens"],
    "algorithm=dpo": ["DPO", "not supported", "train_reward"],
    "algorithm=sft": ["python -m rlkit.sft"],
    "algorithm=nope": ["1 problem", "algorithm=nope: no such option; available: brpo"],
    "algorithm=purre": ["1 problem", "did you mean pure?"],
    "model=Qwen/Qwen3-0.6B": ["model=hf model.path=FOLDER"],
    "rollout.multi_turn=true": ["several turns, tools and environments are not supported"],
    "rollout.tools=[search]": ["several turns, tools and environments are not supported"],
    "env=gym": ["several turns, tools and environments are not supported"],
    "model.enable_thinking=false": ["model.chat_template=FILE"],
    "data.chat_template_kwargs.enable_thinking=false": ["model.chat_template=FILE"],
    "rollout.stop=[x]": ["stop strings are not supported"],
    "trainer.epochs=2": ["there are no epochs", "trainer.total_steps"],
    "algorithm.ppo_epochs=2": ["learner.minibatches_per_step"],
    "learner.adam_eps=1e-6": ["AdamW's eps is 1e-8"],
    "learner.optimizer=sgd": ["the optimizer is AdamW"],
    "trainer.evaluation_samples=8": ["evaluation.samples"],
    "rollout.eval_temperature=0": ["evaluation.greedy", "evaluation.temperature"],
    "evaluation.pass_at_k=8": ["evaluation.samples"],
    "algorithm.cliprange=0.2": ["algorithm.clip_low and algorithm.clip_high"],
    "critic.lr=1e-5": ["did you mean critic.learning_rate?"],
    "trainer.max_steps=5": ["did you mean trainer.total_steps?"],
    "data=train.jsonl": ["data=jsonl data.path=train.jsonl"],
    "reward=my_rewards.py": ["reward.function=my_rewards.NAME"],
    "algorithm.lambd=0.9": ["algorithm.gae_lambda, which the chosen algorithm does not have"],
    "data.train_files=x.jsonl": ["data.path, which the chosen data does not have"],
    "actor_rollout_ref.rollout.n=8": ["did you mean algorithm.samples_per_prompt?"],
    "data.path=a(b": ["1 problem", "cannot be parsed", "\"data.path='a(b'\""],
}
"""Arguments (␣ is a blank inside one) -> words of the answer."""


@pytest.mark.parametrize("typed", MISLEADING)
def test_a_mistake_is_answered_by_name(typed: str, refused: Typed) -> None:
    answer = refused(*(argument.replace("␣", " ") for argument in typed.split()))
    for words in MISLEADING[typed]:
        assert words in answer
    assert "Traceback" not in answer


WRONG = {
    "learner.learning_rate=1": ["moves every weight"],
    "learner.learning_rate=10": ["at most 1"],
    "algorithm=ppo critic.learning_rate=0.5": ["critic.learning_rate", "moves every weight"],
    "algorithm.entropy_coefficient=nan": ["must be finite"],
    "algorithm.entropy_coefficient=-5": ["at least 0"],
    "algorithm.kl_coefficient=1e9": ["at most 1000"],
    "algorithm.kl_coefficient=inf": ["must be finite"],
    "algorithm=ppo algorithm.process_coefficient=-1": ["at least 0"],
    "algorithm=prime algorithm.outcome_coefficient=nan": ["must be finite"],
    "buffer.min_group_reward=nan": ["must be finite"],
    "reward=[rule,polar] reward.parts.polar.weight=nan": ["reward.parts.polar.weight=nan: must be finite"],
    "trainer.best_metric=acuracy/heldout": ["did you mean accuracy/heldout?"],
    "trainer.best_metric=accuracy": ["did you mean accuracy/"],
    "seed=99999999999999999999": ["at most 9223372036854775807"],
    "cluster.address=127.0.0.1:1": ["no Ray answers there", "Connection refused", "ray start --head"],
    "run_dir=": ["run_dir=: is empty"],
    "run_dir=/": ["no folder for a run's files"],
    "run_dir=.": ["no folder for a run's files"],
    "run_dir=~": ["no folder for a run's files"],
    "run_dir=/proc/x": ["no folder for a run's files"],
    "run_dir=/dev/shm/../x": ["no folder for a run's files"],
    "run_dir=things": ["holds other things (a.txt, b.txt, c.txt, ...) and no run"],
    "rollout.max_prompt_tokens=1": ["at least 8"],
    "trainer.prompts_per_step=1000000": ["need", "GiB of memory at their peak"],
    "rollout.max_concurrent_samples=1000000": ["at most 65536"],
    "trainer.step_timeout_seconds=1e-9": ["at least 1"],
    "trainer.startup_timeout_seconds=0.001": ["at least 1"],
    "reward=rule reward.timeout_seconds=1e-9": ["at least 0.1"],
    "trainer.max_staleness=100": ["could be sampled by the first policy"],
    "data.heldout_problems=100000000": ["at most 1000000"],
    "reward=judge reward.base_url=http://127.0.0.1:1/v1 reward.model=m": ["no judge answers there"],
    "reward=polar reward.backend=http_vllm reward.urls=[http://127.0.0.1:1]": ["no POLAR server answers there"],
    "reward=[rule,format] reward.parts.rule.weight=0 reward.parts.format.weight=0": ["every reward is 0"],
    "model.chat_template=/etc/passwd": ["does not use `messages`"],
    "model.chat_template=no_messages.jinja": ["does not use `messages`"],
    "model.chat_template=broken.jinja": ["is no Jinja template"],
    "model.chat_template=gone.jinja": ["no such file"],
    "data=jsonl data.path=train.jsonl data.heldout_path=train.jsonl": ["has the rows of data.path"],
    "data=jsonl data.path=train.jsonl data.heldout_path=copy.jsonl": ["has the rows of data.path (copy.jsonl)"],
    "data=jsonl data.path=[my_rewards.py,train.jsonl] data.heldout_path=c*.jsonl": ["has the rows of data.path"],
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_value_that_cannot_be_meant_is_refused(typed: str, refused: Typed) -> None:
    answer = refused(*typed.split())
    for words in WRONG[typed]:
        assert words in answer
    assert "Traceback" not in answer


DOUBTFUL = {
    "trainer.prompts_per_step=10000": "80,000 responses in each of 60 steps (8 for each prompt), 4,800,000 in",
    "trainer.max_staleness=20": "a policy 20 updates old",
    "learner.learning_rate=0.05": "moves every weight",
    "algorithm.kl_coefficient=50": "outweighs the rewards",
    "trainer.best_metric=my_area/my_metric": "No metric of rlkit has this name",
    "data.train_problems=1": "the same questions several times",
    "cluster.address=auto": "no Ray runs on this machine",
}


@pytest.mark.parametrize("typed", DOUBTFUL)
def test_what_may_be_meant_is_warned_about(typed: str, accepted: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.config.places.ray_here", lambda: None)
    assert DOUBTFUL[typed] in accepted(typed)


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("run_dir=~/runs/x", "user/runs/x"),
        ("run_dir=~", None),
        ("run_dir=runs/ünïcode", "runs/ünïcode"),
        ("run_dir=runs/😀 x", "runs/😀 x"),
        ("run_dir=runs/lr=1e-5", "runs/lr=1e-5"),
        ("run_dir=~/runs/ü=${trainer.total_steps}", "user/runs/ü=60"),
        ("run_dir='~/a(b'", "user/a(b"),
        ("run_dir=empty", "user/empty"),
        ("run_dir=/dev/shm/a_run", "/dev/shm/a_run"),
    ],
)
def test_a_path_is_what_was_typed(typed: str, path: str | None, accepted: Typed, refused: Typed) -> None:
    if path is None:
        refused(typed)
    else:
        (line,) = re.findall(r"run folder +(.*)", accepted(typed))
        assert line.endswith(path)


def test_home_is_found_in_every_path(accepted: Typed) -> None:
    accepted("data=jsonl", "data.path=~/train.jsonl", "model.chat_template=~/template.jinja")


def test_a_folder_may_hold_the_notes_of_its_user(folder: Path, accepted: Typed) -> None:
    for name in ("start.sh", "out.log", ".gitkeep"):
        (folder / "empty" / name).touch()
    accepted("run_dir=empty")


def test_who_listens_is_found(accepted: Typed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        accepted("reward=judge", f"reward.base_url=http://127.0.0.1:{port}/v1", "reward.model=m")
        accepted(f"cluster.address=127.0.0.1:{port}")


def test_an_interval_of_the_preset_is_no_mistake_of_the_user(accepted: Typed) -> None:
    assert "never comes" not in accepted("trainer.total_steps=2")
    assert "never comes" in accepted("trainer.total_steps=2", "trainer.evaluate_every_steps=15")


# -- commands and help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("view", "samples.jsonl"),
        ("compare", "tensorboard --logdir"),
        ("chat", "step_NNNNNN/policy"),
        ("evaluate", "not supported yet"),
        ("dpo", "DPO"),
        ("lora", "LoRA is not supported"),
        ("grpo", "rlkit train algorithm=NAME"),
        ("trian", "did you mean train?"),
        ("train_rewards", "did you mean train-reward?"),
        ("frobnicate", "no such command; available: convert-polar"),
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


def test_help_on_a_part_lists_its_options(help_on: Typed) -> None:
    text = help_on("algorithm")
    assert "Dr. GRPO (arXiv 2503.20783)" in text
    assert "algorithm.clip_low" not in text


def test_help_on_a_word_finds_keys(help_on: Typed) -> None:
    text = help_on("clip")
    assert "algorithm.clip_low" in text
    assert "trainer." not in text


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


def test_every_pattern_of_a_wish_is_one() -> None:
    for pattern, text in (*WISHES, *COMMANDS):
        assert re.compile(pattern)
        assert text


def test_other_frameworks_names_lead_to_keys_that_exist(help_on: Typed) -> None:
    listed = set(re.findall(r"^  (\w+(?:\.\w+)*)  ", help_on(), flags=re.MULTILINE))
    assert {key for key in OTHER_NAMES.values() if key not in listed} == set()


def test_metrics_of_the_docs_are_known(repository: Path) -> None:
    """A metric with a row in docs/metrics.md belongs into rlkit/config/metric_names.py."""
    rows = re.findall(r"^\| (`[^|]*) \|", (repository / "docs/metrics.md").read_text(), flags=re.MULTILINE)
    named = {name for cell in rows for name in re.findall(r"`([a-z_]+/[a-z0-9_/<>]+)`", cell)}
    assert {name for name in named if name not in METRICS and not name.startswith(FAMILIES)} == set()
