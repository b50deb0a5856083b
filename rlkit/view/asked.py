"""What may be asked: one model per question, whose fields are the parameters of its address.

An empty parameter counts as absent, an unknown one is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_ROWS = 1000
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)


class AboutRun(Asked):
    run: str
    """A run's id, as /api/runs lists it."""


class AboutRuns(Asked):
    runs: str = ""
    """Ids of runs, separated by commas; empty: all."""
    cursor: str = ""


class MetricsAsked(AboutRun):
    names: str = ""
    """Names of metrics, separated by commas; `*`: all; empty: only what there is."""
    from_: Whole = Field(default=0, alias="from")
    """The first step."""


class Restricted(AboutRun):
    """Which samples."""

    step: Whole | None = None
    from_step: Whole | None = None
    to_step: Whole | None = None
    """Included."""
    filter: str = ""
    """An expression of rlkit/view/filter.py."""
    q: str = ""
    """Words and "phrases" that prompt or response must have."""
    group: str = ""
    prompt_id: str = ""


class SamplesAsked(Restricted):
    sort: str = "id"
    """A number: `reward`, `component:NAME`, `rescored:NAME`."""
    order: Literal["asc", "desc"] = "asc"
    """Unknown numbers come last in either."""
    cursor: str = ""
    limit: int = Field(default=100, ge=1, le=MOST_ROWS)


class HistogramAsked(Restricted):
    key: str
    bins: int = Field(default=40, ge=1, le=500)


class ScatterAsked(Restricted):
    x: str
    y: str
    limit: int = Field(default=2000, ge=1, le=20000)


class DistributionAsked(AboutRun):
    key: str
    bins: int = Field(default=30, ge=1, le=200)


class SampleAsked(AboutRun):
    id: Whole


class TokensAsked(SampleAsked):
    signals: str = ""
    """Separated by commas; empty: all."""
    from_: Whole = Field(default=0, alias="from")
    to: Whole | None = None


class GroupAsked(AboutRun):
    step: Whole
    group: str


class LogAsked(AboutRun):
    path: str
    """One of /api/files."""
    tail_bytes: int = Field(default=65536, ge=1, le=2**22)
