"""`environment=...`: a part that may be absent; what it needs, and what has no effect with or without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import counting
import pytest
import yaml
from paths import ROOT

from rlkit.config.environments import longest_sample
from rlkit.config.help import print_help
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun, conf_dir, config_text
from rlkit.config.report import plan, plan_text
from rlkit.config.store import step_bytes
from rlkit.train import main

COUNTING = (
    "environment._target_=counting.Counting",
    "environment.placement=inline",
    "data=environment",
    "reward=environment",
    "verifier=environment",
)
AGENT = ("environment._target_=own_agents.Calculating", *COUNTING[2:])
Load = Callable[..., ResolvedRun]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(*arguments: str, file: Path | None = None) -> ResolvedRun:
        return load_config([f"run_dir={tmp_path / 'run'}", *arguments], file)

    return load


def refused(load: Load, *arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    return str(error.value)


def test_a_run_without_one_says_so_and_reads_older_files(load: Load, tmp_path: Path) -> None:
    run = load("reward=rule")
    assert run.environment_class is None and run.environment_config is None
    assert run.config.environment == {"_target_": None}
    assert "environment" not in plan_text(plan(run))
    values = yaml.safe_load(config_text(run.config))
    for written in (values, {key: value for key, value in values.items() if key != "environment"}):
        file = tmp_path / "old.yaml"
        file.write_text(yaml.safe_dump(written))
        assert load(file=file).config == run.config


def test_a_class_by_dotted_path_with_its_tasks(load: Load, tmp_path: Path) -> None:
    run = load(*COUNTING, "environment.numbers=5")
    assert run.environment_class is counting.Counting
    problems, _ = run.source.load("train")
    assert [problem.id for problem in problems] == [f"train-{n}" for n in range(5)]
    assert run.source.provides() == {"answer", "start"}
    text = plan_text(plan(run))
    assert "counting.Counting" in text and "in the rollout workers" in text and "at most 3 turns" in text
    file = tmp_path / "again.yaml"
    file.write_text(config_text(run.config))
    assert load(file=file).config == run.config
    changed = load("environment.numbers=4", file=file)
    assert len(changed.source.load("train")[0]) == 4
    beside = plan_text(plan(load(*COUNTING, "environment.placement=worker", "environment.workers=2")))
    assert "2 processes next to each rollout worker, up to 64 episodes each" in beside
    assert "host, environment worker" in beside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward=environment"], "reward=environment: EnvironmentReward reads what an environment gives"),
        (["reward=rule", "verifier=environment"], "verifier=environment: EnvironmentReward reads"),
        (
            [
                *("reward=implicit_prm", "algorithm=prime", "reward.outcome.per_turn=false"),
                "reward.outcome._target_=rewards.environment.EnvironmentReward",
            ],
            "ImplicitPRM reads what an environment gives",
        ),
        (["reward=rule", "data=environment"], "there is none: add environment=NAME"),
        (["reward=rule", "environment.max_turns=3"], "environment.max_turns=3: has no effect: there is no environment"),
        ([*COUNTING, "environment.max_turn=3"], "did you mean environment.max_turns?"),
        ([*COUNTING, "environment.workers=3"], "has no effect with environment.placement=inline"),
        ([*COUNTING, "environment.max_turn_tokens=1000"], "environment.max_turn_tokens=1000: is above rollout"),
        ([*COUNTING, "rollout.source=data", "data=arithmetic"], "talks to the policy turn by turn"),
        ([*COUNTING, "rollout.steps=lines"], "rollout.steps=lines: has no effect with an environment"),
        ([*COUNTING, "rollout.structured.regex=a+"], "the policy writes several turns"),
        (
            ["reward=rule", "environment._target_=counting.Asking"],
            "Asking needs price with every prompt, but Arithmetic",
        ),
        (["environment._target_=counting.Asking", "data=environment"], "Asking has no tasks"),
        (["environment._target_=counting.Untyped"], "the tool look: its argument item has no type"),
        (["environment._target_=counting.Nothing"], "counting has no Nothing"),
        (["environment._target_=pathlib.Path"], "is not a subclass of rlkit.environments.base.Environment"),
        (
            ["environment._target_=own_agents.Calculating", "environment.max_parallel_calls=2"],
            "environment.max_parallel_calls=2: has no effect: an agent runs the tools itself",
        ),
        (
            [*COUNTING, "environment.history=rerender", "reward=implicit_prm"],
            "reward=implicit_prm: runs a model over prompt and response as one row, but an episode (with",
        ),
        (
            [*COUNTING, "environment.history=rerender", "algorithm=igpo"],
            "IGPO as configured puts responses after other prompts as one row, but an episode (with",
        ),
        (
            [*AGENT, "reward=implicit_prm"],
            "as one row, but an episode (of an agent) may be several rows; choose another reward",
        ),
        ([*AGENT, "reward=progress"], "reward=progress: runs a model over prompt and response as one row"),
        ([*AGENT, "algorithm=kto"], "Preference as configured puts responses after other prompts as one row"),
        ([*COUNTING, "reward.discount=0.5"], "discount has no effect with reward.value=sum"),
    ],
)
def test_what_is_refused(load: Load, arguments: list[str], message: str) -> None:
    assert message in refused(load, *arguments)


def test_an_environment_without_rewards_is_judged_by_others(load: Load) -> None:
    program = ["environment=program", "environment.command=[python]", "data=arithmetic"]
    assert load(*program, "model=agent").environment_class is not None
    tools = ["environment=tools", "environment.tools=[calculator]", "data=arithmetic"]
    for environment in ([*program, "environment.prints_reward=false"], tools):
        said = refused(load, *environment, "model=agent", "reward=environment", "verifier=rule")
        assert "every episode would score 0; choose another reward (reward=math, ...)" in said


def test_what_the_rows_of_an_episode_may_have(load: Load) -> None:
    sizes = ("learner.tokens_per_microbatch=4000", "rollout.max_response_tokens=300")
    assert "all rows of an episode together have up to 4,000" in plan_text(plan(load(*AGENT, *sizes)))
    assert "all rows" not in plan_text(plan(load(*COUNTING, *sizes)))
    anew = load(*COUNTING, *sizes, "environment.history=rerender")
    assert "all rows of an episode" in plan_text(plan(anew))
    assert step_bytes(anew) > 5 * step_bytes(load(*COUNTING, *sizes))
    critic = ("algorithm=ppo", "critic.tokens_per_microbatch=2000")
    assert longest_sample(load(*AGENT, *sizes, *critic)) == 2000
    assert longest_sample(load(*AGENT, *sizes, "algorithm=dpo")) == 2000, "two at once"


def test_warnings(load: Load) -> None:
    many = load(*COUNTING, "environment.max_turn_tokens=64")
    assert any("3 turns of up to 64 tokens" in str(warning) for warning in many.warnings)
    clock = load(*COUNTING, "environment._target_=counting.Clock")
    assert any("a resumed run differs" in str(warning) for warning in clock.warnings)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo", "turn_discounted"])
def test_algorithms_of_outcomes_and_of_turns_take_its_reward(load: Load, algorithm: str) -> None:
    load(*COUNTING, f"algorithm={algorithm}")


def test_an_option_file_chooses_data_reward_and_verifier(load: Load, tmp_path: Path) -> None:
    """As those of games do; the command line still wins."""
    conf = tmp_path / "conf"
    shutil.copytree(conf_dir(), conf)
    (conf / "environment" / "counting.yaml").write_text(
        "# @package _global_\n# Say the next number.\ndefaults:\n  - override /data: environment\n"
        "  - override /reward: environment\n  - override /reward@verifier: environment\n"
        "environment:\n  _target_: counting.Counting\n  placement: inline\n"
        "rollout:\n  max_response_tokens: 40\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.config.loading.conf_dir", lambda: conf)
        run = load("environment=counting")
        assert run.reward_class.__name__ == run.verifier_class.__name__ == "EnvironmentReward"
        assert run.data_class.__name__ == "EnvironmentSource" and run.config.rollout.max_response_tokens == 40
        assert load("environment=counting", "reward=rule").reward_class.__name__ == "MathReward"
        assert "did you mean counting?" in refused(load, "environment=countin")


def test_help_lists_options_and_the_keys_of_an_own_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_help(["environment"]) == 0
    assert "No environment: every prompt gets one response" in capsys.readouterr().out
    assert print_help(["environment=none"]) == 0
    assert print_help(["environment._target_=counting.Counting"]) == 0
    shown = capsys.readouterr().out
    assert "environment.numbers" in shown and "environment.max_observation_tokens" in shown
    assert print_help([]) == 0


@pytest.fixture
def forgetful(tmp_path: Path) -> Path:
    """The agent's template, but an answer is left out once a user goes on."""
    template = (ROOT / "rlkit/embedded/agent/chat_template.jinja").read_text()
    said = "message['content']"
    assert said in template
    file = tmp_path / "forgetful.jinja"
    file.write_text(template.replace(said, f"({said} if message['role'] != 'assistant' or loop.last else '')"))
    return file


def dry_run(tmp_path: Path, *arguments: str) -> int:
    return main(["model=agent", *arguments, f"run_dir={tmp_path / 'run'}", "dry_run=true"])


def test_a_dry_run_refuses_a_template_with_which_no_episode_goes_on(
    tmp_path: Path, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(tmp_path, *COUNTING) == 0
    assert dry_run(tmp_path, *COUNTING, f"model.chat_template={forgetful}") == 1
    shown = capsys.readouterr().err
    assert "cannot continue after a user's answer" in shown and "model.chat_template=<file>" in shown
    assert dry_run(tmp_path, "reward=rule", f"model.chat_template={forgetful}") == 0


def test_a_template_is_asked_for_what_the_environment_does(
    tmp_path: Path, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tools that are known only once it has started are tools; and an agent's come with its calls."""
    words = ("environment=tools", "environment.tools=[calculator]", "reward=rule", f"model.chat_template={forgetful}")
    assert dry_run(tmp_path, *words) == 0
    assert "warning: the chat template cannot continue after a user's answer" in capsys.readouterr().err
    agent = ("environment._target_=own_agents.Calculating", "data=environment", "reward=environment")
    assert dry_run(tmp_path, *agent, "verifier=environment", f"model.chat_template={forgetful}") == 0
    assert "warning" not in capsys.readouterr().err
