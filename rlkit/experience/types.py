"""The records of a run: what was asked (Prompt), answered (Sample) and judged (Score), kept together in a Group.

All are frozen. Token data are numpy arrays of one sample's own length T (ragged; never padded here).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

UNJUDGED = "not judged"
FinishReason = Literal["stop", "length", "abort"]
IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call as the policy wrote it."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    error: str = ""
    """Why it cannot be parsed, for the policy; the name may then be empty."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    name: str = ""
    """Role tool: the tool that answers."""
    calls: tuple[ToolCall, ...] = ()
    """Role assistant: its tool calls."""
    call_id: str = ""
    """Role tool: the id of the call that is answered."""


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    """Stable name of the problem, the same in every run over the same data."""
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    """The rendered chat template, tokenised once; what the sampler receives."""
    references: tuple[str, ...] = ()
    """Reference answers (whole texts), best first. POLAR compares responses with these."""
    answer: str | None = None
    """Reference final answer for verifiers."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The data row's other columns, for rewards that need them (tests, rubrics, tool calls, user ids, ...)."""
    recorded: Recorded | None = None
    """Responses that come with the data, for `rollout.source=data`."""


@dataclass(frozen=True, slots=True)
class Span:
    """A step or a turn of a response: response tokens [start, end)."""

    start: int
    end: int
    kind: Literal["step", "turn"] = "step"
    """turn: what one role said in an episode; observations (roles other than assistant) are not trained on."""
    role: str = "assistant"
    data: Mapping[str, Any] = field(default_factory=dict)
    """For a step its `text`; for an assistant's turn its `reward`, the `state` it was taken in (None: unknown),
    `malformed` (calls that could not be parsed), and the environment's `metrics`, if any."""


@dataclass(frozen=True, slots=True)
class Episode:
    """How an episode of an environment went, for its sample."""

    ended: Literal["done", "turns", "tokens", "failed"]
    """done: the environment said so; turns, tokens: the policy used up its budget; failed: the environment broke, which
    is not the policy's fault, so the sample has no valid score."""
    failure: str = ""
    """A short class (`timeout`, `died`, ...), then `: details`."""
    success: bool | None = None
    """None: the environment does not say."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    """The whole conversation after the prompt."""
    seconds: float = 0.0
    waited: float = 0.0
    """Of these, seconds spent waiting for the environment."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Response tokens [start, end) that follow `context`, not the tokens before them: a training row of its own."""

    start: int
    end: int
    context: IntArray
    """Token ids. Those that the policy sampled are trained on in another row; here they are only input."""
    messages: tuple[Message, ...] = ()
    """The context, for people; empty: the prompt, or the conversation so far, rendered again."""


@dataclass(frozen=True, slots=True)
class Sample:
    index: int
    """Index in its group, from 0."""
    token_ids: IntArray
    """[T] response tokens, including the end-of-sequence token if one was sampled. Never re-tokenised."""
    logprobs: FloatArray | None
    """[T] the sampler's log-probabilities of those tokens, at the sampling temperature; None: this run did not sample
    them."""
    text: str
    """The response decoded without special tokens: for rewards and for people. For an episode, only the last answer."""
    finish_reason: FinishReason
    policy_versions: tuple[int, int]
    """Policy version at the first and at the last token."""
    seed: int
    mask: BoolArray | None = None
    """[T] tokens to train on; None means all (observations of a multi-turn sample are False)."""
    spans: tuple[Span, ...] = ()
    weight: float = 1.0
    """Weight of a recorded response in the fine-tuning loss."""
    versions: IntArray | None = None
    """[T] the policy version of each token, -1 on observations; None: that of `policy_versions`."""
    episode: Episode | None = None
    segments: tuple[Segment, ...] = ()
    """In order and without gaps; none: all tokens follow the prompt. All other fields cover the sample's tokens
    together, so that it counts once, however many rows it is trained in."""

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"sample {self.index}: {len(self.token_ids)} tokens but {len(self.logprobs)} log-probs")
        if self.mask is not None and len(self.mask) != len(self.token_ids):
            raise ValueError(f"sample {self.index}: {len(self.token_ids)} tokens but a mask of {len(self.mask)}")
        ends = [0, *(segment.end for segment in self.segments)]
        if self.segments and (ends[:-1] != [segment.start for segment in self.segments] or ends[-1] != len(self)):
            raise ValueError(f"sample {self.index}: its segments do not cover its {len(self)} tokens without gaps")

    def __len__(self) -> int:
        return len(self.token_ids)

    def rows(self, prompt: IntArray) -> list[tuple[IntArray, int]]:
        """Return each segment's context and number of tokens; `prompt` is the group's."""
        if not self.segments:
            return [(prompt, len(self))]
        return [(segment.context, segment.end - segment.start) for segment in self.segments]

    @property
    def sampled(self) -> FloatArray:
        """[T] the sampler's log-probs. Raises ValueError if the response is recorded."""
        if self.logprobs is None:
            raise ValueError(f"sample {self.index} is recorded: it has no sampler's log-probs")
        return self.logprobs

    @property
    def trained(self) -> BoolArray:
        """[T] the mask; all True if there is none."""
        return np.ones(len(self.token_ids), dtype=np.bool_) if self.mask is None else self.mask

    @property
    def turns(self) -> tuple[Span, ...]:
        """The policy's turns in an episode."""
        return tuple(span for span in self.spans if span.kind == "turn" and span.role == "assistant")

    @property
    def length(self) -> int:
        """Number of trained tokens: those of the policy, without the observations between its turns."""
        return len(self.token_ids) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class SpanReward:
    """A process reward for response tokens [start, end)."""

    start: int
    end: int
    value: float


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward says about one sample. Invalid is not zero: an invalid score has a reason and no value."""

    value: float | None
    """Outcome reward; None if invalid or if the backend gives process rewards only."""
    token_rewards: FloatArray | None = None
    """[T] process reward per response token."""
    span_rewards: tuple[SpanReward, ...] = ()
    components: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the value, kept apart for combination and logging."""
    ensemble: tuple[float, ...] = ()
    """One value per member, for rewards that are ensembles."""
    valid: bool = True
    reason: str = ""
    """Why it is invalid: a short class first (`timeout`, `exception`, `not_finite`, ...), then `: details`."""
    trace: str = ""
    """Text worth showing to a person (a judge's reasoning, a verifier's extraction)."""

    def __post_init__(self) -> None:
        if self.valid:
            parts = [*self.components.values(), *self.ensemble, *(s.value for s in self.span_rewards)]
            if self.value is not None:
                parts.append(self.value)
            if not all(math.isfinite(part) for part in parts):
                raise ValueError(f"a valid score must be finite: value={self.value} components={dict(self.components)}")
            if self.token_rewards is not None and not np.isfinite(self.token_rewards).all():
                raise ValueError("a valid score must have finite token rewards")
            nothing = self.value is None and self.token_rewards is None and not self.span_rewards
            if nothing and self.reason != UNJUDGED:
                raise ValueError("a valid score must have a value, token rewards or span rewards")
        else:
            if self.value is not None:
                raise ValueError("an invalid score has no value")
            if not self.reason:
                raise ValueError("an invalid score needs a reason")

    @classmethod
    def none(cls) -> Score:
        """A score for a sample that no reward was asked to judge."""
        return cls(value=None, reason=UNJUDGED)

    @classmethod
    def invalid(cls, reason: str, trace: str = "") -> Score:
        """A score for a sample that could not be judged; it is masked out of baselines and loss."""
        return cls(value=None, valid=False, reason=reason, trace=trace)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Sample `winner` is preferred to sample `loser` of the same group with probability `probability`."""

    winner: int
    loser: int
    probability: float = 1.0
    margin: float | None = None
    """How much better, in the data's units, if the data say so."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class GroupScores:
    """What a reward says about one group: a Score per sample, in sample order, and optional preferences."""

    samples: tuple[Score, ...]
    pairs: tuple[PreferencePair, ...] = ()
    greedy: Score | None = None
    """Score of `Group.greedy`, where there is one."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Responses to a prompt from the data, tokenised, with their labels or scores and preferences."""

    samples: tuple[Sample, ...]
    scores: GroupScores


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with all its samples. Groups stay whole from the sampler to the loss."""

    id: str
    """Unique in a run: a prompt drawn twice gives two groups."""
    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: GroupScores | None = None
    step: int = 0
    """The training step that requested it."""
    greedy: Sample | None = None
    """The greedy response to the prompt, for algorithms that compare with it; never trained on."""

    def with_scores(self, scores: GroupScores) -> Group:
        """Return this group with scores. Raises ValueError if the number of scores differs from that of samples."""
        if len(scores.samples) != len(self.samples):
            raise ValueError(f"group {self.id}: {len(self.samples)} samples but {len(scores.samples)} scores")
        for sample, score in zip(self.samples, scores.samples, strict=True):
            if score.token_rewards is not None and len(score.token_rewards) != len(sample):
                raise ValueError(
                    f"group {self.id}, sample {sample.index}: {len(sample)} tokens but "
                    f"{len(score.token_rewards)} token rewards"
                )
        return replace(self, scores=scores)

    def scored(self) -> tuple[tuple[Sample, Score], ...]:
        """Return samples with their scores, in order. Raises ValueError if the group has no scores yet."""
        if self.scores is None:
            raise ValueError(f"group {self.id} has no scores yet")
        return tuple(zip(self.samples, self.scores.samples, strict=True))

    @property
    def valid(self) -> BoolArray:
        """[samples] which samples have a valid score. Raises ValueError if the group has no scores yet."""
        return np.array([score.valid for _, score in self.scored()], dtype=np.bool_)


def recorded_group(prompt: Prompt, id: str, step: int) -> Group:
    """Return the data's responses as a scored group, never stale: its version is that with which the step begins."""
    assert prompt.recorded is not None
    versions = (step - 1, step - 1)
    samples = tuple(replace(sample, policy_versions=versions) for sample in prompt.recorded.samples)
    return Group(id, replace(prompt, recorded=None), samples, scores=prompt.recorded.scores, step=step)


def text_group(id: str, prompt: Prompt, texts: Sequence[str]) -> Group:
    """Return responses as texts only, without tokens, for rewards that judge texts."""
    none = np.zeros(0)
    samples = tuple(
        Sample(
            index=index,
            token_ids=none.astype(np.int32),
            logprobs=none.astype(np.float32),
            text=text,
            finish_reason="stop",
            policy_versions=(0, 0),
            seed=0,
        )
        for index, text in enumerate(texts)
    )
    return Group(id, prompt, samples)
