"""Episodes of an environment, one coroutine each: the policy and the environment take turns until one of them ends."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlkit.config.parts import TARGET, import_part
from rlkit.config.plan import samples_have_seeds
from rlkit.config.schema import RolloutConfig, RunConfig
from rlkit.data.rendering import ChatTemplate
from rlkit.environments.agent import Agent
from rlkit.environments.base import Action, EnvironmentConfig, Step, Task
from rlkit.experience import Episode, Group, Message, Prompt, Sample, UserError
from rlkit.rollout.conversation import Conversation
from rlkit.rollout.environment_processes import ProcessHost
from rlkit.rollout.hosts import EpisodeFailedError, Host, InlineHost
from rlkit.rollout.rendering import Renderer
from rlkit.rollout.requests import GroupRequest, sample_seed
from rlkit.rollout.sampler import Request, Response
from rlkit.rollout.session import Session

if TYPE_CHECKING:  # an HTTP server, which only agents need
    from rlkit.rollout.endpoint import Server

Turn = Callable[[Request], Awaitable[Response]]


async def open_episodes(
    config: RunConfig, tokenizer: Any, stop_token_ids: Sequence[int], turn: Turn, version: Callable[[], int], log: Path
) -> Episodes:
    """With the run's environment started; `log`: of its processes. Raises UserError, also for a
    chat template with which no episode can be played, or what its `prepare` raises."""
    section: Mapping[str, Any] = config.environment
    cls = import_part("environment", section[TARGET])
    options = cls.Config(**{key: value for key, value in section.items() if key != TARGET})
    host: Host = (
        InlineHost(cls, options)
        if options.placement == "inline"
        else ProcessHost(section[TARGET], cls, options, log, config.trainer.startup_timeout_seconds)
    )
    await host.start()
    template = ChatTemplate(tokenizer, config.model.chat_template, config.model.chat_template_arguments)
    renderer = Renderer(template, host.tools, stop_token_ids, options.calls)
    endpoint = None
    if issubclass(cls, Agent):  # whose calls bring their tools, and are checked then
        from rlkit.rollout.endpoint import Server

        endpoint = Server(lambda tools: Renderer(template, tools, stop_token_ids, options.calls), stop_token_ids)
        await endpoint.start()
    elif problems := renderer.problems():  # of tools that only a started environment knows
        raise UserError("; ".join(problems))
    seeded = samples_have_seeds(config)
    return Episodes(host, renderer, options, config.rollout, seeded, stop_token_ids, turn, version, endpoint)


@dataclass
class _Playing:
    """A group whose episodes are open."""

    request: GroupRequest
    prompt: Prompt | None = None
    """With the opening that all its samples read; None: none was reset yet."""

    def read(self, messages: tuple[Message, ...], token_ids: Sequence[int]) -> None:
        """Raises EpisodeFailedError for another opening than the others had."""
        if self.prompt is None:
            self.prompt = replace(self.request.prompt, messages=messages, token_ids=tuple(token_ids))
        elif self.prompt.token_ids != tuple(token_ids):
            details = "reset() began otherwise for the same task and seed, and the samples of a group are compared"
            raise EpisodeFailedError("openings_differ", details, again=False)


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
    """Of the policy now."""
    endpoint: Server | None = None
    """Where agents call the policy, if the environment is one."""

    async def group(self, request: GroupRequest) -> Group:
        """Play all samples of a group, side by side. Its prompt is what the environment began with.

        An episode whose environment breaks begins again, with the same seeds, and after `environment.retries` is a
        sample that says so.
        """
        playing = _Playing(request)
        tasks = [asyncio.create_task(self._sample(playing, index)) for index in range(request.responses)]
        try:
            samples = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        greedy = samples[-1] if request.greedy else None
        prompt = playing.prompt or request.prompt
        return Group(request.id, prompt, tuple(samples[: request.samples]), step=request.step, greedy=greedy)

    async def _sample(self, playing: _Playing, index: int) -> Sample:
        request, options = playing.request, self.options
        seed = sample_seed(request.seed, request.id, index)
        clock, tries, failures = _Clock(), itertools.count(), 0
        while True:
            key = f"{request.id}:{index}:{next(tries)}"
            conversation: list[Conversation] = []
            ended: Literal["done", "turns", "tokens", "failed"] = "failed"
            success, metrics, failure = None, dict[str, float](), ""
            try:
                ended, success, metrics = await self._play(playing, index, key, conversation, clock)
            except EpisodeFailedError as failed:
                failures += not failed.innocent
                if failed.innocent or (failed.again and failures <= options.retries):
                    continue
                failure = str(failed)
            finally:
                await self.host.close(key)
            seconds = time.perf_counter() - clock.began
            episode = Episode(ended, failure, success, metrics, seconds=seconds, waited=clock.waited)
            if conversation and conversation[0].turns:
                return conversation[0].sample(index, seed, episode)
            return self._nothing(index, seed, episode)

    async def _play(
        self, playing: _Playing, index: int, key: str, opened: list[Conversation], clock: _Clock
    ) -> tuple[Literal["done", "turns", "tokens"], bool | None, dict[str, float]]:
        """How it ended. `opened` gets the conversation, which stays there if the environment breaks."""
        request, options, renderer = playing.request, self.options, self.renderer
        of_environment = sample_seed(request.seed, request.id, "environment")
        messages = await clock.of_environment(self.host.open(key, _task(request.prompt), of_environment))
        if self.endpoint is not None:
            return await self._run_agent(self.endpoint, playing, index, key, opened, clock)
        conversation = self._begin(playing, messages, renderer.first(messages), opened)
        success, metrics, turn = None, dict[str, float](), 0
        while True:
            response = await self.turn(self._request(playing, index, key, turn, conversation))
            sampled = response.token_ids.tolist()
            text, calls = renderer.parse(sampled)
            conversation.sampled(response, self.version(), text, calls)
            last = turn + 1 >= options.max_turns or conversation.room < 1
            step: Step = await clock.of_environment(self.host.step(key, Action(text, calls, turn, last)))
            conversation.judged(step)
            success = success if step.success is None else step.success
            metrics |= step.metrics
            if step.done:
                return "done", success, metrics
            turn += 1
            if turn >= options.max_turns:
                return "turns", success, metrics
            said = _observation(step)
            if not said:
                details = "step() neither ends the episode nor says anything to go on with"
                raise EpisodeFailedError("wrong_type", details, again=False)
            said = [renderer.shortened(message, options.max_observation_tokens) for message in said]
            if not conversation.observed(renderer.bridge(sampled, said), said):
                return "tokens", success, metrics

    async def _run_agent(
        self, endpoint: Server, playing: _Playing, index: int, key: str, opened: list[Conversation], clock: _Clock
    ) -> tuple[Literal["done", "turns", "tokens"], bool | None, dict[str, float]]:
        """As `_play`, where the environment calls the policy."""
        seed = sample_seed(playing.request.seed, playing.request.id, index)

        async def sample(conversation: Conversation, most: int | None) -> Response:
            request = self._request(playing, index, key, conversation.turns, conversation)
            # No prompt comes twice as long as an episode is one conversation.
            of_turn = sample_seed(seed, " ".join(map(str, request.prompt)), 0) if self.seeded else None
            most = request.max_tokens if most is None else min(most, request.max_tokens)
            return await self.turn(replace(request, seed=of_turn, max_tokens=most))

        session = Session(
            lambda messages, token_ids: self._begin(playing, messages, token_ids, opened),
            sample,
            self.version,
            endpoint.renderer,
            self.options,
        )
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
        if session.fault is not None:
            raise session.fault
        if not opened or not opened[0].turns:
            raise EpisodeFailedError("nothing_sampled", "run() returned without an answer of the model", again=False)
        opened[0].judged(step)
        return session.spent or "done", step.success, dict(step.metrics)

    def _begin(
        self, playing: _Playing, messages: tuple[Message, ...], token_ids: Sequence[int], opened: list[Conversation]
    ) -> Conversation:
        """Raises EpisodeFailedError."""
        if len(token_ids) > self.rollout.max_prompt_tokens:
            most = self.rollout.max_prompt_tokens
            details = f"the opening has {len(token_ids)} tokens, more than rollout.max_prompt_tokens={most}"
            raise EpisodeFailedError("too_long", details, again=False)
        playing.read(messages, token_ids)
        most = playing.request.max_response_tokens or self.rollout.max_response_tokens
        opened.append(Conversation(token_ids, most))
        return opened[0]

    def _request(self, playing: _Playing, index: int, key: str, turn: int, conversation: Conversation) -> Request:
        request, room = playing.request, conversation.room
        temperature = self.rollout.temperature if request.temperature is None else request.temperature
        of_turn = f"{index}.{turn}" if turn else index
        return Request(
            id=f"{key}:{turn}",
            prompt=conversation.prompt(),
            seed=sample_seed(request.seed, request.id, of_turn) if self.seeded else None,
            max_tokens=min(room, self.options.max_turn_tokens or room),
            temperature=temperature if index < request.samples else 0.0,
        )

    def _nothing(self, index: int, seed: int, episode: Episode) -> Sample:
        """Of an episode that broke before anything was sampled: a token that is not trained."""
        version = self.version()
        return Sample(
            index=index,
            token_ids=np.array(self.stop_token_ids[:1], dtype=np.int32),
            logprobs=np.zeros(1, dtype=np.float32),
            text="",
            finish_reason="abort",
            policy_versions=(version, version),
            seed=seed,
            mask=np.zeros(1, dtype=np.bool_),
            episode=episode,
        )


def _task(prompt: Prompt) -> Task:
    return Task(prompt.id, prompt.messages, prompt.answer, prompt.references, prompt.columns)


def _observation(step: Step) -> list[Message]:
    said = step.observation
    assert isinstance(said, tuple)  # as hosts return it
    return list(said)
