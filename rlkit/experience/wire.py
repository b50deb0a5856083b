"""The JSON that reward clients and servers exchange, with one version number.

Both sides are strict: no unknown keys, no strings for numbers, no NaN. Any change to a message increments
SCHEMA_VERSION; a client refuses a server of another version before a run starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainSerializer

from rlkit.experience.types import (
    FinishReason,
    Group,
    GroupScores,
    Message,
    PreferencePair,
    Prompt,
    Sample,
    Score,
    Segment,
    Span,
    SpanReward,
)

SCHEMA_VERSION: Final = 3
SCORE_PATH, HEALTH_PATH, METRICS_PATH, SCHEMA_PATH = "/v1/score", "/health", "/metrics", "/v1/schema"


class UnsendableError(ValueError):
    """Raised for a group that JSON cannot represent; the message names the column."""


def _list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _to_array(dtype: type[np.generic]) -> AfterValidator:
    def convert(values: list[Any]) -> Any:
        try:
            return np.array(values, dtype=dtype)
        except OverflowError as error:
            raise ValueError(str(error)) from error

    return AfterValidator(convert)


def _finite(columns: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(columns, allow_nan=False)  # pydantic's JSON parser accepts NaN inside a JsonValue
    return columns


def _forward(span: Span) -> Span:
    if span.start < 0 or span.end < 0:
        raise ValueError("start and end must be at least 0")
    return span


_FROM_ARRAY, _TO_LIST = BeforeValidator(_list), PlainSerializer(_list)
Ints = Annotated[list[int], _FROM_ARRAY, _to_array(np.int32), _TO_LIST]
"""In JSON a list of which every number is checked; in Python a one-dimensional array."""
Floats = Annotated[list[float], _FROM_ARRAY, _to_array(np.float32), _TO_LIST]
Bools = Annotated[list[bool], _FROM_ARRAY, _to_array(np.bool_), _TO_LIST]
Columns = Annotated[dict[str, JsonValue], AfterValidator(_finite)]


class Wire(BaseModel):
    """Base of all messages. Fields are those of the records in rlkit.experience, and documented there."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WireMessage(Wire):
    """A Message; tool calls are left out."""

    role: str
    content: str


class WirePrompt(Wire):
    """A Prompt."""

    id: str
    messages: tuple[WireMessage, ...]
    token_ids: tuple[int, ...]
    references: tuple[str, ...] = ()
    answer: str | None = None
    columns: Columns = {}


class WireSegment(Wire):
    """A Segment; its messages, which are for people, are left out."""

    start: int
    end: int
    context: Ints


class WireSample(Wire):
    """A Sample. Without log-probs (the client's default) the served reward sees NaN instead."""

    index: int
    token_ids: Ints
    text: str
    finish_reason: FinishReason
    policy_versions: tuple[int, int] = (0, 0)
    seed: int = 0
    logprobs: Floats | None = None
    mask: Bools | None = None
    spans: tuple[Annotated[Span, AfterValidator(_forward)], ...] = ()
    segments: tuple[WireSegment, ...] = ()


class WireGroup(Wire):
    """A Group that is to be scored."""

    id: str
    prompt: WirePrompt
    samples: tuple[WireSample, ...] = Field(min_length=1)
    step: int = 0


class ScoreRequest(Wire):
    """The body of `POST /v1/score`."""

    schema_version: Literal[3]
    groups: list[WireGroup]
    deadline_seconds: float | None = Field(default=None, gt=0)
    """How long the client waits for the answer; a server does not score requests that nobody waits for any more."""


def request_body(groups: Sequence[bytes], deadline_seconds: float) -> bytes:
    """Return the JSON of a ScoreRequest around groups from `encode`, so that a retry need not encode again."""
    head = f'{{"schema_version":{SCHEMA_VERSION},"deadline_seconds":{max(deadline_seconds, 0.001):.3f},"groups":['
    return head.encode() + b",".join(groups) + b"]}"


class WireScore(Wire):
    """A Score. An invalid one has a reason and no value."""

    value: float | None
    token_rewards: Floats | None = None
    span_rewards: tuple[SpanReward, ...] = ()
    components: dict[str, float] = {}
    ensemble: tuple[float, ...] = ()
    valid: bool
    reason: str = ""
    trace: str = ""


class WireGroupScores(Wire):
    """The GroupScores of one group, in sample order."""

    id: str
    samples: tuple[WireScore, ...]
    pairs: tuple[PreferencePair, ...] = ()


class ScoreResponse(Wire):
    """The answer to a ScoreRequest: its groups, in order."""

    schema_version: Literal[3]
    model_version: str
    groups: list[WireGroupScores]


class Traits(Wire):
    """What a run must know about the served reward: fields of `rewards.base.RewardTraits`, documented there."""

    references: bool
    answer: bool
    columns: tuple[str, ...]
    samples: int
    judges_texts: bool
    joins_tokens: bool
    process_rewards: bool
    process_in_value: bool
    outcome_rewards: bool
    steps: bool
    raw_scores: bool


class Health(Wire):
    """The answer to `GET /health`; HTTP status 200 if it is `ok`, else 503."""

    status: Literal["ok", "down"]
    schema_version: int
    rlkit_version: str
    reward: str
    """The dotted path of the served class."""
    model_version: str
    """Changes with the served class, its options, and the content of the model folders named in the options."""
    traits: Traits
    trainable: bool
    """Whether the reward learns when it runs inside a training run; a served reward does not change."""
    max_request_samples: int
    max_body_bytes: int
    call_timeout_seconds: float
    """Deadline of one call of the served reward; a request gets a second call if the first one kills the process."""
    workers: list[dict[str, JsonValue]]
    """Per worker process: pid, alive, busy seconds, calls, restarts, and the self-test at its last start."""


def encode(group: Group, send_logprobs: bool = False) -> bytes:
    """Return the JSON of a WireGroup. Raises UnsendableError for a value that JSON cannot represent."""
    prompt = group.prompt
    for message in prompt.messages:
        _check_text(message.content, "the prompt")
    for text in prompt.references:
        _check_text(text, "a reference")
    samples = []
    for sample in group.samples:
        _check_text(sample.text, f"the text of sample {sample.index}")
        spans = tuple(Span(s.start, s.end, s.kind, s.role, _columns(s.data, "span data")) for s in sample.spans)
        logprobs = sample.logprobs if send_logprobs else None
        segments = tuple(WireSegment(start=s.start, end=s.end, context=s.context.tolist()) for s in sample.segments)
        samples.append(WireSample(**_fields(sample) | {"logprobs": logprobs, "spans": spans, "segments": segments}))
    columns = _columns(prompt.columns, f"prompt {prompt.id}")
    messages = tuple(WireMessage(role=message.role, content=message.content) for message in prompt.messages)
    wire_prompt = WirePrompt(**_fields(prompt) | {"columns": columns, "messages": messages})
    wire_group = WireGroup(id=group.id, prompt=wire_prompt, samples=tuple(samples), step=group.step)
    return wire_group.model_dump_json().encode()


def from_wire(group: WireGroup) -> Group:
    """Return the Group of a WireGroup. Raises ValueError if its lengths do not agree."""
    samples = []
    for sample in group.samples:
        logprobs = np.full(len(sample.token_ids), np.nan, np.float32) if sample.logprobs is None else sample.logprobs
        segments = tuple(Segment(**dict(segment)) for segment in sample.segments)
        samples.append(Sample(**dict(sample) | {"logprobs": logprobs, "segments": segments}))
    messages = tuple(Message(message.role, message.content) for message in group.prompt.messages)
    return Group(group.id, Prompt(**dict(group.prompt) | {"messages": messages}), tuple(samples), step=group.step)


def scores_to_wire(group_id: str, judged: GroupScores) -> WireGroupScores:
    """Return the scores as a message; valid scores are finite by construction."""
    scores = []
    for score in judged.samples:
        texts = {"reason": _printable(score.reason), "trace": _printable(score.trace)}
        values = _fields(score) if score.valid else {"value": None, "valid": False}
        scores.append(WireScore(**values | texts))
    return WireGroupScores(id=group_id, samples=tuple(scores), pairs=tuple(judged.pairs))


def scores_from_wire(scores: WireGroupScores) -> GroupScores:
    """Return the scores of a message. Raises ValueError for a score that contradicts itself."""
    return GroupScores(tuple(Score(**dict(score)) for score in scores.samples), scores.pairs)


UNSENT = ("recorded", "weight", "versions", "episode")
"""Fields of Prompt and Sample that no servable reward needs."""


def _fields(record: Any) -> dict[str, Any]:
    """Return a record's fields. Unlike in `asdict`, inner records stay records; lists, which a reward may use in place
    of tuples, become tuples."""
    values = {field.name: getattr(record, field.name) for field in fields(record) if field.name not in UNSENT}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _columns(columns: Mapping[str, Any], owner: str) -> dict[str, Any]:
    sent = {}
    for name, value in columns.items():
        try:
            sent[name] = json.loads(json.dumps(value, default=_array, allow_nan=False))
            _check_text(json.dumps(sent[name], ensure_ascii=False), f"column {name!r}")
        except (TypeError, ValueError) as error:
            raise UnsendableError(f"column {name!r} of {owner} cannot be sent as JSON: {error}") from error
    return sent


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"it is a {type(value).__name__}")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsendableError(f"{what} is not valid Unicode: {error}") from error


def _printable(text: str) -> str:
    """Escape what UTF-8 cannot encode: the text is for people."""
    return text.encode(errors="backslashreplace").decode()


def in_chunks(groups: Sequence[Group], samples: int, tokens: int) -> list[list[int]]:
    """Return the indices of neighbouring groups for each request; a group is never split, however large."""
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
    """Return the group's number of tokens: its prompt once, and all responses with the contexts of their segments."""
    contexts = sum(len(segment.context) for sample in group.samples for segment in sample.segments)
    return len(group.prompt.token_ids) + sum(len(sample) for sample in group.samples) + contexts
