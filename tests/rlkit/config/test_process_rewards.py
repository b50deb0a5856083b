"""Rewards that nobody would read, and steps that nobody would make, are refused before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError

STEPWISE = ("reward=function", "reward.function=reward_functions.lengths_of_steps", "reward.per_step=true")
BOTH = (
    "reward=[math,function]",
    "reward.parts.function.function=reward_functions.lengths_of_steps",
    "reward.parts.function.per_step=true",
)
LINES = "rollout.steps=lines"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("algorithm=grpo", "reward=implicit_prm"), "ImplicitPRM gives process rewards, which GRPO would ignore"),
        (("algorithm=rloo", *BOTH, LINES), "an algorithm that learns from them: ppo, prime, pure, grpo_process"),
        (("algorithm=ppo", "algorithm.process_coefficient=0", *BOTH, LINES), "which PPO would ignore"),
        (("algorithm=ppo_turns", "reward=math"), "PPO as configured needs turns, and there are none"),
        (("algorithm=gigpo", *BOTH, LINES), "StepCredit as configured needs turns, and there are none"),
        (("algorithm=pure", "reward=math"), "StepCredit needs process rewards, but MathReward gives none"),
        (("algorithm=pure", *STEPWISE, LINES), "gives only process rewards, but StepCredit needs outcomes, too"),
        (("algorithm=prime", *STEPWISE, LINES), "gives only process rewards, but PRIME needs outcomes, too"),
        (("algorithm=ppo", *STEPWISE), "rollout.steps=none: FunctionReward judges steps; say what a step is"),
        (
            ("algorithm=grpo", "reward=math", LINES),
            "rollout.steps=lines: has no effect: MathReward gives no process rewards",
        ),
        (("algorithm=prime", "reward=implicit_prm", "rollout.steps=words"), "rollout.steps=words"),
        (
            ("algorithm=ppo", *STEPWISE, LINES, "buffer.min_group_reward=0.0"),
            "buffer.min_group_reward=0.0: has no effect: FunctionReward gives only process rewards",
        ),
        (
            (
                "algorithm=prime",
                "reward=implicit_prm",
                "reward.outcome._target_=rewards.implicit_prm.reward.ImplicitPRM",
            ),
            "reward.outcome: the process rewards of ImplicitPRM would be lost",
        ),
    ],
)
def test_refusals(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([*overrides, f"run_dir={tmp_path / 'run'}"])
    assert message in str(error.value)


@pytest.mark.parametrize("recipe", ["ppo", "prime", "rloo_process"])
def test_what_reads_them_is_accepted(recipe: str, tmp_path: Path) -> None:
    load_config([f"algorithm={recipe}", *BOTH, LINES, f"run_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("recipe", ["ppo", "grpo_process"])
def test_process_rewards_alone_will_do(recipe: str, tmp_path: Path) -> None:
    load_config([f"algorithm={recipe}", *STEPWISE, LINES, f"run_dir={tmp_path / 'run'}"])


def test_recipes_of_step_credit(tmp_path: Path) -> None:
    def config(recipe: str) -> tuple[str, float, float, str]:
        run = load_config([f"algorithm={recipe}", "reward=implicit_prm", f"run_dir={tmp_path / 'run'}"])
        chosen = run.make_algorithm().config
        return chosen.credit, chosen.outcome_coefficient, chosen.kl_coefficient, chosen.kl_in

    assert config("pure") == ("min_form", 1.0, 0.001, "reward")
    assert config("grpo_process") == ("turn_discounted", 0.0, 0.04, "loss")
    assert config("rloo_process") == ("loo", 1.0, 0.0, "reward")
    assert config("episode_plus_step") == ("episode_plus_step", 1.0, 0.0, "reward")
    assert config("turn_discounted") == ("turn_discounted", 1.0, 0.001, "loss")
