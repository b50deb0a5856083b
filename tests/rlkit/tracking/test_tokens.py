"""The signals of each token on disk: which samples, which values, what is null, and how the folder stays small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from algorithms.base import Advantages, Experience
from rlkit.config.tracking import TrackingConfig
from rlkit.experience import Episode, Group, Score, SpanReward
from rlkit.experience.filters import BufferConfig, make_filter
from rlkit.tracking.recorder import Recorder
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tokens import Pieces, TokenFolder, token_table, watched_groups, watched_samples
from tests.fixtures.groups import group, value


def advantages_of(groups: list[Group]) -> Advantages:
    """Token t of sample i has i + t / 10."""
    samples = [sample for one in groups for sample in one.samples]
    tokens = [(i + np.arange(len(sample)) / 10).astype(np.float32) for i, sample in enumerate(samples)]
    return Advantages(tokens, np.ones(len(samples), np.bool_))


def rows_of(table: Any) -> list[dict[str, Any]]:
    return table.to_pylist()  # type: ignore[no-any-return]


def test_the_widest_and_the_narrowest_group_and_others_by_the_step_are_watched() -> None:
    spreads = [0.5, 0.1, 0.3, 0.9, 0.3, 0.3]
    groups = [group(f"g{i}", [value(1.0), value(1.0 - spread)]) for i, spread in enumerate(spreads)]
    groups.append(group("lost", [Score.invalid("timeout")] * 2))

    def watched(step: int, **keys: Any) -> list[int]:
        return watched_groups(step, groups, TrackingConfig(**keys))

    drawn = {step: watched(step) for step in range(30)}
    assert all(len(chosen) == 4 and {1, 3} <= set(chosen) and chosen == sorted(chosen) for chosen in drawn.values())
    assert {g for chosen in drawn.values() for g in chosen} == set(range(7)), "an invalid group is drawn at random only"
    assert drawn[7] == watched(7)
    assert watched(1, token_groups_per_step=1) == [3]
    assert watched(1, token_groups_per_step=2) == [1, 3]
    assert watched(1, token_groups_per_step=9) == list(range(7))
    assert watched(1, token_groups_per_step=0) == watched(1, sample_groups_per_step=0) == []
    few = [watched(step, sample_groups_per_step=3, token_groups_per_step=2) for step in range(30)]
    assert any({1, 3} - set(chosen) for chosen in few), "only groups of samples.jsonl"
    assert watched_samples(Experience(groups, 1), TrackingConfig(token_groups_per_step=1)) == {6, 7}


def test_values_are_those_of_the_step_and_what_does_not_exist_is_null() -> None:
    """The second sample is an episode: token 1 is an observation. The third is recorded, the fourth was silent."""
    one = group("g", [value(float(i)) for i in range(4)])
    played = replace(one.samples[1], mask=np.array([1, 0, 1], np.bool_), versions=np.array([4, -1, 5], np.int32))
    recorded = replace(one.samples[2], logprobs=None)
    one = replace(one, samples=(one.samples[0], played, recorded, one.samples[3]))
    signals = {
        i: {
            "logprob_learner": np.full(3, -1.0 - i, np.float32),
            "clipped": np.array([0, 1, 0], np.float32),
            "ratio": np.full(3, 1.5, np.float32),
        }
        for i in range(3)
    }
    before = [np.full(3, -7.0, np.float32)] * 4
    values = [np.full(3, i, np.float32) for i in range(4)]
    kept = replace(advantages_of([one]), keep=np.array([1, 1, 1, 0], np.bool_))
    table = token_table(Experience([one], 6, values, before), kept, signals, range(4), None)
    fresh, episode, shown, silent = rows_of(table)
    assert set(table.column_names) == {
        "group_id", "sample", "token_id", "mask", "version", "logprob_sampler", "logprob_learner", "advantage", "value",
        "ratio", "clipped",
    }  # fmt: skip
    assert (fresh["group_id"], fresh["sample"], silent["sample"]) == ("g", 0, 3)
    assert fresh["token_id"] == [0, 1, 2]
    assert [row["mask"] for row in (fresh, episode, silent)] == [[True] * 3, [True, False, True], [False] * 3]
    assert [row["version"] for row in (fresh, episode, shown)] == [[4] * 3, [4, -1, 5], [None] * 3]
    assert [row["logprob_sampler"] for row in (fresh, episode, shown)] == [[0.0] * 3, [0.0, None, 0.0], [None] * 3]
    assert [row["logprob_learner"][0] for row in (fresh, episode, shown, silent)] == [-1.0, -2.0, -3.0, -7.0]
    assert [row["clipped"] for row in (episode, silent)] == [[False, True, False], [None] * 3]
    assert [row["ratio"] for row in (episode, shown)] == [[1.5] * 3, [None] * 3]
    assert episode["advantage"] == pytest.approx([1.0, 1.1, 1.2])
    assert episode["value"] == [1.0] * 3
    assert table.schema.field("clipped").type == pa.list_(pa.bool_())
    assert table.schema.field("version").type == pa.list_(pa.int32())
    assert table.schema.field("advantage").type == pa.list_(pa.float32())


def test_a_process_reward_stands_where_it_was_given() -> None:
    own = np.array([0.5, -0.5, 0.25], np.float32)
    scores = [
        Score(1.0, token_rewards=own),
        Score(1.0, span_rewards=(SpanReward(0, 2, 0.5), SpanReward(1, 2, 0.25), SpanReward(2, 3, -1.0))),
        Score(1.0, token_rewards=own, span_rewards=(SpanReward(0, 2, 1.0),)),
        Score(1.0),
    ]
    one = group("g", scores)
    rows = rows_of(token_table(Experience([one], 1), advantages_of([one]), {}, range(4), None))
    assert [row["process_reward"] for row in rows] == [
        [0.5, -0.5, 0.25], [None, 0.75, -1.0], [0.5, 0.5, 0.25], [None] * 3
    ]  # fmt: skip
    assert own.tolist() == [0.5, -0.5, 0.25], "the score stays as it is"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<end>"])}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_pieces_join_to_the_response(cut: int) -> None:
    """Also where it was cut within a character."""
    tokenizer = byte_tokenizer()
    ids = np.array(
        tokenizer.encode("né 🙂 ok 🙃")[: -cut or None] + ([tokenizer.eos_token_id] if not cut else []), np.int32
    )
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    one = group("g", [value(1.0)])
    sample = replace(one.samples[0], token_ids=ids, logprobs=np.zeros(len(ids), np.float32), text=text)
    one = replace(one, samples=(sample,))
    (row,) = rows_of(token_table(Experience([one], 1), advantages_of([one]), {}, [0], Pieces(tokenizer)))
    assert "".join(row["piece"]) == text
    assert len(row["piece"]) == len(ids)
    assert row["piece"][:4] == ["n", "", "é", " "]
    assert row["piece"][4:8] == ["", "", "", "🙂"]
    assert text.endswith("�") == bool(cut)


def test_pieces_of_an_episode_are_those_of_all_its_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer.encode("ab<end>cd"), np.int32)
    sample = replace(
        group("g", [value(1.0)]).samples[0],
        token_ids=ids, logprobs=np.zeros(len(ids), np.float32), text="cd", episode=Episode("done"),
    )  # fmt: skip
    one = replace(group("g", [value(1.0)]), samples=(sample,))
    (row,) = rows_of(token_table(Experience([one], 1), advantages_of([one]), {}, [0], Pieces(tokenizer)))
    assert row["piece"] == ["a", "b", "", "c", "d"]


def test_early_and_late_steps_stay_when_the_folder_is_full(tmp_path: Path) -> None:
    table = pa.table({"token_id": pa.array([list(range(1000))])})
    folder = TokenFolder(tmp_path / "tokens", 1e9)
    folder.write(1, table)
    size = (tmp_path / "tokens" / "step_000001.parquet").stat().st_size

    def steps() -> list[int]:
        return sorted(int(file.stem[5:]) for file in (tmp_path / "tokens").iterdir())

    folder = TokenFolder(tmp_path / "tokens", 8.5 * size)  # another process: it counts what is there
    for step in range(2, 9):
        folder.write(step, table)
    assert steps() == list(range(1, 9))
    folder.write(9, table)
    assert steps() == [1, 3, 5, 6, 7, 8, 9]
    for step in range(10, 60):
        folder.write(step, table)
    assert len(steps()) <= 8
    assert {1, 57, 58, 59} <= set(steps())
    TokenFolder(tmp_path / "tokens", 1).write(60, table)
    assert steps() == [60], "the last step stays, whatever its size"


def test_recorded_steps_are_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recorder = Recorder(TrackingConfig(), folder, make_filter(BufferConfig()))
    groups = [group("g", [value(1.0), value(0.0)])]
    recorder.step(Experience(groups, 1), advantages_of(groups))
    sizes = folder.sizes()  # waits for the writer
    assert parquet.read_table(folder.tokens / "step_000001.parquet").num_rows == 2
    recorder.step(Experience(groups, 2), advantages_of(groups))
    folder.close()
    (folder.tokens / ".step_000003.parquet").write_bytes(b"half")
    again = RunFolder(tmp_path / "run", resume=True)
    again.keep_only(sizes, 1)
    assert [file.name for file in again.tokens.iterdir()] == ["step_000001.parquet"]
    assert again.samples.stat().st_size == sizes["samples.jsonl"] > 0
    again.keep_only({})
    assert list(again.tokens.iterdir()) == []


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="token_gib has no effect with token_groups_per_step=0"):
        TrackingConfig(token_groups_per_step=0, token_gib=2)
    with pytest.raises(ValueError, match="keep_samples has no effect with sample_groups_per_step=0"):
        TrackingConfig(sample_groups_per_step=0, keep_samples="best_worst")
