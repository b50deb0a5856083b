"""Agents that run their own loop: they call the policy through an endpoint, like any OpenAI client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlkit.environments.base import Environment, EnvironmentConfig, Step, Task
from rlkit.experience.section import Deadline


class AgentConfig(EnvironmentConfig):
    placement: Literal["worker"] = "worker"
    step_timeout_seconds: Deadline = 600.0
    """Time limit of an agent's whole run, including the time that the policy takes to answer."""


@dataclass(frozen=True)
class Endpoint:
    """The policy's endpoint for one episode: it answers until `run` returns."""

    base_url: str
    """Base of `/chat/completions` and `/models`; vLLM's `/inference/v1/generate` is next to its `/v1`."""
    api_key: str
    model: str


class Agent(Environment):
    """An episode is one `run`. What the policy samples for it is recorded and trained on, token by token, in any number
    of conversations, consecutive or parallel."""

    Config: ClassVar[type[EnvironmentConfig]] = AgentConfig

    def reset(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def step(self, action: Any) -> Any:
        """`action`: an Endpoint, which the host of an agent passes instead of a turn."""
        return self.run(self.task, action)

    async def run(self, task: Task, model: Endpoint) -> Step:
        """Work on the task and return the reward for the whole run.

        If `observation` is a text, rewards read it as the answer; otherwise they read the policy's last one. `done` has
        no effect.
        """
        raise NotImplementedError


def may_have_segments(cls: type[Environment], config: EnvironmentConfig) -> bool:
    """Whether an episode may become several rows in training (`Sample.segments`)."""
    return issubclass(cls, Agent) or config.history == "rerender"
