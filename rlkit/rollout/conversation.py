"""The ledger of one episode: what the engine was given and what it returned, token by token. No vLLM here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.environments.base import Step
from rlkit.experience import Episode, Message, Sample, Span, ToolCall

if TYPE_CHECKING:
    from rlkit.rollout.rendering import Bridge
    from rlkit.rollout.sampler import Response


@dataclass
class _Turn:
    response: Response
    version: int
    kept: int
    """Of its tokens; fewer than were sampled where the template goes on otherwise than with the sampled stop token."""
    text: str
    data: dict[str, Any]
    observation: list[int] = field(default_factory=list)
    """Token ids between it and the next turn."""
    observed_role: str = ""


class Conversation:
    """Sampled tokens are never rendered again: each prompt is the one before, what was sampled, and a bridge."""

    def __init__(self, prompt_ids: Sequence[int], limit: int) -> None:
        """`limit`: tokens of all turns and observations together (`rollout.max_response_tokens`)."""
        self._ids = list(prompt_ids)
        self._limit = len(self._ids) + limit
        self._turns: list[_Turn] = []
        self._answer: tuple[Bridge, str] | None = None  # the last observation, until a turn follows it
        self.messages: list[Message] = []
        """What was said after the prompt."""

    @property
    def turns(self) -> int:
        return len(self._turns)

    @property
    def room(self) -> int:
        """Tokens left for the next turn."""
        return self._limit - len(self.prompt())

    def prompt(self) -> list[int]:
        """What the next turn continues."""
        if self._answer is None:
            return list(self._ids)
        bridge, _ = self._answer
        return [*self._ids[: len(self._ids) - bridge.drop], *bridge.ids]

    def sampled(
        self,
        response: Response,
        version: int,
        text: str,
        calls: Sequence[ToolCall] = (),
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """A turn of the policy in answer to `prompt()`. `text`: without its calls; `data`: for its span."""
        if self._answer is not None:
            bridge, role = self._answer
            last = self._turns[-1]
            last.kept -= bridge.drop
            last.observation, last.observed_role = list(bridge.ids), role
            self._ids, self._answer = self.prompt(), None
        self._ids += response.token_ids.tolist()
        malformed = sum(bool(call.error) for call in calls)
        turn = {"reward": 0.0, "state": None, "malformed": malformed, **(data or {})}
        self._turns.append(_Turn(response, version, len(response.token_ids), text, turn))
        self.messages.append(Message("assistant", text, calls=tuple(calls)))

    def judged(self, step: Step) -> None:
        """What the last turn earned, the state it was taken in, and what the environment says of it."""
        said = {"metrics": dict(step.metrics)} if step.metrics else {}
        self._turns[-1].data.update(reward=step.reward, state=step.state, **said)

    def observed(self, bridge: Bridge, messages: Sequence[Message]) -> bool:
        """The environment's answer to the last turn. False: it would leave no token for the next, and is not kept."""
        if self._answer is not None or not self._turns:
            raise RuntimeError("an observation that answers no turn")
        if len(self._ids) - bridge.drop + len(bridge.ids) >= self._limit:
            return False
        self._answer = bridge, messages[-1].role if messages else "user"
        self.messages += messages
        return True

    def sample(self, index: int, seed: int, episode: Episode) -> Sample:
        """Everything from the first sampled token to the last. Raises ValueError if none was sampled."""
        if not self._turns:
            raise ValueError(f"sample {index}: nothing was sampled")
        last = self._turns[-1]
        ids: list[np.ndarray] = []
        logprobs: list[np.ndarray] = []
        versions: list[np.ndarray] = []
        spans: list[Span] = []
        position = 0
        for turn in self._turns:
            ids.append(turn.response.token_ids[: turn.kept])
            logprobs.append(turn.response.logprobs[: turn.kept])
            versions.append(np.full(turn.kept, turn.version))
            spans.append(Span(position, position + turn.kept, "turn", "assistant", turn.data))
            position += turn.kept
            if turn is not last:
                between = len(turn.observation)
                ids.append(np.array(turn.observation))
                logprobs.append(np.zeros(between))
                versions.append(np.full(between, -1))
                spans.append(Span(position, position + between, "turn", turn.observed_role))
                position += between
        version = np.concatenate(versions).astype(np.int32)
        budget = episode.ended in ("turns", "tokens")
        sampled_by = [turn.version for turn in self._turns]
        return Sample(
            index=index,
            token_ids=np.concatenate(ids).astype(np.int32),
            logprobs=np.concatenate(logprobs).astype(np.float32),
            text=last.text,
            finish_reason="length" if budget else last.response.finish_reason,
            policy_versions=(min(sampled_by), max(sampled_by)),
            seed=seed,
            mask=version >= 0,
            spans=tuple(spans),
            versions=version,
            episode=replace(episode, messages=tuple(self.messages)),
        )
