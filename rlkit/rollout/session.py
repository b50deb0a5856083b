"""What an agent that owns its loop says to the policy, recorded as one conversation.

A session is the policy's side of one episode. Each call appends to the ledger and samples one turn:

- Messages are compared with those of the conversation so far; what is new goes behind the sampled tokens by a bridge,
  so that no sampled text is ever rendered again. The first call is rendered whole. A call with token ids must continue
  the ids so far.
- One conversation per episode. A call that continues anything but its end (an edited history, a second agent, another
  try of the same turn) is refused: everything that was sampled for an agent is trained on, or was not sampled.
- An identical call while the first is still being answered waits for the same answer, and one that says that it is a
  retry gets the recorded one: a client that lost its connection costs nothing. Sampling goes on without the client.
- Budgets (`max_turns`, tokens) refuse further calls; how the episode ends then is the policy's doing, with the reward
  that the agent returns, or 0 if it raises.
- When the agent has ended the session is sealed: late calls sample nothing.
- Seeds depend on the sample's seed and the prompt's token ids, not on who called when.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlkit.environments.base import EnvironmentConfig
from rlkit.environments.tool import Tool
from rlkit.experience import Message
from rlkit.rollout.conversation import Conversation
from rlkit.rollout.rendering import Bridge, Renderer
from rlkit.rollout.sampler import Response


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


class Session:
    def __init__(
        self,
        begin: Callable[[tuple[Message, ...], Sequence[int]], Conversation],
        sample: Callable[[Conversation, int | None], Awaitable[Response]],
        version: Callable[[], int],
        renderer_of: Callable[[Sequence[Tool]], Renderer],
        options: EnvironmentConfig,
    ) -> None:
        """`begin`: of the opening and its token ids. `sample`: the next turn, in at most so many tokens."""
        self._begin, self._sample_turn, self._version = begin, sample, version
        self._renderer_of, self._options = renderer_of, options
        self._conversation: Conversation | None = None
        self._said: list[Message] | None = None
        """The conversation as the agent knows it; None: it was held in token ids."""
        self._ids: list[int] = []
        """The conversation up to the end of the last turn."""
        self._turn: list[int] = []
        """Token ids of the last turn."""
        self._stopped = False
        """Whether its last token ended it."""
        self._calls: dict[bytes, asyncio.Task[Answer]] = {}
        self._sealed = False
        self.policy_seconds = 0.0
        """In which the policy answered."""
        self.spent: Literal["turns", "tokens"] | None = None
        """The budget that a call was refused for."""
        self.refusal = ""
        """Why a call was refused that would have begun another conversation."""
        self.fault: Exception | None = None
        """What went wrong that is not the agent's to read."""

    async def chat(
        self, key: bytes, retried: bool, messages: Sequence[Message], tools: Sequence[Tool], most: int | None
    ) -> Answer:
        """`key`: equal for equal calls. `most`: tokens. Raises RefusedError."""
        return await self._call(key, retried, lambda: self._continue_chat(messages, tools), most)

    async def generate(self, key: bytes, retried: bool, token_ids: Sequence[int], most: int | None) -> Answer:
        """Raises RefusedError."""
        return await self._call(key, retried, lambda: self._continue_ids(list(token_ids)), most)

    def seal(self) -> None:
        self._sealed = True
        for call in self._calls.values():
            call.cancel()

    async def _call(self, key: bytes, retried: bool, proceed: Callable[[], None], most: int | None) -> Answer:
        self._check_open()
        call = self._calls.get(key)
        if call is None or (call.done() and not retried):
            if any(not other.done() for other in self._calls.values()):
                raise self._second("it comes while another call is being answered")
            try:
                proceed()
            except RefusedError:
                raise
            except Exception as error:
                self.fault = error
                self._check_open()
            call = self._calls[key] = asyncio.create_task(self._sampled(most))
        await asyncio.wait({call})
        if call.cancelled() or call.exception() is not None:
            self._check_open()
        return call.result()

    def _check_open(self) -> None:
        if self._sealed:
            raise RefusedError("the episode has ended", "episode_ended", 410)
        if self.fault is not None:
            raise RefusedError(f"the episode has failed: {self.fault}", "episode_failed")

    def _second(self, why: str) -> RefusedError:
        self.refusal = f"an episode is one conversation, and this call begins another: {why}"
        return RefusedError(self.refusal, "second_conversation")

    async def _sampled(self, most: int | None) -> Answer:
        conversation = self._conversation
        assert conversation is not None
        prompt = conversation.prompt()
        began = time.perf_counter()
        try:
            response = await self._sample_turn(conversation, most)
        except Exception as error:
            self.fault = error
            raise
        finally:
            self.policy_seconds += time.perf_counter() - began
        self._turn, self._stopped = response.token_ids.tolist(), response.finish_reason == "stop"
        self._ids = [*prompt, *self._turn]
        text, calls = self.renderer.parse(self._turn)
        conversation.sampled(response, self._version(), text, calls)
        message = Message("assistant", text, calls=calls)
        if any(call.error for call in calls):
            tokenizer = self.renderer.template.tokenizer
            message = Message("assistant", str(tokenizer.decode(self._turn, skip_special_tokens=True)))
        if self._said is not None:
            self._said.append(message)
        return Answer(prompt, response, message)

    def _continue_chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        if self._conversation is None:
            self.renderer = self._renderer_of(tools)
            self._conversation = self._begin(tuple(messages), self.renderer.first(messages))
            self._said = list(messages)
            return
        if self._said is None:
            raise self._second("it was held in token ids so far")
        if list(tools) != list(self.renderer.tools):
            raise self._second("it offers other tools")
        known = len(self._said)
        for number, (before, now) in enumerate(zip(self._said, messages, strict=False)):
            if not _same(before, now):
                raise self._second(f"its message {number} is {_shown(now)}; in the conversation it is {_shown(before)}")
        said = list(messages[known:])
        if not said:
            raise self._second(f"it has {len(messages)} messages, and the conversation {known}")
        if wrong := next((message for message in said if message.role not in ("tool", "user")), None):
            raise self._second(f"{_shown(wrong)} is new in it; only users and tools may speak between two turns")
        limit = self._options.max_observation_tokens
        shown = [self.renderer.shortened(message, limit) for message in said]
        self._go_on(self.renderer.bridge(self._turn, shown), shown)
        self._said += said

    def _continue_ids(self, token_ids: list[int]) -> None:
        if self._conversation is None:
            self.renderer = self._renderer_of(())
            text = str(self.renderer.template.tokenizer.decode(token_ids, skip_special_tokens=False))
            self._conversation = self._begin((Message("user", text),), token_ids)
            return
        same = next((i for i, (a, b) in enumerate(zip(self._ids, token_ids, strict=False)) if a != b), None)
        same = min(len(self._ids), len(token_ids)) if same is None else same
        drop = len(self._ids) - same
        # A client may leave out the token that ended a turn, or end it otherwise.
        if drop > int(self._stopped and len(self._turn) > 1):
            raise self._second(f"its token {same} differs from the conversation of {len(self._ids)} tokens")
        ids = token_ids[same:]
        if not ids:
            raise self._second("nothing follows the last turn in it")
        text = str(self.renderer.template.tokenizer.decode(ids, skip_special_tokens=True))
        self._go_on(Bridge(drop, ids), [Message("user", text)])
        self._said = None

    def _go_on(self, bridge: Bridge, messages: Sequence[Message]) -> None:
        conversation = self._conversation
        assert conversation is not None
        most = self._options.max_turns
        if conversation.turns >= most:
            self.spent = "turns"
            raise RefusedError(f"the episode's turns are spent (environment.max_turns={most})", "turns_spent")
        if not conversation.observed(bridge, messages):
            self.spent = "tokens"
            raise RefusedError(
                "the episode's tokens are spent (rollout.max_response_tokens holds for all its turns together)",
                "context_length_exceeded",
            )


def _same(one: Message, other: Message) -> bool:
    """Clients strip texts, and write arguments anew."""
    calls = ([(call.id, call.name, call.arguments) for call in message.calls] for message in (one, other))
    return (one.role, one.content.strip(), one.call_id) == (other.role, other.content.strip(), other.call_id) and (
        next(calls) == next(calls)
    )


def _shown(message: Message) -> str:
    calls = "".join(f" call of {call.name}" for call in message.calls)
    return f"{message.role} {message.content!r:.60}{calls}"
