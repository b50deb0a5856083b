"""`environment=skyrl_gym`, with the real package."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_fixture import act, need

from rlkit.environments.adapters.skyrl_gym import SkyRLGym, SkyRLGymConfig
from rlkit.environments.base import EnvironmentContext, EnvironmentFailure, Task
from rlkit.experience import Message

pytestmark = pytest.mark.slow
QUESTION = Message("user", "What is 1+2?")


@pytest.fixture(autouse=True)
def package() -> None:
    need("skyrl_gym")


def begun(answer: str | None = "3", columns: dict[str, Any] | None = None, **options: Any) -> SkyRLGym:
    environment = SkyRLGym(SkyRLGymConfig(**options), EnvironmentContext())
    assert environment.reset(Task("a", (QUESTION,), answer, columns=columns or {}), 0) == []
    return environment


def test_gsm8k_in_several_turns() -> None:
    environment = begun(max_turns=3)
    first, second, third = act(environment, "4", "#### 4", "#### 3")
    ((said,), (last,)) = first.observation, second.observation  # type: ignore[misc]
    assert said.role == last.role == "user" and last.content.startswith("Now provide only")  # type: ignore[union-attr]
    assert [first.reward, second.reward, third.reward] == pytest.approx([0, 0.2 / 3, 1])
    assert [step.done for step in (first, second, third)] == [False, False, True]
    assert third.success and third.metrics == {"steps": 3.0}
    environment.close()


def test_a_class_by_dotted_path() -> None:
    environment = begun(name="skyrl_gym.envs.gsm8k.env.GSM8kEnv")
    (step,) = act(environment, "#### 4")
    assert (step.reward, step.done, step.success) == (0.0, True, False)


def test_the_rows_own_reward_spec_is_taken() -> None:
    (step,) = act(begun(None, {"reward_spec": {"ground_truth": "7"}}), "#### 7")
    assert step.success


def test_a_row_without_what_it_is_judged_by_is_not_played() -> None:
    with pytest.raises(AssertionError, match="ground_truth"):
        begun(None)


def test_what_rewrites_the_prompt_or_the_policys_words_is_refused() -> None:
    import skyrl_gym.envs.base_text_env as base

    class Rewriting(base.BaseTextEnv):
        def __init__(self, env_config: Any = None, extras: Any = None) -> None:
            super().__init__()
            self.prompt = extras.get("prompt", False)

        def init(self, prompt: Any) -> Any:
            return ([{"role": "system", "content": "Be brief."}, *prompt], {}) if self.prompt else (prompt, {})

        def step(self, action: str) -> Any:
            return {"observations": [], "reward": 0, "done": True, "metadata": {}, "postprocessed_action": "3"}

    skyrl_gym = pytest.importorskip("skyrl_gym")
    skyrl_gym.register(id="rewriting", entry_point=Rewriting)
    try:
        with pytest.raises(EnvironmentFailure, match="rewrites the prompt"):
            begun(name="rewriting", columns={"prompt": True})
        with pytest.raises(EnvironmentFailure, match="rewrites what the policy said"):
            act(begun(name="rewriting"), "4")
    finally:
        skyrl_gym.envs.deregister("rewriting")


def test_unknown_names_are_refused() -> None:
    (said,) = SkyRLGym.check(SkyRLGymConfig(name="nowhere"))
    assert said == "skyrl_gym has no 'nowhere': No registered env with id: nowhere"
    assert SkyRLGym.check(SkyRLGymConfig()) == []
