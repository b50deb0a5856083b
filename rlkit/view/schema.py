"""The viewer's results: one model per result. `/api/schema` is generated from them, and the page's types mirror them.

A number that is not finite, or unknown, is null. Rows of samples.jsonl are passed on as they were written.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

Number = float | None
Numbers = list[Number]
Row = dict[str, Any]
"""A line of samples.jsonl as it is, plus `id`, its number in the file."""

Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]


class Asked(BaseModel):
    """Any query. Its fields are the parameters of its address; unknown ones are refused. The models of queries are next
    to the functions that answer them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)


class AboutRun(Asked):
    run: str
    """The id of a run, as listed by /api/runs."""


class AboutRuns(Asked):
    runs: str = ""
    """Ids of runs, separated by commas; empty: all."""
    cursor: str = ""


class Result(BaseModel):
    """Any result. Fields whose JSON name is a Python keyword (`from`) have an alias."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, serialize_by_alias=True)


class Has(Result):
    """What a run recorded."""

    tokens: bool = False
    rescored: list[str] = []
    correct: bool = False
    staleness: bool = False
    components: list[str] = []
    results: bool = False


class RunInfo(Result):
    id: str
    path: str
    kind: Literal["training", "evaluation"] = "training"
    state: Literal["running", "ended", "silent"]
    state_text: str
    algorithm: str = ""
    reward: str = ""
    model: str = ""
    data: str = ""
    step: int = 0
    total_steps: int | None = None
    began: Number = None
    """Unix seconds; `updated` likewise."""
    updated: Number = None
    samples: int = 0
    """Number of indexed rows of samples.jsonl; the index follows the file."""
    kept_groups: int = 0
    has: Has = Has()


class RunList(Result):
    rlkit: str
    """The version of rlkit."""
    runs: list[RunInfo]


class Series(Result):
    """Columns of equal length, one entry per line of metrics.jsonl."""

    step: list[int]
    seconds: Numbers
    samples: Numbers
    """Responses sampled up to this line, including those of rejected groups."""
    values: dict[str, Numbers]


class MetricsResult(Result):
    run: str
    names: list[str]
    """All metrics of the run, sorted by area."""
    training: Series
    evaluation: Series


class Tile(Result):
    name: str
    """The metric that it shows."""
    title: str
    value: Number
    first: Number
    change: Number
    unit: Literal["", "share", "tokens", "s", "nats"]
    better: Literal["up", "down"] | None
    series: list[tuple[int, Number]]
    """At most 60 points (step, value)."""
    note: str


class Light(Result):
    """A rule over metrics: its state, and what the metric means, how to read it and what to do."""

    id: str
    title: str
    state: Literal["good", "look", "bad", "unknown"]
    word: str
    value_text: str
    meaning: str
    reading: str
    remedy: str
    metrics: list[str]
    steps: list[int]
    """Steps at which the state held."""


class Progress(Result):
    step: int
    total: int | None
    seconds_per_step: Number
    remaining_seconds: Number


class Warned(Result):
    text: str
    count: int


class SampleSummary(Result):
    """A row of the sample list."""

    id: int
    step: int
    group_id: str
    prompt_id: str
    sample: int
    rank: str | None
    reward: Number
    components: dict[str, Number]
    advantage: Number
    length: int | None
    correct: Number
    verdict: Number
    finish_reason: str | None
    staleness: Number
    dropped: str | None
    valid: bool
    reason: str
    set: str | None
    kind: str
    """`training` or `evaluation`."""
    rescored: dict[str, Number]
    has_tokens: bool
    prompt_head: str
    response_head: str


class OverviewResult(Result):
    tiles: list[Tile]
    lights: list[Light]
    progress: Progress
    last: list[SampleSummary]
    warnings: list[Warned]


class SamplesResult(Result):
    total: int
    rows: list[SampleSummary]
    next: str | None
    """The `cursor` of the next page."""


class HistogramResult(Result):
    key: str
    edges: list[float]
    """[n + 1], or empty if no sample has this number."""
    counts: list[int]
    missing: int


class GroupMember(Result):
    """A sample of a group; `id` is null if it is not in samples.jsonl."""

    id: int | None
    sample: int
    reward: Number
    rank: str | None


class TokensAbout(Result):
    signals: list[str]
    length: int


class Part(Result):
    """One component's share of a reward: `contribution` = `weight` x `value` if the weight is known."""

    name: str
    value: Number
    weight: Number
    contribution: Number


class SampleResult(Result):
    row: Row
    summary: SampleSummary
    group: list[GroupMember]
    tokens: TokensAbout | None
    account: list[Part]
    account_note: str
    """Whether the contributions add up to the reward, and if not, why."""
    previous: int | None
    """The previous sample in the group, else in the file; `next` likewise."""
    next: int | None


class Range(Result):
    """The range of a signal over the whole sample."""

    low: Number
    high: Number
    signed: bool
    meaning: str


class TokensResult(Result):
    from_: int = Field(alias="from")
    to: int
    total: int
    pieces: list[str]
    mask: list[bool]
    version: list[int]
    signals: dict[str, Numbers]
    ranges: dict[str, Range]


class GroupResult(Result):
    group_id: str
    step: int
    prompt: list[Row]
    """{role, content}."""
    answer: Any
    references: list[str]
    rewards: Numbers
    """Rewards by sample; null: invalid, or not recorded."""
    rows: list[Row]
    equal: bool
    dropped: str | None


class DistributionResult(Result):
    key: str
    edges: list[float]
    steps: list[int]
    """The first step of each column."""
    counts: list[list[int]]
    """[step][bin]."""


class ScatterResult(Result):
    points: list[tuple[float, float, int]]
    """(x, y, id)."""
    total: int


class Evidence(Result):
    label: str
    value: str


class Suspect(SampleSummary):
    score: Number


class Finding(Result):
    id: str
    title: str
    level: Literal["look", "note"]
    text: str
    evidence: list[Evidence]
    metrics: list[str]
    rows: list[Suspect] = []
    """Samples that show the finding, if samples can."""
    filter: str | None = None
    """A filter that lists its samples."""


class Missing(Result):
    """A sign that could not be checked, in words, and the reason."""

    id: str
    why: str


class TriageResult(Result):
    verifier: bool
    """Whether there are independent verdicts."""
    findings: list[Finding]
    missing: list[Missing]


class ConfigKey(Result):
    key: str
    values: list[str | None]
    """As YAML writes them, one per run; null: the run has no such key."""
    differs: bool


class ConfigResult(Result):
    keys: list[ConfigKey]


class ComparedMetric(Result):
    name: str
    values: Numbers
    """The last value of each run."""
    best: Numbers
    difference: Number
    """The last run's value minus the first's, with a 95 % interval if there are pairs."""
    low: Number
    high: Number
    paired: int
    words: str


class ComparedPrompt(Result):
    prompt_id: str
    prompt_head: str
    ids: list[list[int]]
    """Ids of samples per run."""
    rewards: list[Numbers]


class CompareResult(Result):
    metrics: list[ComparedMetric]
    prompts: list[ComparedPrompt]
    next: str | None


class TimeResult(Result):
    phases: list[str]
    steps: list[int]
    seconds: dict[str, Numbers]
    step_seconds: Numbers
    overlap: Numbers
    """Seconds by which the phases exceed the step, because they ran in parallel."""
    tokens_per_second: Numbers
    idle: dict[str, Numbers]
    """`learner` and `engine`."""
    frozen: Numbers


class FileInfo(Result):
    path: str
    bytes: int
    modified: float


class FilesResult(Result):
    files: list[FileInfo]


class LogResult(Result):
    path: str
    text: str
    from_: int = Field(alias="from")
    """The byte at which `text` begins."""
    bytes: int


class Event(Result):
    """`data:` of an event of /api/events."""

    run: str
    step: int
    state: Literal["running", "ended", "silent"]
    samples: int


class ErrorResult(Result):
    error: str


class Results(RootModel[dict[str, Any]]):
    """results.json of an evaluation."""
