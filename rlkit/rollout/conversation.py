"""The record of an episode: what the engine was given and what it returned, token by token. No vLLM here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlkit.environments.base import Step
from rlkit.experience import Episode, Message, Prompt, Sample, Segment, Span, ToolCall
from rlkit.experience.types import FinishReason

if TYPE_CHECKING:
    from rlkit.rollout.rendering import Bridge
    from rlkit.rollout.requests import Response


@dataclass(frozen=True)
class Limits:
    """Token limits of an episode."""

    prompt: int
    """For its opening."""
    response: int
    """For all turns and observations of one conversation together."""
    rows: int
    """For all its conversations together, including their openings: the learner computes them at once."""

    def of(self, prompt: Sequence[int]) -> int:
        """Return the total length that a conversation with this prompt may reach."""
        return min(len(prompt), self.prompt) + self.response


class _Piece(NamedTuple):
    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    """Policy version of each token; -1: an observation."""
    role: str
    data: Mapping[str, Any]


@dataclass
class _Turn:
    response: Response
    kept: int
    """How many of its tokens are kept: not all if the template continues with another than the sampled stop token."""
    text: str
    data: dict[str, Any]
    observation: list[int] = field(default_factory=list)
    """Token ids between this turn and the next."""
    observed_role: str = ""

    def pieces(self) -> list[_Piece]:
        """Return the turn, and the observation after it if there is one."""
        response, kept, between = self.response, self.kept, np.array(self.observation, np.int32)
        said = response.token_ids[:kept], response.logprobs[:kept], response.versions[:kept]
        observed = _Piece(between, np.zeros(len(between)), np.full(len(between), -1), self.observed_role, {})
        return [_Piece(*said, "assistant", self.data), *([observed] if len(between) else [])]


class Conversation:
    """Sampled tokens are never rendered again: each prompt is the previous one, the sampled tokens, and a bridge."""

    def __init__(self, prompt_ids: Sequence[int], limit: int, opening: Iterable[Message] = ()) -> None:
        """`limit`: tokens of all turns and observations together (`rollout.max_response_tokens`). `opening`: the
        messages rendered as `prompt_ids`."""
        self.prompt_ids, self.opening = tuple(prompt_ids), tuple(opening)
        self._ids = list(prompt_ids)
        self._limit = len(self._ids) + limit
        self._turns: list[_Turn] = []
        self._answer: tuple[Bridge, str] | None = None  # the last observation, until a turn follows it
        self.messages: list[Message] = []
        """The messages after the prompt."""

    @property
    def turns(self) -> int:
        return len(self._turns)

    @property
    def room(self) -> int:
        """Number of tokens left for the next turn."""
        return self._limit - len(self)

    def __len__(self) -> int:
        """Return the number of tokens that the next turn continues."""
        if self._answer is None:
            return len(self._ids)
        bridge, _ = self._answer
        return len(self._ids) - bridge.drop + len(bridge.ids)

    def prompt(self) -> list[int]:
        """Return the tokens that the next turn continues."""
        if self._answer is None:
            return list(self._ids)
        bridge, _ = self._answer
        return [*self._ids[: len(self._ids) - bridge.drop], *bridge.ids]

    def sampled(
        self,
        response: Response,
        text: str,
        calls: Sequence[ToolCall] = (),
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the policy's turn in answer to `prompt()`. `text`: without its calls; `data`: for its span."""
        if self._answer is not None:
            bridge, role = self._answer
            last = self._turns[-1]
            last.kept -= bridge.drop
            last.observation, last.observed_role = list(bridge.ids), role
            self._ids, self._answer = self.prompt(), None
        self._ids += response.token_ids.tolist()
        malformed = sum(bool(call.error) for call in calls)
        turn = {"reward": 0.0, "state": None, "malformed": malformed, **(data or {})}
        self._turns.append(_Turn(response, len(response.token_ids), text, turn))
        self.messages.append(Message("assistant", text, calls=tuple(calls)))

    def judged(self, step: Step) -> None:
        """Record the last turn's reward, the state it was taken in, and the environment's metrics for it."""
        said = {"metrics": dict(step.metrics)} if step.metrics else {}
        self._turns[-1].data.update(reward=step.reward, state=step.state, **said)

    def observed(self, bridge: Bridge, messages: Sequence[Message]) -> bool:
        """Add the environment's answer to the last turn; if it would leave no token for the next, return False."""
        if self._answer is not None or not self._turns:
            raise RuntimeError("an observation that does not answer a turn")
        if len(self._ids) - bridge.drop + len(bridge.ids) >= self._limit:
            return False
        self._answer = bridge, messages[-1].role if messages else "user"
        self.messages += messages
        return True

    def pieces(self) -> list[_Piece]:
        """Return everything from the first sampled token to the last."""
        return [piece for turn in self._turns for piece in turn.pieces()]

    def last(self) -> tuple[str, FinishReason]:
        return self._turns[-1].text, self._turns[-1].response.finish_reason


def opening_of(prompt: Prompt, played: Sequence[Sequence[Conversation]]) -> Prompt:
    """Return a group's prompt with an opening from its samples' conversations: preferably one that all samples share,
    then one with the task's messages, then the shortest, so that it does not depend on timing. Returns the prompt
    itself if no conversation was begun."""
    begun = [conversations for conversations in played if conversations]
    if not begun:
        return prompt
    others = [{conversation.prompt_ids for conversation in conversations} for conversations in begun[1:]]

    def rank(conversation: Conversation) -> tuple[bool, bool, int, tuple[int, ...]]:
        ids, texts = conversation.prompt_ids, [message.content for message in conversation.opening]
        asks = all(any(message.content in text for text in texts) for message in prompt.messages)
        return not all(ids in of for of in others), not asks, len(ids), ids

    first = min(begun[0], key=rank)
    return replace(prompt, messages=first.opening, token_ids=first.prompt_ids)


def as_sample(
    conversations: Sequence[Conversation],
    index: int,
    seed: int,
    episode: Episode,
    prompt_ids: tuple[int, ...] | None = None,
    last: tuple[str, FinishReason] | None = None,
) -> Sample:
    """Return all that was sampled in an episode as a sample, one conversation after the other.

    `prompt_ids`: the group's; None: the first conversation's. `last`: text and finish reason of the last answer; None:
    the last conversation's. Raises ValueError if nothing was sampled.
    """
    conversations = [conversation for conversation in conversations if conversation.turns]
    if not conversations:
        raise ValueError(f"sample {index}: nothing was sampled")
    of_each = [conversation.pieces() for conversation in conversations]
    pieces = [piece for some in of_each for piece in some]
    ends = np.cumsum([len(piece.token_ids) for piece in pieces]).tolist()
    parts = np.cumsum([0, *(sum(len(piece.token_ids) for piece in some) for some in of_each)]).tolist()
    segments = tuple(
        Segment(
            start,
            end,
            np.array(conversation.prompt_ids, np.int32),
            () if conversation.prompt_ids == prompt_ids else conversation.opening,
        )
        for conversation, start, end in zip(conversations, parts[:-1], parts[1:], strict=True)
    )
    one = len(segments) == 1 and (prompt_ids is None or conversations[0].prompt_ids == prompt_ids)
    versions = np.concatenate([piece.versions for piece in pieces]).astype(np.int32)
    sampled_by = versions[versions >= 0]
    text, finish_reason = last or conversations[-1].last()
    return Sample(
        index=index,
        token_ids=np.concatenate([piece.token_ids for piece in pieces]).astype(np.int32),
        logprobs=np.concatenate([piece.logprobs for piece in pieces]).astype(np.float32),
        text=text,
        finish_reason="length" if episode.ended in ("turns", "tokens") else finish_reason,
        policy_versions=(int(sampled_by.min()), int(sampled_by.max())),
        seed=seed,
        mask=versions >= 0,
        spans=tuple(
            Span(end - len(piece.token_ids), end, "turn", piece.role, piece.data)
            for piece, end in zip(pieces, ends, strict=True)
        ),
        versions=versions,
        episode=replace(episode, messages=tuple(m for conversation in conversations for m in conversation.messages)),
        segments=() if one else segments,
    )
