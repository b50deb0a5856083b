"""What a reward server is sent and what it answers: JSON, typed, one version number for all of it.

Both sides validate strictly: no unknown key, no text in the place of a number, no NaN. A change of any message is a
new SCHEMA_VERSION; a client refuses a server of another version before a run starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from rlkit.experience import Group, GroupScores, Message, PreferencePair, Prompt, Sample, Score, Span, SpanReward
from rlkit.experience.types import FinishReason

SCHEMA_VERSION: Final = 2
SCORE_PATH, HEALTH_PATH, METRICS_PATH, SCHEMA_PATH = "/v1/score", "/health", "/metrics", "/v1/schema"


class UnsendableError(ValueError):
    """A group that JSON cannot carry; the message names the column."""


class Wire(BaseModel):
    """Base of all messages. Names are those of the records in rlkit.experience; their docs say what they mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WireMessage(Wire):
    """One chat message."""

    role: str
    content: str


class WirePrompt(Wire):
    """A prompt with what rewards need to judge answers to it."""

    id: str
    messages: list[WireMessage]
    token_ids: list[int]
    references: list[str] = []
    answer: str | None = None
    columns: dict[str, JsonValue] = {}

    @field_validator("columns")
    @classmethod
    def _finite(cls, columns: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(columns, allow_nan=False)  # pydantic's JSON parser takes NaN inside a JsonValue
        return columns


class WireSpan(Wire):
    """A step or turn of a response."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    kind: Literal["step", "turn"]
    role: str
    data: dict[str, JsonValue] = {}


class WireSample(Wire):
    """One response. Without log-probs (the default of the client) the served reward sees NaN in their place."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    policy_versions: tuple[int, int] = (0, 0)
    seed: int = 0
    logprobs: list[float] | None = None
    mask: list[bool] | None = None
    spans: list[WireSpan] = []


class WireGroup(Wire):
    """A prompt with all its samples."""

    id: str
    prompt: WirePrompt
    samples: list[WireSample] = Field(min_length=1)
    step: int = 0


class ScoreRequest(Wire):
    """The body of `POST /v1/score`."""

    schema_version: Literal[2]
    groups: list[WireGroup]
    deadline_seconds: float | None = Field(default=None, gt=0)
    """How long the client waits for the answer; a server does not score what nobody waits for any more."""


def request_body(groups: Sequence[bytes], deadline_seconds: float) -> bytes:
    """The JSON of a ScoreRequest from groups that are JSON already (`encode`), so that a second try costs nothing."""
    head = f'{{"schema_version":{SCHEMA_VERSION},"deadline_seconds":{max(deadline_seconds, 0.001):.3f},"groups":['
    return head.encode() + b",".join(groups) + b"]}"


class WireSpanReward(Wire):
    """A process reward for response tokens [start, end)."""

    start: int
    end: int
    value: float


class WireScore(Wire):
    """One sample's score. Invalid: no value, and a reason."""

    value: float | None
    token_rewards: list[float] | None = None
    span_rewards: list[WireSpanReward] = []
    components: dict[str, float] = {}
    ensemble: list[float] = []
    valid: bool
    reason: str = ""
    trace: str = ""


class WirePair(Wire):
    """Sample `winner` is preferred to sample `loser`."""

    winner: int
    loser: int
    probability: float


class WireGroupScores(Wire):
    """Scores of one group, in sample order."""

    id: str
    samples: list[WireScore]
    pairs: list[WirePair] = []


class ScoreResponse(Wire):
    """The answer to a ScoreRequest: its groups, in order."""

    schema_version: Literal[2]
    model_version: str
    groups: list[WireGroupScores]


class Needs(Wire):
    """What the served reward must find in the data."""

    references: bool
    answer: bool
    columns: list[str]


class Health(Wire):
    """The answer of `GET /health`; status 200 if it is `ok`, else 503."""

    status: Literal["ok", "down"]
    schema_version: int
    rlkit_version: str
    reward: str
    """The dotted path of the served class."""
    model_version: str
    """Changes with the served class, its options, and the content of the model folders that these name."""
    needs: Needs
    gives_process_rewards: bool
    trainable: bool
    """It learns in a run of its own; served, it stays as it is."""
    max_request_samples: int
    max_body_bytes: int
    call_timeout_seconds: float
    """Deadline of one call of the served reward; a request gets a second one if the first costs the process."""
    workers: list[dict[str, JsonValue]]
    """Per worker process: pid, alive, busy seconds, calls, restarts, and its self-test at its last start."""


def to_wire(group: Group, send_logprobs: bool = False) -> WireGroup:
    """The message for a group. Raises UnsendableError for a value that JSON cannot carry."""
    prompt = group.prompt
    samples = [
        WireSample(
            index=sample.index,
            token_ids=sample.token_ids.tolist(),
            text=_sendable(sample.text, f"the text of sample {sample.index}"),
            finish_reason=sample.finish_reason,
            policy_versions=sample.policy_versions,
            seed=sample.seed,
            logprobs=sample.logprobs.tolist() if send_logprobs else None,
            mask=None if sample.mask is None else sample.mask.tolist(),
            spans=[
                WireSpan(start=s.start, end=s.end, kind=s.kind, role=s.role, data=_columns(s.data, "span data"))
                for s in sample.spans
            ],
        )
        for sample in group.samples
    ]
    wire_prompt = WirePrompt(
        id=prompt.id,
        messages=[WireMessage(role=m.role, content=_sendable(m.content, "the prompt")) for m in prompt.messages],
        token_ids=list(prompt.token_ids),
        references=[_sendable(text, "a reference") for text in prompt.references],
        answer=prompt.answer,
        columns=_columns(prompt.columns, f"prompt {prompt.id}"),
    )
    return WireGroup(id=group.id, prompt=wire_prompt, samples=samples, step=group.step)


def encode(group: Group, send_logprobs: bool = False) -> bytes:
    """`to_wire` as JSON."""
    return to_wire(group, send_logprobs).model_dump_json().encode()


def from_wire(group: WireGroup) -> Group:
    """The group a message describes. Raises ValueError if its lengths do not agree."""
    samples = tuple(
        Sample(
            index=sample.index,
            token_ids=np.array(sample.token_ids, dtype=np.int32),
            logprobs=np.array(
                np.full(len(sample.token_ids), np.nan) if sample.logprobs is None else sample.logprobs, np.float32
            ),
            text=sample.text,
            finish_reason=sample.finish_reason,
            policy_versions=sample.policy_versions,
            seed=sample.seed,
            mask=None if sample.mask is None else np.array(sample.mask, dtype=np.bool_),
            spans=tuple(Span(s.start, s.end, s.kind, s.role, s.data) for s in sample.spans),
        )
        for sample in group.samples
    )
    prompt = Prompt(
        id=group.prompt.id,
        messages=tuple(Message(m.role, m.content) for m in group.prompt.messages),
        token_ids=tuple(group.prompt.token_ids),
        references=tuple(group.prompt.references),
        answer=group.prompt.answer,
        columns=group.prompt.columns,
    )
    return Group(group.id, prompt, samples, step=group.step)


def scores_to_wire(group: Group) -> WireGroupScores:
    """The message for the scores of a judged group (whose valid scores are finite by construction)."""
    return WireGroupScores(
        id=group.id,
        samples=[
            WireScore(
                value=None if score.value is None else float(score.value),
                token_rewards=None if score.token_rewards is None else np.asarray(score.token_rewards).tolist(),
                span_rewards=[
                    WireSpanReward(start=s.start, end=s.end, value=float(s.value)) for s in score.span_rewards
                ],
                components={name: float(value) for name, value in score.components.items()},
                ensemble=[float(value) for value in score.ensemble],
                valid=score.valid,
                reason=_printable(score.reason),
                trace=_printable(score.trace),
            )
            if score.valid
            else WireScore(value=None, valid=False, reason=_printable(score.reason), trace=_printable(score.trace))
            for _, score in group.scored()
        ],
        pairs=[WirePair(**asdict(pair)) for pair in group.scores.pairs] if group.scores is not None else [],
    )


def scores_from_wire(scores: WireGroupScores) -> GroupScores:
    """The scores a message describes. Raises ValueError for a score that contradicts itself."""
    return GroupScores(
        tuple(
            Score(
                value=score.value,
                token_rewards=None if score.token_rewards is None else np.array(score.token_rewards, dtype=np.float32),
                span_rewards=tuple(SpanReward(s.start, s.end, s.value) for s in score.span_rewards),
                components=score.components,
                ensemble=tuple(score.ensemble),
                valid=score.valid,
                reason=score.reason,
                trace=score.trace,
            )
            for score in scores.samples
        ),
        tuple(PreferencePair(pair.winner, pair.loser, pair.probability) for pair in scores.pairs),
    )


def _columns(columns: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Columns with arrays as lists and tuples as lists."""
    sent = {}
    for name, value in columns.items():
        try:
            sent[name] = json.loads(json.dumps(value, default=_array, allow_nan=False))
            _sendable(json.dumps(sent[name], ensure_ascii=False), f"column {name!r}")
        except (TypeError, ValueError) as error:
            raise UnsendableError(f"column {name!r} of {owner} cannot be sent as JSON: {error}") from error
    return sent


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"it is a {type(value).__name__}")


def _sendable(text: str, what: str) -> str:
    """The text, if UTF-8 can carry it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsendableError(f"{what} is no valid Unicode: {error}") from error
    return text


def _printable(text: str) -> str:
    """The text with what UTF-8 cannot carry escaped: it is for people."""
    return text.encode(errors="backslashreplace").decode()


def in_chunks(groups: Sequence[Group], samples: int, tokens: int) -> list[list[int]]:
    """Indices of neighbouring groups that one request may carry; a group is never cut, however large."""
    chunks: list[list[int]] = []
    room_samples = room_tokens = 0
    for index, group in enumerate(groups):
        size = tokens_of(group)
        if not chunks or len(group.samples) > room_samples or size > room_tokens:
            chunks.append([])
            room_samples, room_tokens = samples, tokens
        chunks[-1].append(index)
        room_samples -= len(group.samples)
        room_tokens -= size
    return chunks


def tokens_of(group: Group) -> int:
    """Tokens of a group: its prompt once, and all its responses."""
    return len(group.prompt.token_ids) + sum(len(sample) for sample in group.samples)
