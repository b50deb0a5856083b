"""Agents that own their loop: they call the policy through an endpoint, as any client of OpenAI's does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlkit.environments.base import Environment, EnvironmentConfig, Step, Task
from rlkit.experience.section import Deadline


class AgentConfig(EnvironmentConfig):
    placement: Literal["worker"] = "worker"
    step_timeout_seconds: Deadline = 600.0
    """Of the whole run of an agent, with the time that the policy takes to answer."""


@dataclass(frozen=True)
class Endpoint:
    """The policy, for one episode: it answers until `run` returns."""

    base_url: str
    """Of `/chat/completions` and `/models`; vLLM's `/inference/v1/generate` lies beside its `/v1`."""
    api_key: str
    model: str


class Agent(Environment):
    """An episode is one `run`. What the policy samples for it is recorded and trained on, token by token, in whatever
    conversations, one after the other or side by side."""

    Config: ClassVar[type[EnvironmentConfig]] = AgentConfig

    def reset(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def step(self, action: Any) -> Any:
        """`action`: an Endpoint. The host of an agent passes it in place of a turn."""
        return self.run(self.task, action)

    async def run(self, task: Task, model: Endpoint) -> Step:
        """Work on the task, and return the reward of it all.

        A text as `observation` is what rewards read as its answer; else they read the policy's last one. `done` has no
        effect.
        """
        raise NotImplementedError


def may_have_segments(cls: type[Environment], config: EnvironmentConfig) -> bool:
    """Whether an episode may be several rows in training (`Sample.segments`)."""
    return issubclass(cls, Agent) or config.history == "rerender"
