"""The contract of an environment: what the policy interacts with, turn by turn, and what it earns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlkit.environments.tool import Tool, tools_of
from rlkit.experience import Message, ToolCall, UserError
from rlkit.experience.section import Deadline, Section


class EnvironmentConfig(Section):
    """Fields of every environment; an environment nests a subclass as `Config`."""

    max_turns: int = Field(default=8, ge=1)
    """Maximum turns of the policy in an episode."""
    max_turn_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one turn; null: what is left of `rollout.max_response_tokens`, which covers the whole episode with its
    observations."""
    max_observation_tokens: int = Field(default=512, ge=8)
    """Longer messages of the environment are cut in the middle, with a note in the text. Each tool that a turn calls
    answers in a separate message."""
    step_timeout_seconds: Deadline = 30.0
    """placement=worker: if a `reset` or `step` takes longer, its worker process is killed and replaced."""
    retries: int = Field(default=1, ge=0)
    """How often an episode is restarted, with the same seeds, after the environment failed; then its sample is
    invalid."""
    placement: Literal["inline", "worker"] = "worker"
    """inline: in the rollout worker itself, for environments that take microseconds and cannot hang; worker: in
    separate processes, which can be killed."""
    workers: int = Field(default=1, ge=1)
    """placement=worker: processes per rollout worker."""
    concurrency: int = Field(default=64, ge=1)
    """placement=worker: open episodes per process."""
    history: Literal["append", "rerender"] = "append"
    """append: each turn continues from all tokens so far; a chat template that rewrites earlier turns (for example
    drops their thinking) is refused. rerender: each turn continues from what the template makes of the whole
    conversation; where that does not begin with the tokens so far, the turns from there on form a separate row in
    training."""
    new_weights: Literal["go_on", "park"] = "go_on"
    """max_staleness above 0: go_on: a turn that is being sampled when new weights arrive continues with them; park:
    weights wait for the turns being sampled, and turns that come meanwhile wait for the weights, so that every turn
    comes from one policy."""
    calls: str = "auto"
    """How the policy writes tool calls: hermes, llama, mistral, tags; auto: as the chat template does."""
    max_parallel_calls: int = Field(default=1, ge=1)
    """Calls that one turn may make; further ones get an error message."""


@dataclass(frozen=True)
class EnvironmentNeeds:
    """What the data must have for every problem."""

    answer: bool = False
    references: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A problem of the data, as an episode sees it."""

    id: str
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    references: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """A turn of the policy."""

    text: str
    """The text without the calls."""
    calls: tuple[ToolCall, ...] = ()
    turn: int = 0
    """Number of the turn, from 0."""
    last: bool = False
    """Whether no turn is left after this one."""


@dataclass(frozen=True)
class Step:
    """The environment's answer to a turn."""

    observation: str | Message | Sequence[Message] = ()
    """A text is a user message or, from a tool, a tool message."""
    reward: float = 0.0
    done: bool = False
    success: bool | None = None
    state: str | None = None
    """Names the state in which the turn was taken, the same for equal states: for baselines over states."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class EnvironmentFailure(Exception):
    """The environment cannot continue (a server is away, a file is gone). The episode is restarted up to `retries`
    times; then its sample is invalid. Other exceptions of `reset`, `step` and `final` count as this one; a tool's are
    shown to the policy."""


@dataclass(frozen=True)
class EnvironmentContext:
    tools: tuple[Tool, ...] = ()
    """Tools that the policy may call."""
    shared: Any = None
    """What `prepare` returned in this process."""


class Environment:
    """Base class, with one object per episode. `reset`, `step`, `final`, `close` and tools may be coroutines (`async
    def`)."""

    Config: ClassVar[type[EnvironmentConfig]] = EnvironmentConfig

    def __init__(self, config: Any, context: EnvironmentContext) -> None:
        self.config = config
        self.context = context

    @classmethod
    def needs(cls, config: Any) -> EnvironmentNeeds:
        return EnvironmentNeeds()

    @classmethod
    def deterministic(cls, config: Any) -> bool:
        """Whether answers depend only on task, seed and actions; if not, a resumed run is not bit-equal, and says
        so."""
        return True

    @classmethod
    def gives_rewards(cls, config: Any) -> bool:
        """Whether its steps may have rewards other than 0; if not, `reward=environment` is refused."""
        return True

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Return messages for the user from cheap checks before a run, without heavy imports."""
        return []

    @classmethod
    def tasks(cls, config: Any, split: Literal["train", "heldout"], seed: int) -> Sequence[Task] | None:
        """Return problems that the environment brings itself, for `data=environment`; None: it takes those of the
        data."""
        return None

    @classmethod
    def prepare(cls, config: Any) -> Any:
        """Prepare indices, sandboxes or connections; called once per process, may be `async def`. Raises UserError."""
        return None

    @classmethod
    def tools(cls, config: Any, shared: Any) -> tuple[Tool, ...]:
        """Return the tools, by default the methods marked `@tool`; the same in every process."""
        return tools_of(cls)

    def reset(self, task: Task, seed: int) -> Any:
        """Return what the policy reads first, after the task's messages: a text (a user message), messages, or None.

        All samples of a group get the same task and seed, and must get the same messages.
        """
        return None

    def step(self, action: Action) -> Any:
        """Return a Step. By default, run the called tools; a turn without a call goes to `final`."""
        return self.run_tools(action) if action.calls else self.final(action)

    def final(self, action: Action) -> Any:
        """Return the Step after an answer that calls no tool."""
        return Step(done=True)

    def close(self) -> Any:
        """Release resources; called once, also after a failure."""
        return None

    async def run_tools(self, action: Action) -> Step:
        """Run the called tools and return their answers as one Step: rewards add up, `done` holds if any says so, and
        `success` is the last verdict."""
        steps: list[Step] = []
        messages: list[Message] = []
        for number, call in enumerate(action.calls):
            step = await self._answer(call, number)
            steps.append(step)
            said = step.observation
            if isinstance(said, str):
                said = Message("tool", said, name=call.name, call_id=call.id)
            messages += as_messages(said)
        verdicts = [step.success for step in steps if step.success is not None]
        return Step(
            messages,
            reward=sum(step.reward for step in steps),
            done=any(step.done for step in steps),
            success=verdicts[-1] if verdicts else None,
            state=next((step.state for step in steps if step.state is not None), None),
            metrics={name: value for step in steps for name, value in step.metrics.items()},
        )

    async def _answer(self, call: ToolCall, number: int) -> Step:
        known = {tool.name: tool for tool in self.context.tools}
        if call.error:
            return Step(f"error: {call.error}")
        if number >= self.config.max_parallel_calls:
            return Step(f"error: only {self.config.max_parallel_calls} call(s) per turn are answered")
        if call.name not in known:
            return Step(f"error: there is no tool {call.name!r}; there are {', '.join(sorted(known))}")
        wrong = known[call.name].wrong(call.arguments)
        if wrong:
            return Step(f"error: {wrong}")
        try:
            answer = await settled(self.call(call))
        except (EnvironmentFailure, UserError):
            raise
        except Exception as error:
            return Step(f"error: {type(error).__name__}: {error}")
        return answer if isinstance(answer, Step) else Step(answer if isinstance(answer, str) else str(answer))

    def call(self, call: ToolCall) -> Any:
        """Run a tool with valid arguments; override it if tools are not methods."""
        method: Callable[..., Any] = getattr(self, call.name)
        return method(**call.arguments)


async def settled(value: Any) -> Any:
    """Return the value, awaited if necessary."""
    return await value if inspect.isawaitable(value) else value


def first_messages(task: Task, opening: Any) -> tuple[Message, ...]:
    """Return the conversation at the start of an episode: the task's messages and what `reset` returned."""
    return (*task.messages, *as_messages(opening))


def as_messages(said: str | Message | Sequence[Message] | None) -> tuple[Message, ...]:
    if said is None or said == "":
        return ()
    if isinstance(said, str):
        return (Message("user", said),)
    return (said,) if isinstance(said, Message) else tuple(said)
