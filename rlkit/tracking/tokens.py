"""Per-token signals of a few samples, in files tokens/step_NNNNNN.parquet."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from algorithms.base import Advantages, Experience
from rlkit.config.tracking import TrackingConfig
from rlkit.experience import Group, Sample, Score
from rlkit.experience.scores import total_reward
from rlkit.experience.steps import token_pieces
from rlkit.experience.texts import encodable
from rlkit.experience.types import FloatArray
from rlkit.tracking.samples import chosen_groups

if TYPE_CHECKING:
    from pyarrow import Table
    from transformers import PreTrainedTokenizerBase

Signals = Mapping[int, Mapping[str, FloatArray]]
"""Index of a sample in the step -> name -> [T]."""


class Pieces:
    """The text that each token adds to a response; an incomplete character at the end is as in the response."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` must be a fast one."""
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, sample: Sample) -> list[str]:
        ids, decode = sample.token_ids.tolist(), self.tokenizer.backend_tokenizer.decode
        # Most tokens add the text that they decode to singly; comparing with the text shows whether all do. Decoding in
        # order is slower.
        for token in set(ids).difference(self._alone):
            self._alone[token] = decode([token])
        pieces = [self._alone[token] for token in ids]
        text = "".join(pieces)
        if text == (sample.text if sample.episode is None else decode(ids)) and "\N{REPLACEMENT CHARACTER}" not in text:
            return pieces
        pieces = token_pieces(ids, self.tokenizer)
        if pieces and sample.episode is None and sample.text.startswith(text := "".join(pieces)):
            pieces[-1] += encodable(sample.text[len(text) :])
        return pieces


def watched_groups(step: int, groups: Sequence[Group], config: TrackingConfig) -> list[int]:
    """Return the indices of `tracking.token_groups_per_step` of the groups in samples.jsonl, in order: those with the
    widest and the narrowest spread of rewards, and others drawn with the step as seed."""
    places, count = chosen_groups(step, groups, config.sample_groups_per_step), config.token_groups_per_step
    if count >= len(places):
        return places
    spreads = {g: spread for g in places if (spread := _spread(groups[g])) is not None}
    extremes = [max(spreads, key=spreads.__getitem__), min(spreads, key=spreads.__getitem__)] if spreads else []
    first = list(dict.fromkeys(extremes))[:count]
    rest = [g for g in places if g not in first]
    return sorted([*first, *random.Random(step).sample(rest, count - len(first))])


def watched_samples(experience: Experience, config: TrackingConfig) -> frozenset[int]:
    """Return the indices of the watched samples in the step."""
    starts = [0, *accumulate(len(group.samples) for group in experience.groups)]
    chosen = watched_groups(experience.step, experience.groups, config)
    return frozenset(i for g in chosen for i in range(starts[g], starts[g + 1]))


def _spread(group: Group) -> float | None:
    scores = () if group.scores is None else group.scores.samples
    rewards = [reward for reward in map(total_reward, scores) if reward is not None]
    return max(rewards) - min(rewards) if rewards else None


def token_table(
    experience: Experience, advantages: Advantages, signals: Signals, watched: Iterable[int], pieces: Pieces | None
) -> Table:
    """Return one row per watched sample, with one list per signal. A signal that no sample has gets no column; if one
    sample lacks it, its entry is null.

    `signals`: those of the update. Without `pieces` there is no text.
    """
    import pyarrow as pa

    of_groups = [(group, i) for group in experience.groups for i in range(len(group.samples))]
    chosen = [(n, *of_groups[n]) for n in sorted(watched)]
    samples = [group.samples[i] for _, group, i in chosen]
    lengths = [len(sample) for sample in samples]
    offsets = pa.array([0, *accumulate(lengths)], pa.int32())

    def lists(kind: Any, rows: Sequence[Any]) -> Any:
        nulls = None
        if not all(type(row) is np.ndarray for row in rows):  # something is missing
            rows = [np.ma.masked_all(n, kind) if row is None else row for n, row in zip(lengths, rows, strict=True)]
            nulls = np.concatenate([np.ma.getmaskarray(row) for row in rows])
            rows = [np.ma.getdata(row) for row in rows]
        values = np.concatenate(rows, dtype=kind, casting="unsafe")  # Arrow's own cast takes ten times as long
        return pa.ListArray.from_arrays(offsets, pa.array(values, mask=nulls))

    tokens = [_signals(n, group, i, experience, advantages, signals) for n, group, i in chosen]
    trained = np.repeat(advantages.keep[[n for n, _, _ in chosen]], lengths)
    if any(sample.mask is not None for sample in samples):
        trained &= np.concatenate([sample.trained for sample in samples])
    columns: dict[str, Any] = {
        "group_id": pa.array([group.id for _, group, _ in chosen]),
        "sample": pa.array([sample.index for sample in samples], pa.int32()),
        "token_id": lists(np.int32, [sample.token_ids for sample in samples]),
        "mask": lists(np.bool_, [trained]),
        "version": lists(np.int32, [_versions(sample) for sample in samples]),
    }
    if pieces is not None:
        texts = [piece for sample in samples for piece in pieces(sample)]
        columns["piece"] = pa.ListArray.from_arrays(offsets, pa.array(texts, pa.string()))
    for name in dict.fromkeys(name for of_sample in tokens for name in of_sample):
        kind = np.bool_ if name == "clipped" else np.float32
        columns.setdefault(name, lists(kind, [of_sample.get(name) for of_sample in tokens]))
    return pa.table(columns)


def _signals(
    number: int, group: Group, i: int, experience: Experience, advantages: Advantages, signals: Signals
) -> dict[str, NDArray[Any]]:
    """Return [T] per signal, masked where a token has none. Signals missing from the update may have been computed
    before it."""
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
    elif sample.mask is None and sample.versions is None:
        rows["logprob_sampler"] = sample.logprobs
    else:
        rows["logprob_sampler"] = np.ma.masked_where(_versions(sample) < 0, sample.logprobs)
    return rows


def _versions(sample: Sample) -> NDArray[np.int32]:
    """Return [T] policy versions, -1 on observations; all masked if the sample was not sampled by a policy."""
    if sample.logprobs is None:
        return np.ma.masked_all(len(sample), np.int32)
    if sample.versions is not None:
        return sample.versions
    versions = np.repeat(np.int32(sample.policy_versions[0]), len(sample))
    return versions if sample.mask is None else np.where(sample.mask, versions, np.int32(-1))


def _process_rewards(sample: Sample, score: Score) -> NDArray[Any] | None:
    """Return [T] rewards: each token's own, and a span's at its last token; masked elsewhere."""
    if score.token_rewards is None and not score.span_rewards:
        return None
    none = np.ma.array(np.zeros(len(sample)), mask=True)
    rewards = none if score.token_rewards is None else np.ma.array(score.token_rewards, copy=True)
    for span in score.span_rewards:
        so_far = rewards[span.end - 1]
        rewards[span.end - 1] = span.value + (0.0 if so_far is np.ma.masked else so_far)
    return rewards


def step_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


class TokenFolder:
    """`tokens/step_NNNNNN.parquet`. Above about `limit` bytes in all, the older half loses every second file."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = path, limit
        self._sizes: dict[Path, int] | None = None

    def write(self, step: int, table: Table) -> None:
        import pyarrow.parquet as parquet

        if self._sizes is None:
            self.path.mkdir(exist_ok=True)
            self._sizes = {one: one.stat().st_size for one in sorted(self.path.glob("step_*.parquet"), key=step_of)}
        file, aside = (self.path / f"{start}step_{step:06d}.parquet" for start in ("", "."))
        repeated = ["group_id", "piece.list.element", "version.list.element"]  # trying others costs half the time
        try:
            parquet.write_table(table, aside, compression="zstd", use_dictionary=repeated, write_statistics=False)
            aside.replace(file)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        self._sizes[file] = file.stat().st_size
        while sum(self._sizes.values()) > self.limit and len(self._sizes) > 1:
            older = list(self._sizes)[: len(self._sizes) // 2]
            for one in older[1::2] or older:
                one.unlink(missing_ok=True)
                del self._sizes[one]
