"""The signals of each token of a few samples, as files tokens/step_NNNNNN.parquet."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from algorithms.base import Advantages, Experience
from rlkit.config.tracking import TrackingConfig
from rlkit.experience import Group, Sample, Score
from rlkit.experience.scores import total_reward
from rlkit.experience.types import FloatArray, IntArray
from rlkit.tracking.samples import chosen_groups

if TYPE_CHECKING:
    from pyarrow import Table

Pieces = Callable[[IntArray], list[str]]
"""What each token adds to the text."""
Signals = Mapping[int, Mapping[str, FloatArray]]
"""By a sample's number in the step, by name: [T]."""


def watched_groups(step: int, groups: Sequence[Group], config: TrackingConfig) -> list[int]:
    """The places of `tracking.token_groups_per_step` groups, in order: those with the widest and the narrowest spread
    of rewards, and others drawn by the step, of those that are in samples.jsonl."""
    places, count = chosen_groups(step, groups, config.sample_groups_per_step), config.token_groups_per_step
    if count >= len(places):
        return places
    spreads = {g: spread for g in places if (spread := _spread(groups[g])) is not None}
    extremes = [max(spreads, key=spreads.__getitem__), min(spreads, key=spreads.__getitem__)] if spreads else []
    first = list(dict.fromkeys(extremes))[:count]
    rest = [g for g in places if g not in first]
    return sorted([*first, *random.Random(step).sample(rest, count - len(first))])


def watched_samples(experience: Experience, config: TrackingConfig) -> frozenset[int]:
    """Their numbers in the step."""
    ends = np.cumsum([len(group.samples) for group in experience.groups]).tolist()
    chosen = watched_groups(experience.step, experience.groups, config)
    return frozenset(i for g in chosen for i in range(ends[g] - len(experience.groups[g].samples), ends[g]))


def _spread(group: Group) -> float | None:
    scores = () if group.scores is None else group.scores.samples
    rewards = [reward for reward in map(total_reward, scores) if reward is not None]
    return max(rewards) - min(rewards) if rewards else None


def token_table(
    experience: Experience, advantages: Advantages, signals: Signals, watched: Iterable[int], pieces: Pieces | None
) -> Table:
    """One row per watched sample, one list per signal. What no sample has is no column, what one lacks is null.

    `signals`: of the update. Without `pieces` there is no text.
    """
    import pyarrow as pa

    of_groups = [(group, i) for group in experience.groups for i in range(len(group.samples))]
    chosen = [(n, *of_groups[n]) for n in sorted(watched)]
    samples = [group.samples[i] for _, group, i in chosen]
    offsets = pa.array(np.cumsum([0, *map(len, samples)]), pa.int32())

    def lists(kind: Any, rows: Sequence[NDArray[Any] | None]) -> Any:
        if all(type(row) is np.ndarray for row in rows):  # nothing is missing
            return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows)).cast(kind, safe=False))  # type: ignore[arg-type]
        known = [np.ma.masked_all(len(s)) if row is None else row for s, row in zip(samples, rows, strict=True)]
        values, nulls = (np.concatenate([part(row) for row in known]) for part in (np.ma.getdata, np.ma.getmaskarray))
        return pa.ListArray.from_arrays(offsets, pa.array(values, mask=nulls).cast(kind, safe=False))

    tokens = [_signals(n, group, i, experience, advantages, signals) for n, group, i in chosen]
    trained = [sample.trained & advantages.keep[n] for sample, (n, _, _) in zip(samples, chosen, strict=True)]
    columns: dict[str, Any] = {
        "group_id": pa.array([group.id for _, group, _ in chosen]),
        "sample": pa.array([sample.index for sample in samples], pa.int32()),
        "token_id": lists(pa.int32(), [sample.token_ids for sample in samples]),
        "mask": lists(pa.bool_(), trained),
        "version": lists(pa.int32(), [_versions(sample) for sample in samples]),
    }
    if pieces is not None:
        texts = [piece for sample in samples for piece in _pieces(sample, pieces)]
        columns["piece"] = pa.ListArray.from_arrays(offsets, pa.array(texts, pa.string()))
    for name in dict.fromkeys(name for of_sample in tokens for name in of_sample):
        kind = pa.bool_() if name == "clipped" else pa.float32()
        columns.setdefault(name, lists(kind, [of_sample.get(name) for of_sample in tokens]))
    return pa.table(columns)


def _signals(
    number: int, group: Group, i: int, experience: Experience, advantages: Advantages, signals: Signals
) -> dict[str, NDArray[Any]]:
    """[T] each, masked where a token has none. What the update left out may have been computed before it."""
    sample, score = group.samples[i], Score.none() if group.scores is None else group.scores.samples[i]
    before = {
        "logprob_learner": experience.policy_logprobs,
        "logprob_reference": experience.reference_logprobs,
        "value": experience.values,
    }
    rows: dict[str, NDArray[Any]] = {name: of[number] for name, of in before.items() if of is not None}
    rows |= signals.get(number, {})
    rows["advantage"] = advantages.tokens[number]
    if (rewards := _process_rewards(sample, score)) is not None:
        rows["process_reward"] = rewards
    if sample.logprobs is None:
        rows.pop("ratio", None)  # nothing sampled it
    else:
        observed = _versions(sample) < 0
        rows["logprob_sampler"] = np.ma.masked_where(observed, sample.logprobs) if observed.any() else sample.logprobs
    return rows


def _versions(sample: Sample) -> NDArray[np.int32]:
    """[T] policy versions, -1 on observations, masked if nothing sampled it."""
    if sample.logprobs is None:
        return np.ma.masked_all(len(sample), np.int32)
    if sample.versions is not None:
        return sample.versions
    return np.where(sample.trained, np.int32(sample.policy_versions[0]), np.int32(-1))


def _process_rewards(sample: Sample, score: Score) -> NDArray[Any] | None:
    """[T] a token's own reward, and that of a span at its last token; masked elsewhere."""
    if score.token_rewards is None and not score.span_rewards:
        return None
    rewards = (
        np.ma.masked_all(len(sample)) if score.token_rewards is None else np.ma.array(score.token_rewards, copy=True)
    )
    for span in score.span_rewards:
        so_far = rewards[span.end - 1]
        rewards[span.end - 1] = span.value + (0.0 if so_far is np.ma.masked else so_far)
    return rewards


def _pieces(sample: Sample, pieces: Pieces) -> list[str]:
    """Of each token; an unfinished character at the end as the response has it."""
    texts = pieces(sample.token_ids)
    if texts and sample.episode is None and sample.text.startswith(joined := "".join(texts)):
        texts[-1] += sample.text[len(joined) :]
    return [text.encode("utf-8", "replace").decode() for text in texts]


def step_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


class TokenFolder:
    """`tokens/step_NNNNNN.parquet`, at most about `limit` bytes in all: of the older half, every second is removed."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = path, limit
        self._sizes: dict[Path, int] | None = None

    def write(self, step: int, table: Table) -> None:
        import pyarrow.parquet as parquet

        self.path.mkdir(exist_ok=True)
        file, aside = (self.path / f"{start}step_{step:06d}.parquet" for start in ("", "."))
        try:
            repeated = [
                "group_id",
                "piece.list.element",
                "version.list.element",
            ]  # looking for more takes half the time
            parquet.write_table(table, aside, compression="zstd", use_dictionary=repeated, write_statistics=False)
            aside.replace(file)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        if self._sizes is None:
            self._sizes = {one: one.stat().st_size for one in sorted(self.path.glob("step_*.parquet"), key=step_of)}
        self._sizes[file] = file.stat().st_size
        while sum(self._sizes.values()) > self.limit and len(self._sizes) > 1:
            older = list(self._sizes)[: len(self._sizes) // 2]
            for one in older[1::2] or older:
                one.unlink(missing_ok=True)
                del self._sizes[one]
