"""Requests to rollout workers and their engines: groups of responses, with seeds that depend on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.config.schema import RolloutConfig
from rlkit.config.structured import Grammar
from rlkit.experience import Group, Prompt, Sample
from rlkit.experience.steps import step_spans
from rlkit.experience.types import FinishReason


@dataclass(frozen=True)
class GroupRequest:
    id: str
    prompt: Prompt
    samples: int
    seed: int
    step: int
    oldest: int = 0
    """Version of the oldest weights that may sample it; workers hold the request until they have these."""
    greedy: bool = False
    """Also sample a greedy response (`Group.greedy`)."""
    temperature: float | None = None
    """Temperature of the samples; None: the rollout's, 0: greedy."""
    max_response_tokens: int | None = None
    """None: that of the rollout."""

    @property
    def responses(self) -> int:
        """Number of responses to generate; the greedy one is the last."""
        return self.samples + self.greedy


@dataclass(frozen=True)
class Request:
    id: str
    prompt: Sequence[int]
    seed: int | None
    """None: the engine's own randomness."""
    max_tokens: int
    temperature: float
    grammar: Grammar | None = None
    """What the response must match."""


@dataclass(frozen=True)
class Response:
    id: str
    token_ids: np.ndarray
    """[T] int32: the tokens as sampled, with the stop token, or the token that completes a stop text."""
    logprobs: np.ndarray
    """[T] float32, under the distribution sampled from: after temperature, penalty, grammar and truncation."""
    finish_reason: FinishReason
    cached_prompt_tokens: int
    """Prompt tokens served by the prefix cache."""
    versions: np.ndarray
    """[T] int32: the version of the weights that sampled each token."""


def sample_seed(seed: int, group_id: str, index: int | str) -> int:
    """Return a seed that depends on nothing else, so results do not depend on which worker sampled what.

    `index`: a sample's index; `INDEX.TURN` for an episode's turn after the first; `environment` for its environment.
    """
    digest = hashlib.blake2b(f"{seed}/{group_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def group_of(request: GroupRequest, responses: Mapping[int, Response], tokenizer: Any, config: RolloutConfig) -> Group:
    """Return the group of a request. `responses`: all of its responses, by index."""
    ordered = [responses[i] for i in range(request.responses)]
    texts = tokenizer.batch_decode([response.token_ids for response in ordered], skip_special_tokens=True)
    samples = tuple(
        Sample(
            index=i,
            token_ids=response.token_ids,
            logprobs=None if config.source == "model" else response.logprobs,
            text=text,
            finish_reason=response.finish_reason,
            **_versions(request, response, config),
            seed=sample_seed(request.seed, request.id, i),
            spans=() if config.steps == "none" else step_spans(response.token_ids, tokenizer, config.steps),
        )
        for i, (response, text) in enumerate(zip(ordered, texts, strict=True))
    )
    greedy = samples[-1] if request.greedy else None
    return Group(request.id, request.prompt, samples[: request.samples], step=request.step, greedy=greedy)


def _versions(request: GroupRequest, response: Response, config: RolloutConfig) -> dict[str, Any]:
    if config.source == "model":
        # A frozen model has no versions: its samples count as sampled for the step that requests them.
        return {"policy_versions": (request.step - 1, request.step - 1)}
    first, last = int(response.versions[0]), int(response.versions[-1])
    return {"policy_versions": (first, last), "versions": None if first == last else response.versions}
