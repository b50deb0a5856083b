"""Per-token signals: tokens/step_NNNNNN.parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import ArrowException, parquet

from rlkit.view.rows import number
from rlkit.view.schema import Range, TokensResult

WINDOW = 4096
MOST_FILES = 60
"""Most files read for a distribution over steps."""
MEANINGS = {
    "logprob_sampler": "log-probability of the token when it was sampled",
    "logprob_learner": "log-probability under the learner's weights at the start of the step",
    "logprob_reference": "log-probability under the reference policy",
    "entropy": "entropy of the learner's next-token distribution, in nats: high where it had a choice",
    "advantage": "factor of the token's log-probability in the loss: above 0, the token becomes more likely",
    "process_reward": "reward of this token, or of the step that ends with it",
    "value": "what the critic expects from here on",
    "weight": "factor in the loss that corrects for stale or mismatched sampling; 1 changes nothing",
    "ratio": "probability under the learner divided by that under the old policy",
    "clipped": "1 where the loss left the token out because its ratio was out of bounds",
    "mismatch": "log-probability of the learner minus that of the sampler: 0 where both agree",
    "kl": "log-probability of the learner minus that of the reference",
}
SIGNED = ("advantage", "process_reward", "value", "mismatch", "kl")
DIFFERENCES = {"mismatch": ("logprob_learner", "logprob_sampler"), "kl": ("logprob_learner", "logprob_reference")}
"""Signals that are the difference between two recorded ones."""
_PLACE = ("group_id", "sample", "token_id", "piece", "mask", "version")


class Place(NamedTuple):
    """The position of a sample in a run."""

    step: int
    group_id: str
    sample: int


def samples_in(file: Path) -> list[tuple[str, int]]:
    """Return (group, sample) of each row; none if the file cannot be read (any more)."""
    try:
        table = parquet.ParquetFile(file).read(["group_id", "sample"])
    except (OSError, ArrowException):
        return []
    return list(zip(table["group_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def token_row(run: Path, place: Place) -> dict[str, Any] | None:
    """Return all columns of a sample; None if they were not recorded."""
    file = run / "tokens" / f"step_{place.step:06d}.parquet"
    try:
        at = samples_in(file).index((place.group_id, place.sample))
        return dict(parquet.ParquetFile(file).read().slice(at, 1).to_pylist()[0])
    except (ValueError, OSError, ArrowException):
        return None


def signals_of(row: dict[str, Any]) -> list[str]:
    recorded = [name for name, values in row.items() if name not in _PLACE and any(v is not None for v in values or ())]
    return [*recorded, *(name for name, (a, b) in DIFFERENCES.items() if a in recorded and b in recorded)]


def tokens_result(row: dict[str, Any], signals: list[str] | None, first: int, last: int | None) -> TokensResult:
    """Return tokens [first, last) of a row, at most `WINDOW`; ranges are those of the whole sample."""
    total = len(row["token_id"])
    start = min(max(first, 0), total)
    end = min(total if last is None else max(last, start), start + WINDOW, total)
    chosen = {name: _values(row, name) for name in signals_of(row) if signals is None or name in signals}
    texts = row.get("piece")  # in a run without texts, show the ids
    pieces = [f"{token} " for token in row["token_id"]] if texts is None else [piece or "" for piece in texts]
    return TokensResult(
        from_=start,
        to=end,
        total=total,
        pieces=pieces[start:end],
        mask=[bool(trained) for trained in row["mask"][start:end]],
        version=[-1 if version is None else int(version) for version in row["version"][start:end]],
        signals={name: values[start:end] for name, values in chosen.items()},
        ranges={name: _range(name, values) for name, values in chosen.items()},
    )


def _values(row: dict[str, Any], name: str) -> list[float | None]:
    if name in DIFFERENCES:
        left, right = (_values(row, part) for part in DIFFERENCES[name])
        return [None if a is None or b is None else a - b for a, b in zip(left, right, strict=True)]
    return [number(value) for value in row[name]]


def _range(name: str, values: list[float | None]) -> Range:
    known = [value for value in values if value is not None]
    meaning = MEANINGS.get(name, "")
    signed = name in SIGNED or (name not in MEANINGS and min(known, default=0.0) < 0 < max(known, default=0.0))
    return Range(low=min(known, default=None), high=max(known, default=None), signed=signed, meaning=meaning)


def recorded(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a signal of all recorded trained tokens, and the step of each; if steps are many, evenly chosen ones."""
    steps, values = [np.zeros(0)], [np.zeros(0)]
    for step, table in _tables(run, name):
        trained = table["mask"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(bool)
        own = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        values.append(own[trained])
        steps.append(np.full(int(trained.sum()), step))
    return np.concatenate(steps), np.concatenate(values)


def of_samples(run: Path, name: str) -> list[np.ndarray]:
    """Return the same as `recorded`, with one array per sample."""
    samples = []
    for _, table in _tables(run, name):
        for mask, own in zip(table["mask"], table[name], strict=True):
            samples.append(np.array(own.as_py(), dtype=np.float64)[np.array(mask.as_py(), dtype=bool)])
    return [np.nan_to_num(own) for own in samples]


def load() -> None:
    """Trigger pyarrow's imports, which take half a second at its first table, before anyone waits for them."""
    table = pa.table({"values": [[0.5], None]})
    table.filter(table["values"].is_valid())["values"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _tables(run: Path, name: str) -> Iterator[tuple[int, Any]]:
    """Yield (step, rows that have the signal) of at most `MOST_FILES` files."""
    files = sorted((run / "tokens").glob("step_*.parquet"))
    for i in sorted({round(place) for place in np.linspace(0, len(files) - 1, min(len(files), MOST_FILES))}):
        try:
            table = parquet.ParquetFile(files[i]).read(["mask", name])
        except (OSError, ArrowException):  # removed since, or without this signal
            continue
        if name in table.column_names:
            yield int(files[i].stem.removeprefix("step_")), table.filter(table[name].is_valid())
