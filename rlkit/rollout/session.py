"""What an agent that owns its loop says to the policy, recorded token by token.

A session is the policy's side of one episode. Each call samples one turn:

- Its messages are compared with those of the recorded turns. It goes on behind the tokens of the longest conversation
  that it begins with, by a bridge, so that no sampled text is rendered again; else it is rendered whole, and may still
  begin with recorded tokens. With `history=rerender` all calls are rendered. A call with token ids has its own.
- So turns form trees: a call may continue any turn, also one that was continued before (another try, a second agent),
  or begin anew (an edited or shortened history). At the end each way through a tree that was not gone yet is a row of
  its own (`conversations`), and every sampled token is in exactly one.
- Any number of calls may be open. Seeds depend on the sample's seed, the prompt's token ids and how often these came,
  rows on what was said. Who was faster decides nothing but the order of tries of one prompt, and a budget's last turns.
- An identical call while the first is still being answered waits for the same answer, and one that says that it is a
  retry gets the recorded one: a client that lost its connection costs nothing. Sampling goes on without the client.
- Budgets (`max_turns`, tokens) refuse further calls; how the episode ends then is the policy's doing, with the reward
  that the agent returns, or 0 if it raises.
- When the agent has ended the session is sealed: late calls sample nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlkit.environments.base import EnvironmentConfig
from rlkit.environments.tool import Tool
from rlkit.experience import Message
from rlkit.experience.types import FinishReason
from rlkit.rollout.conversation import Conversation, Limits
from rlkit.rollout.hosts import EpisodeFailedError
from rlkit.rollout.rendering import Bridge, Renderer, RenderingError, continuation
from rlkit.rollout.requests import Response


class RefusedError(Exception):
    """A call that is not answered."""

    def __init__(self, message: str, code: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.status = code, status


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    response: Response
    message: Message
    """As the agent reads it. A turn with calls that cannot be read is a text."""


@dataclass(eq=False)
class _Turn:
    """A turn that was asked for."""

    prompt: list[int]
    bridge: Bridge
    """From the turn before, if it continues one."""
    before: _Turn | None
    said: tuple[Message, ...]
    """The whole conversation before it."""
    new: Sequence[Message]
    """Of these, what answers the turn before."""
    renderer: Renderer
    by_ids: bool
    """Whether the agent asked with token ids, and may know other messages than `said`."""
    again: int
    """Calls with this prompt before it."""
    limit: int
    """Up to where its conversation may go, in tokens."""
    asked: int
    """In the order of all questions and answers."""
    answered: int = 0
    answer: Answer | None = None

    @property
    def response(self) -> Response:
        assert self.answer is not None
        return self.answer.response

    @property
    def sampled(self) -> list[int]:
        ids: list[int] = self.response.token_ids.tolist()
        return ids

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.sampled]

    @property
    def place(self) -> tuple[int, list[int], int]:
        """Among all turns, whenever they came."""
        return len(self.prompt), self.prompt, self.again


class Session:
    def __init__(
        self,
        sample: Callable[[list[int], int, int], Awaitable[Response]],
        renderer_of: Callable[[Sequence[Tool]], Renderer],
        options: EnvironmentConfig,
        limits: Limits,
    ) -> None:
        """`sample`: a turn behind this prompt, which came so often before, in at most so many tokens."""
        self._sample_turn, self._renderer_of = sample, renderer_of
        self._options, self._limits = options, limits
        self._turns: list[_Turn] = []
        self._room = limits.rows
        """Tokens left for all rows together; what open calls may still sample is taken off."""
        self._calls: dict[bytes, asyncio.Task[Answer]] = {}
        self._clock = itertools.count(1)
        self._sampling: set[asyncio.Task[Answer]] = set()
        self._busy_since = 0.0
        self._sealed = False
        self.policy_seconds = 0.0
        """In which the policy answered."""
        self.spent: Literal["turns", "tokens"] | None = None
        """The budget that a call was refused for."""
        self.refusal = ""
        """Why the template cannot render a call."""
        self.fault: Exception | None = None
        """What went wrong that is not the agent's to read."""

    async def chat(
        self, key: bytes, retried: bool, messages: Sequence[Message], tools: Sequence[Tool], most: int | None
    ) -> Answer:
        """`key`: equal for equal calls. `most`: tokens. Raises RefusedError."""
        return await self._call(key, retried, lambda: self._asked(messages, tools), most)

    async def generate(self, key: bytes, retried: bool, token_ids: Sequence[int], most: int | None) -> Answer:
        """Raises RefusedError."""
        return await self._call(key, retried, lambda: self._asked_with_ids(list(token_ids)), most)

    def seal(self) -> None:
        self._sealed = True
        for call in self._calls.values():
            call.cancel()

    def conversations(self) -> list[Conversation]:
        """All that was sampled: from the start of each tree, and from each further turn that continues the same one,
        one after the other as far as it goes."""
        turns = self._answered()
        following: dict[_Turn, _Turn] = {}
        for turn in turns:
            if turn.before is not None:
                following.setdefault(turn.before, turn)
        heads = [turn for turn in turns if turn.before is None or following[turn.before] is not turn]
        return [_row(head, following) for head in heads]

    def last(self) -> tuple[str, FinishReason]:
        """Text and end of the answer after which nothing was asked."""
        turns = self._answered()
        latest = max(turn.asked for turn in turns)
        turn = [turn for turn in turns if turn.answered > latest][-1]
        text, _ = turn.renderer.parse(turn.sampled)
        return text, turn.response.finish_reason

    def _answered(self) -> list[_Turn]:
        return sorted((turn for turn in self._turns if turn.answer is not None), key=lambda turn: turn.place)

    # -- a call ------------------------------------------------------------------------------------------------------

    async def _call(self, key: bytes, retried: bool, ask: Callable[[], _Turn], most: int | None) -> Answer:
        self._check_open()
        call = self._calls.get(key)
        if call is None or (call.done() and not retried):
            turn = self._admitted(ask)
            self._turns.append(turn)
            call = self._calls[key] = asyncio.create_task(self._sampled(turn, most))
        await asyncio.wait({call})
        if call.cancelled() or call.exception() is not None:
            self._check_open()
        return call.result()

    def _check_open(self) -> None:
        if self._sealed:
            raise RefusedError("the episode has ended", "episode_ended", 410)
        if self.fault is not None:
            raise self._failed(self.fault)

    def _admitted(self, ask: Callable[[], _Turn]) -> _Turn:
        try:
            turn = ask()
        except RenderingError as error:
            if self._turns:  # else the template itself is at fault
                self.refusal = str(error)
                raise RefusedError(self.refusal, "cannot_be_rendered") from error
            raise self._failed(error) from error
        except Exception as error:
            raise self._failed(error) from error
        if not self._turns and len(turn.prompt) > self._limits.prompt:
            most = self._limits.prompt
            details = f"the opening has {len(turn.prompt)} tokens, more than rollout.max_prompt_tokens={most}"
            raise self._failed(EpisodeFailedError("too_long", details, again=False))
        if len(self._turns) >= self._options.max_turns:
            self.spent, turns = "turns", self._options.max_turns
            raise RefusedError(f"the episode's turns are spent (environment.max_turns={turns})", "turns_spent")
        return turn

    def _failed(self, fault: Exception) -> RefusedError:
        self.fault = fault
        return RefusedError(f"the episode has failed: {fault}", "episode_failed")

    async def _granted(self, turn: _Turn, most: int | None) -> int:
        """Tokens that it may have, which are taken off the room. Raises RefusedError."""
        siblings = (other for other in self._turns if other is not turn)
        goes_on = turn.before is not None and all(other.before is not turn.before for other in siblings)
        cost = len(turn.bridge.ids) - turn.bridge.drop if goes_on else len(turn.prompt)
        limits = turn.limit - len(turn.prompt), self._options.max_turn_tokens, most
        granted = min(limit for limit in limits if limit is not None)
        while self._sampling and self._room < cost + granted:  # others may need less than they were given
            await asyncio.wait(self._sampling, return_when=asyncio.FIRST_COMPLETED)
        granted = min(granted, self._room - cost)
        if granted < 1:
            self.spent = "tokens"
            why = (
                "rollout.max_response_tokens holds for all turns of a conversation together"
                if turn.limit <= len(turn.prompt)
                else "learner.tokens_per_microbatch holds for all its conversations together"
            )
            raise RefusedError(f"the episode's tokens are spent ({why})", "context_length_exceeded")
        self._room -= cost + granted
        return granted

    async def _sampled(self, turn: _Turn, most: int | None) -> Answer:
        granted, task = await self._granted(turn, most), asyncio.current_task()
        assert task is not None
        self._busy_since = self._busy_since if self._sampling else time.perf_counter()
        self._sampling.add(task)
        try:
            response = await self._sample_turn(turn.prompt, turn.again, granted)
        except Exception as error:
            self.fault = error
            raise
        finally:
            self._sampling.discard(task)
            if not self._sampling:
                self.policy_seconds += time.perf_counter() - self._busy_since
        self._room += granted - len(response.token_ids)
        turn.answered = next(self._clock)
        turn.answer = Answer(turn.prompt, response, turn.renderer.spoken(response.token_ids.tolist()))
        return turn.answer

    def _asked(self, messages: Sequence[Message], tools: Sequence[Tool]) -> _Turn:
        renderer, said = self._renderer_of(tools), tuple(messages)
        if self._options.history == "append":
            same = (turn for turn in self._answered() if turn.renderer.tools == renderer.tools)
            known = [turn for turn in same if _continues(said, turn)]
            if known:
                last = max(known, key=lambda turn: len(turn.said))
                new = self._shortened(renderer, said[len(last.said) + 1 :])
                return self._turn(last, renderer.bridge(last.sampled, new), said, new, renderer)
        opening = len(list(itertools.takewhile(lambda message: message.role != "assistant", said)))
        ids = renderer.whole([*said[:opening], *self._shortened(renderer, said[opening:])])
        before, bridge = self._before(ids, lambda turn: renderer.behind(turn.ids, turn.sampled, ids))
        new = list(itertools.takewhile(lambda message: message.role != "assistant", reversed(said)))[::-1]
        return self._turn(before, bridge, said, new, renderer)

    def _asked_with_ids(self, ids: list[int]) -> _Turn:
        renderer = self._renderer_of(())
        decode = renderer.template.tokenizer.decode
        # A client may leave out the token that ended a turn, or end it otherwise.
        before, bridge = self._before(
            ids,
            lambda turn: continuation(
                turn.ids, turn.sampled, ids, None if turn.response.finish_reason == "stop" else ()
            ),
        )
        said = (Message("user", str(decode(ids, skip_special_tokens=False))),)
        new = [Message("user", str(decode(bridge.ids, skip_special_tokens=True)))]
        return self._turn(before, bridge, said, new, renderer, by_ids=True)

    def _before(self, ids: list[int], how: Callable[[_Turn], Bridge | None]) -> tuple[_Turn | None, Bridge]:
        """The longest recorded conversation that a prompt begins with, and how it goes on."""
        ways = [(turn, bridge) for turn in self._answered() if (bridge := how(turn)) is not None]
        return min(ways, key=lambda way: len(way[1].ids), default=(None, Bridge(0, ids)))

    def _turn(
        self,
        before: _Turn | None,
        bridge: Bridge,
        said: tuple[Message, ...],
        new: Sequence[Message],
        renderer: Renderer,
        by_ids: bool = False,
    ) -> _Turn:
        known = [] if before is None else before.ids
        prompt = [*known[: len(known) - bridge.drop], *bridge.ids]
        again = sum(turn.prompt == prompt for turn in self._turns)
        limit = self._limits.of(prompt) if before is None else before.limit
        return _Turn(prompt, bridge, before, said, new, renderer, by_ids, again, limit, asked=next(self._clock))

    def _shortened(self, renderer: Renderer, messages: Sequence[Message]) -> list[Message]:
        """As of an environment: what answers the policy."""
        most = self._options.max_observation_tokens
        return [renderer.shortened(m, most) if m.role in ("tool", "user") else m for m in messages]


def _row(head: _Turn, following: Mapping[_Turn, _Turn]) -> Conversation:
    row, turn = Conversation(head.prompt, head.limit - len(head.prompt), head.said), head
    row.sampled(turn.response, *turn.renderer.parse(turn.sampled))
    while turn in following:
        turn = following[turn]
        row.observed(turn.bridge, turn.new)
        row.sampled(turn.response, *turn.renderer.parse(turn.sampled))
    return row


def _continues(said: Sequence[Message], turn: _Turn) -> bool:
    """Whether this is what was said up to a turn's answer, and then what users and tools may answer."""
    assert turn.answer is not None
    known = (*turn.said, turn.answer.message)
    new = said[len(known) :]
    return (
        not turn.by_ids
        and bool(new)
        and all(map(_same, known, said))
        and all(message.role in ("tool", "user") for message in new)
    )


def _same(one: Message, other: Message) -> bool:
    """Clients strip texts, and write arguments anew."""
    calls = ([(call.id, call.name, call.arguments) for call in message.calls] for message in (one, other))
    return (one.role, one.content.strip(), one.call_id) == (other.role, other.content.strip(), other.call_id) and (
        next(calls) == next(calls)
    )
