"""`environment=skyrl_gym`: environments written for SkyRL, with problems from any data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from rlkit.environments.base import Action, Environment, EnvironmentConfig, EnvironmentFailure, Step, Task
from rlkit.experience import Message
from rlkit.experience.extras import lacking
from rlkit.experience.names import find_class


class SkyRLGymConfig(EnvironmentConfig):
    name: str = "gsm8k_multi_turn"
    """Name of the environment, as for `skyrl_gym.make`, or the dotted path of your own class."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the environment: its `env_config`."""


class SkyRLGym(Environment):
    """The `extras` are the row's columns, `max_turns`, and `reward_spec.ground_truth` from the answer."""

    Config = SkyRLGymConfig
    config: SkyRLGymConfig

    @classmethod
    def check(cls, config: SkyRLGymConfig) -> list[str]:
        if missing := lacking("skyrl_gym"):
            return missing
        try:
            _maker(config.name)
        except Exception as error:
            return [f"skyrl_gym has no {config.name!r}: {' '.join(str(error).split()):.300}"]
        return []

    def reset(self, task: Task, seed: int) -> Sequence[Message]:
        from omegaconf import OmegaConf

        gold = {} if task.answer is None else {"method": "rule", "ground_truth": task.answer}
        extras = {"max_turns": self.config.max_turns, "reward_spec": gold, "reward_model": gold, **task.columns}
        self._env = _maker(self.config.name)(env_config=OmegaConf.create(self.config.options), extras=extras)
        asked = [{"role": message.role, "content": message.content} for message in task.messages]
        opening, _ = self._env.init(list(asked))
        if opening[: len(asked)] != asked:
            raise EnvironmentFailure(f"{self.config.name} rewrites the prompt in init(), which is not supported")
        return _messages(opening[len(asked) :])

    def step(self, action: Action) -> Step:
        answer = self._env.step(action.text)
        if answer.get("postprocessed_action") not in (None, action.text):
            raise EnvironmentFailure(f"{self.config.name} rewrites what the policy said, which is not supported")
        reward, done = float(answer["reward"]), bool(answer["done"])
        metrics: Mapping[str, Any] = self._env.get_metrics() if done and hasattr(self._env, "get_metrics") else {}
        numbers = {name: float(number) for name, number in metrics.items() if isinstance(number, int | float)}
        observations = _messages(answer["observations"] or [])
        return Step(observations, reward=reward, done=done, success=done and reward >= 1, metrics=numbers)

    def close(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()


def _maker(name: str) -> Any:
    import skyrl_gym

    if "." in name:
        return find_class("environment.name", name, skyrl_gym.Env)
    skyrl_gym.spec(name)
    return lambda **arguments: skyrl_gym.make(name, **arguments)


def _messages(said: Sequence[Mapping[str, str]]) -> list[Message]:
    return [Message(one["role"], one["content"]) for one in said]
