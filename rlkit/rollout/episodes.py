"""Episodes of an environment, one coroutine each: policy and environment take turns until the episode ends."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.config.parts import TARGET, import_part
from rlkit.config.plan import longest_episode
from rlkit.config.schema import RolloutConfig, RunConfig
from rlkit.data.rendering import ChatTemplate
from rlkit.environments.agent import Agent
from rlkit.environments.base import Action, EnvironmentConfig, Step, Task
from rlkit.environments.tool import Tool
from rlkit.experience import Episode, Group, Message, Prompt, Sample, UserError
from rlkit.experience.types import FinishReason
from rlkit.rollout.conversation import Conversation, Limits, as_sample, opening_of
from rlkit.rollout.environment_processes import ProcessHost
from rlkit.rollout.hosts import EpisodeFailedError, Host, InlineHost
from rlkit.rollout.rendering import Renderer, RenderingError
from rlkit.rollout.requests import GroupRequest, Request, Response, sample_seed
from rlkit.rollout.session import Session

if TYPE_CHECKING:  # an HTTP server, which only agents need
    from rlkit.rollout.endpoint import Server

Turn = Callable[[Request], Awaitable[Response]]


async def open_episodes(
    config: RunConfig,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    turn: Turn,
    version: Callable[[], int],
    log: Path,
    *,
    seeded: bool,
) -> Episodes:
    """Start the run's environment and return its Episodes. `log`: file for its processes; `seeded`: each turn has a
    seed. Raises UserError, also if no episode can be played with the chat template, or what `prepare` raises."""
    section: Mapping[str, Any] = config.environment
    cls = import_part("environment", section[TARGET])
    options = cls.Config(**{key: value for key, value in section.items() if key != TARGET})
    host: Host = (
        InlineHost(cls, options)
        if options.placement == "inline"
        else ProcessHost(section[TARGET], cls, options, log, config.trainer.startup_timeout_seconds)
    )
    await host.start()
    # Some templates print today's date: after midnight a conversation could not continue, and openings would differ.
    arguments = {"strftime_now": datetime.now().strftime, **config.model.chat_template_arguments}
    template = ChatTemplate(tokenizer, config.model.chat_template, arguments)
    renderer = Renderer(template, host.tools, stop_token_ids, options.calls, options.history)
    endpoint = None
    if issubclass(cls, Agent):  # an agent's calls bring their tools, and are checked then
        from rlkit.rollout.endpoint import Server

        def of_call(tools: Sequence[Tool]) -> Renderer:
            return Renderer(template, tools, stop_token_ids, options.calls, options.history)

        endpoint = Server(of_call, stop_token_ids)
        await endpoint.start()
    elif problems := renderer.problems():  # with tools that only a started environment knows
        raise UserError("; ".join(problems))
    rows = longest_episode(config)
    return Episodes(host, renderer, options, config.rollout, seeded, stop_token_ids, turn, version, endpoint, rows)


@dataclass
class _Playing:
    """A group with open episodes."""

    request: GroupRequest
    prompt: Prompt | None = None
    """The prompt with the opening that all its samples read; None: none was reset yet, or agents decide."""

    def read(self, messages: tuple[Message, ...], token_ids: Sequence[int]) -> None:
        """Note a sample's opening. Raises EpisodeFailedError if it differs from the others'."""
        if self.prompt is None:
            self.prompt = replace(self.request.prompt, messages=messages, token_ids=tuple(token_ids))
        elif self.prompt.token_ids != tuple(token_ids):
            details = "reset() began differently for the same task and seed, but samples of a group must be comparable"
            raise EpisodeFailedError("openings_differ", details, again=False)


@dataclass
class _Played:
    """An episode that has ended."""

    index: int
    seed: int
    episode: Episode
    conversations: list[Conversation]
    of_agent: Step | None = None
    """What an agent returned for all its turns."""
    last: tuple[str, FinishReason] | None = None
    """Text and finish reason of an agent's last answer."""

    def sample(self, prompt_ids: tuple[int, ...]) -> Sample:
        ordered = sorted(self.conversations, key=lambda conversation: conversation.prompt_ids != prompt_ids)
        if self.of_agent is not None:
            ordered[-1].judged(self.of_agent)
        return as_sample(ordered, self.index, self.seed, self.episode, prompt_ids, self.last)


@dataclass
class _Clock:
    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    async def of_environment(self, work: Awaitable[Any]) -> Any:
        began = time.perf_counter()
        try:
            return await work
        finally:
            self.waited += time.perf_counter() - began


@dataclass(frozen=True)
class Episodes:
    host: Host
    renderer: Renderer
    options: EnvironmentConfig
    rollout: RolloutConfig
    seeded: bool
    """Whether each turn has a seed."""
    stop_token_ids: Sequence[int]
    turn: Turn
    version: Callable[[], int]
    """Returns the policy's current version."""
    endpoint: Server | None = None
    """Where agents call the policy, if the environment is an agent."""
    rows: int = sys.maxsize
    """Number of tokens that all rows of an episode may have together."""

    async def group(self, request: GroupRequest) -> Group:
        """Play all samples of a group concurrently. Its prompt is the environment's opening.

        An episode whose environment breaks begins again with the same seeds; after `environment.retries` it becomes a
        sample marked as failed.
        """
        playing = _Playing(request)
        tasks = [asyncio.create_task(self._sample(playing, index)) for index in range(request.responses)]
        try:
            played = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        prompt = playing.prompt or opening_of(request.prompt, [one.conversations for one in played])
        samples = [one.sample(prompt.token_ids) if one.conversations else self._nothing(one) for one in played]
        greedy = samples[-1] if request.greedy else None
        return Group(request.id, prompt, tuple(samples[: request.samples]), step=request.step, greedy=greedy)

    async def _sample(self, playing: _Playing, index: int) -> _Played:
        request, options = playing.request, self.options
        seed = sample_seed(request.seed, request.id, index)
        clock, tries, failures = _Clock(), itertools.count(), 0
        while True:
            key = f"{request.id}:{index}:{next(tries)}"
            played = _Played(index, seed, Episode("failed"), [])
            try:
                played.episode = await self._play(playing, played, key, clock)
            except EpisodeFailedError as failed:
                failures += not failed.innocent
                if failed.innocent or (failed.again and failures <= options.retries):
                    continue
                played.episode = Episode("failed", str(failed))
            finally:
                await self.host.close(key)
            seconds = time.perf_counter() - clock.began
            played.episode = replace(played.episode, seconds=seconds, waited=clock.waited)
            played.conversations = [conversation for conversation in played.conversations if conversation.turns]
            return played

    async def _play(self, playing: _Playing, played: _Played, key: str, clock: _Clock) -> Episode:
        """Play an episode and return how it ended. `played` gets its conversations, also if the environment breaks."""
        request, options, renderer = playing.request, self.options, self.renderer
        of_environment = sample_seed(request.seed, request.id, "environment")
        messages = await clock.of_environment(self.host.open(key, _task(request.prompt), of_environment))
        if self.endpoint is not None:
            return await self._run_agent(self.endpoint, request, played, key, clock)
        conversation = self._begin(playing, messages, renderer.whole(messages))
        played.conversations.append(conversation)
        heard, success, metrics, turn = list(messages), None, dict[str, float](), 0
        while True:
            response = await self.turn(self._request(request, played, key, turn))
            sampled = response.token_ids.tolist()
            text, calls = renderer.parse(sampled)
            conversation = played.conversations[-1]
            conversation.sampled(response, text, calls)
            last = turn + 1 >= options.max_turns or conversation.room < 1
            step: Step = await clock.of_environment(self.host.step(key, Action(text, calls, turn, last)))
            conversation.judged(step)
            success = success if step.success is None else step.success
            metrics |= step.metrics
            if step.done:
                return Episode("done", success=success, metrics=metrics)
            turn += 1
            if turn >= options.max_turns:
                return Episode("turns", success=success, metrics=metrics)
            said = _observation(step)
            if not said:
                details = "step() neither ends the episode nor says anything to continue with"
                raise EpisodeFailedError("wrong_type", details, again=False)
            said = [renderer.shortened(message, options.max_observation_tokens) for message in said]
            goes_on = (
                conversation.observed(renderer.bridge(sampled, said), said)
                if options.history == "append"
                else self._rerendered(request, played, sampled, heard, said)
            )
            if not goes_on:
                return Episode("tokens", success=success, metrics=metrics)

    def _rerendered(
        self, request: GroupRequest, played: _Played, sampled: list[int], heard: list[Message], said: list[Message]
    ) -> bool:
        """Continue after all that was `heard` with the turn and the answer `said` to it, in a new conversation if the
        template has changed earlier text. Returns False if not one token would be left."""
        heard += [self.renderer.spoken(sampled), *said]
        conversation, limits = played.conversations[-1], self._limits(request)
        try:
            prompt = self.renderer.whole(heard)
        except RenderingError as error:
            raise EpisodeFailedError("template", str(error), again=False) from error
        bridge = self.renderer.behind(conversation.prompt(), sampled, prompt)
        new = len(prompt) if bridge is None else len(bridge.ids) - bridge.drop
        if new >= self._left(request, played):
            return False
        if bridge is not None:
            return conversation.observed(bridge, said)
        if len(prompt) >= limits.of(prompt):
            return False
        conversation.messages += said
        played.conversations.append(Conversation(prompt, limits.of(prompt) - len(prompt)))
        return True

    async def _run_agent(
        self, endpoint: Server, request: GroupRequest, played: _Played, key: str, clock: _Clock
    ) -> Episode:
        """Like `_play`, but the environment calls the policy."""
        numbers = itertools.count()

        async def sample(prompt: list[int], again: int, most: int) -> Response:
            seed = sample_seed(played.seed, " ".join(map(str, prompt)), again) if self.seeded else None
            temperature = self._temperature(request, played.index)
            return await self.turn(Request(f"{key}:{next(numbers)}", prompt, seed, most, temperature))

        session = Session(sample, endpoint.renderer, self.options, self._limits(request))
        with endpoint.session(session) as model:
            try:
                step: Step = await clock.of_environment(self.host.step(key, model))
            except EpisodeFailedError as failed:
                if session.fault is None and session.refusal:
                    raise EpisodeFailedError("refused", session.refusal, again=False) from failed
                if session.fault is None and not (session.spent and failed.kind == "exception"):
                    raise
                step = Step(success=False)
            finally:
                clock.waited -= session.policy_seconds
                played.conversations = session.conversations()
        if session.fault is not None:
            raise session.fault
        if not played.conversations:
            raise EpisodeFailedError("nothing_sampled", "run() returned without an answer from the model", again=False)
        answer, finish_reason = session.last()
        said = _observation(step)
        played.of_agent, played.last = step, (said[-1].content if said else answer, finish_reason)
        return Episode(session.spent or "done", success=step.success, metrics=dict(step.metrics))

    def _begin(self, playing: _Playing, messages: tuple[Message, ...], token_ids: Sequence[int]) -> Conversation:
        """Begin a conversation. Raises EpisodeFailedError."""
        if len(token_ids) > self.rollout.max_prompt_tokens:
            most = self.rollout.max_prompt_tokens
            details = f"the opening has {len(token_ids)} tokens, more than rollout.max_prompt_tokens={most}"
            raise EpisodeFailedError("too_long", details, again=False)
        playing.read(messages, token_ids)
        return Conversation(token_ids, self._limits(playing.request).response, messages)

    def _limits(self, request: GroupRequest) -> Limits:
        most, prompt = request.max_response_tokens or self.rollout.max_response_tokens, self.rollout.max_prompt_tokens
        return Limits(prompt, most, max(self.rows, prompt + most))  # evaluations may be longer: not trained on

    def _left(self, request: GroupRequest, played: _Played) -> int:
        """Return the number of tokens by which the rows of an episode may still grow."""
        return self._limits(request).rows - sum(map(len, played.conversations))

    def _request(self, request: GroupRequest, played: _Played, key: str, turn: int) -> Request:
        conversation, index = played.conversations[-1], played.index
        room = min(conversation.room, self._left(request, played))
        of_turn = f"{index}.{turn}" if turn else index
        return Request(
            id=f"{key}:{turn}",
            prompt=conversation.prompt(),
            seed=sample_seed(request.seed, request.id, of_turn) if self.seeded else None,
            max_tokens=min(room, self.options.max_turn_tokens or room),
            temperature=self._temperature(request, index),
        )

    def _temperature(self, request: GroupRequest, index: int) -> float:
        if index >= request.samples:
            return 0.0
        return self.rollout.temperature if request.temperature is None else request.temperature

    def _nothing(self, played: _Played) -> Sample:
        """Return a sample for an episode that broke before anything was sampled: one token that is not trained on."""
        version = self.version()
        return Sample(
            index=played.index,
            token_ids=np.array(self.stop_token_ids[:1], dtype=np.int32),
            logprobs=np.zeros(1, dtype=np.float32),
            text="",
            finish_reason="abort",
            policy_versions=(version, version),
            seed=played.seed,
            mask=np.zeros(1, dtype=np.bool_),
            episode=played.episode,
        )


def _task(prompt: Prompt) -> Task:
    return Task(prompt.id, prompt.messages, prompt.answer, prompt.references, prompt.columns)


def _observation(step: Step) -> list[Message]:
    said = step.observation
    assert isinstance(said, tuple)  # hosts return it so
    return list(said)
