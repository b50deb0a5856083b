"""The calls to the policy from an agent that runs its own loop, recorded token by token.

A session is the policy's side of one episode. Each call samples one turn:

- Its messages are compared with those of the recorded turns. It continues the tokens of the longest conversation that
  it begins with, by a bridge, so that no sampled text is rendered again. Otherwise it is rendered whole, and may still
  begin with recorded tokens. With `history=rerender` all calls are rendered. A call with token ids keeps its own.
- So turns form trees: a call may continue any turn, even one that was continued before (another try, a second agent),
  or start a new tree (an edited or shortened history). At the end each path through a tree not yet covered becomes a
  row (`conversations`), and every sampled token is in exactly one row.
- Any number of calls may be open. Seeds depend on the sample's seed, the prompt's token ids and how often these came;
  rows depend on what was said. Timing affects only the order of tries of one prompt, and the last turns of a budget.
- An identical call while the first is still being answered waits for the same answer, and one marked as a retry gets
  the recorded answer: a client that lost its connection costs nothing. Sampling continues without the client.
- Budgets (`max_turns`, tokens) refuse further calls. The episode's end is then the policy's doing, with the reward that
  the agent returns, or 0 if it raises.
- Once the agent has ended, the session is sealed: late calls sample nothing.
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
    """Raised for a call that is not answered."""

    def __init__(self, message: str, code: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.status = code, status


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    response: Response
    message: Message
    """The turn as the agent reads it; if its calls cannot be parsed, it is plain text."""


@dataclass(eq=False)
class _Turn:
    """A turn that was requested."""

    prompt: list[int]
    bridge: Bridge
    """From the previous turn, if it continues one."""
    before: _Turn | None
    said: tuple[Message, ...]
    """The whole conversation before it."""
    new: Sequence[Message]
    """Of these, the messages that answer the previous turn."""
    renderer: Renderer
    by_ids: bool
    """Whether the agent called with token ids, and may have other messages than `said`."""
    again: int
    """Number of earlier calls with this prompt."""
    limit: int
    """Length in tokens that its conversation may reach."""
    asked: int
    """Its position in the order of all questions and answers."""
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
        """Sort key among all turns, independent of when they came."""
        return len(self.prompt), self.prompt, self.again


class Session:
    def __init__(
        self,
        sample: Callable[[list[int], int, int], Awaitable[Response]],
        renderer_of: Callable[[Sequence[Tool]], Renderer],
        options: EnvironmentConfig,
        limits: Limits,
    ) -> None:
        """`sample(prompt, again, most)`: a turn of at most `most` tokens after a prompt asked `again` times before."""
        self._sample_turn, self._renderer_of = sample, renderer_of
        self._options, self._limits = options, limits
        self._turns: list[_Turn] = []
        self._room = limits.rows
        """Tokens left for all rows together, less what open calls may still sample."""
        self._calls: dict[bytes, asyncio.Task[Answer]] = {}
        self._clock = itertools.count(1)
        self._sampling: set[asyncio.Task[Answer]] = set()
        self._busy_since = 0.0
        self._sealed = False
        self.policy_seconds = 0.0
        """Seconds during which the policy was answering."""
        self.spent: Literal["turns", "tokens"] | None = None
        """The budget that a call was refused for."""
        self.refusal = ""
        """Why the template cannot render a call."""
        self.fault: Exception | None = None
        """An error that is not for the agent to read."""

    async def chat(
        self, key: bytes, retried: bool, messages: Sequence[Message], tools: Sequence[Tool], most: int | None
    ) -> Answer:
        """Answer a call with messages. `key`: equal for equal calls. `most`: tokens. Raises RefusedError."""
        return await self._call(key, retried, lambda: self._asked(messages, tools), most)

    async def generate(self, key: bytes, retried: bool, token_ids: Sequence[int], most: int | None) -> Answer:
        """Answer a call with token ids. Raises RefusedError."""
        return await self._call(key, retried, lambda: self._asked_with_ids(list(token_ids)), most)

    def seal(self) -> None:
        self._sealed = True
        for call in self._calls.values():
            call.cancel()

    def conversations(self) -> list[Conversation]:
        """Return all that was sampled: a conversation from the root of each tree, and one from each further turn that
        continues the same turn, each as far as it goes."""
        turns = self._answered()
        following: dict[_Turn, _Turn] = {}
        for turn in turns:
            if turn.before is not None:
                following.setdefault(turn.before, turn)
        heads = [turn for turn in turns if turn.before is None or following[turn.before] is not turn]
        return [_row(head, following) for head in heads]

    def last(self) -> tuple[str, FinishReason]:
        """Return text and finish reason of the answer after which nothing was asked."""
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
            if self._turns:  # otherwise the template itself is at fault
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
            raise RefusedError(f"the episode's turns are used up (environment.max_turns={turns})", "turns_spent")
        return turn

    def _failed(self, fault: Exception) -> RefusedError:
        self.fault = fault
        return RefusedError(f"the episode has failed: {fault}", "episode_failed")

    async def _granted(self, turn: _Turn, most: int | None) -> int:
        """Return how many tokens a turn may have, and subtract them from the room. Raises RefusedError."""
        siblings = (other for other in self._turns if other is not turn)
        goes_on = turn.before is not None and all(other.before is not turn.before for other in siblings)
        cost = len(turn.bridge.ids) - turn.bridge.drop if goes_on else len(turn.prompt)
        limits = turn.limit - len(turn.prompt), self._options.max_turn_tokens, most
        granted = min(limit for limit in limits if limit is not None)
        while self._sampling and self._room < cost + granted:  # others may need less than they were granted
            await asyncio.wait(self._sampling, return_when=asyncio.FIRST_COMPLETED)
        granted = min(granted, self._room - cost)
        if granted < 1:
            self.spent = "tokens"
            why = (
                "rollout.max_response_tokens limits all turns of a conversation together"
                if turn.limit <= len(turn.prompt)
                else "learner.tokens_per_microbatch limits all its conversations together"
            )
            raise RefusedError(f"the episode's tokens are used up ({why})", "context_length_exceeded")
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
        # A client may leave out the token that ended a turn, or end the turn differently.
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
        """Return the longest recorded conversation that a prompt begins with, and how it continues."""
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
        """Shorten the messages that answer the policy, like an environment's."""
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
    """Return whether messages repeat a turn's conversation with its answer, and add messages of users and tools."""
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
    """Compare messages; clients strip texts, and serialise arguments again."""
    calls = ([(call.id, call.name, call.arguments) for call in message.calls] for message in (one, other))
    return (one.role, one.content.strip(), one.call_id) == (other.role, other.content.strip(), other.call_id) and (
        next(calls) == next(calls)
    )
