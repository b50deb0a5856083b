"""The one reader of rows, whatever file or data set they come from, and the one loop."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from rewards.polar.triplets import PolarRows, Triplet, read
from rlkit.data.base import DataError
from rlkit.reward_training.loop import Task, train
from rlkit.reward_training.outcomes import OutcomeData, load_rollouts
from rlkit.reward_training.pairs import Pair, PairRows, load_pairs
from rlkit.reward_training.report import SilentReport
from rlkit.reward_training.rows import draw_batches

HELDOUT = ["21", "26"]
"""Chosen responses to the prompts that a hash holds out."""
PAIRS = [{"prompt": f"{i}+1?", "chosen": f"{i + 1}", "rejected": "0"} for i in range(30)]


@pytest.fixture(params=["jsonl", "parquet", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same rows in a place of each kind."""
    table = datasets.Dataset.from_list(PAIRS)
    match request.param:
        case "jsonl":
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
            return str(tmp_path / "rows.jsonl")
        case "parquet":
            table.to_parquet(tmp_path / "rows.parquet")
            return str(tmp_path / "rows.parquet")
        case _:
            datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "rows")
            return str(tmp_path / "rows")


def test_every_source_gives_the_same_pairs_outcomes_and_sides(source: str) -> None:
    config = PairRows(path=source)
    assert config.problems() == []
    train_pairs, heldout, bad = load_pairs(config, seed=0)
    assert bad == [] and len(train_pairs) + len(heldout) == 30
    assert {pair.chosen for (pair,) in [*train_pairs, *heldout]} == {row["chosen"] for row in PAIRS}
    assert [pairs[0].chosen for pairs in heldout] == HELDOUT, "a hash of the prompt decides, not the file"
    rollouts, _ = load_rollouts(OutcomeData(path=source))
    assert [(r.response, r.label) for r in rollouts[:2]] == [("1", 1.0), ("0", 0.0)]


def test_chats_survive_parquet(tmp_path: Path) -> None:
    fields = {"prompt": "1+1?", "reference": "2", "chosen": "two", "rejected": "3"}
    row = {name: [{"role": "user", "content": text}] for name, text in fields.items()}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    ((prompt,), _) = read(PolarRows(path=str(tmp_path / "rows.parquet")), "triplets")
    assert prompt.triplets == [Triplet(**fields)]
    pairs, _, _ = load_pairs(PairRows(path=str(tmp_path / "pairs.parquet"), heldout_path=pairs_file(tmp_path)), 0)
    assert isinstance(pairs[0][0], Pair) and pairs[0][0].chosen == "2"


def pairs_file(folder: Path) -> str:
    chosen, rejected = ([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": t}] for t in "23")
    prompt = chosen[:1]
    rows = [{"prompt": prompt, "chosen": chosen[1:], "rejected": rejected[1:]}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def test_held_out_rows_of_a_split(tmp_path: Path) -> None:
    sides = {"train": datasets.Dataset.from_list(PAIRS[:20]), "test": datasets.Dataset.from_list(PAIRS[20:])}
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "rows")
    train_pairs, heldout, _ = load_pairs(PairRows(path=str(tmp_path / "rows"), heldout_split="test"), 0)
    assert (len(train_pairs), len(heldout)) == (20, 10)
    with pytest.raises(DataError, match="no split 'nowhere'; it has train, test"):
        load_pairs(PairRows(path=str(tmp_path / "rows"), split="nowhere"), 0)


def test_a_split_of_a_plain_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    assert PairRows(path=str(file), heldout_split="test").problems() == [
        "data.heldout_split=test: has no effect with a file"
    ]
    assert PairRows(path="rows.parquet").problems()[0].startswith("data.path=rows.parquet: no such file")
    assert PairRows(path="owner/name", split="test").problems() == [], "could be a name on the hub"


def test_batches_within_and_across_epochs() -> None:
    groups = [[1, 2], [3], [4, 5]]
    within = [len(batch) for batch in islice(draw_batches(groups, 2, 0, across_epochs=False), 6)]
    assert within == [2, 2, 1, 2, 2, 1]
    across = list(islice(draw_batches(groups, 2, 0), 5))
    assert [len(batch) for batch in across] == [2] * 5
    assert sorted(item for batch in across for item in batch) == sorted([1, 2, 3, 4, 5] * 2)


class Recorder(SilentReport):
    """Which calls came, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begins(self, total_steps: int) -> None:
        self.calls.append(("begins", total_steps))

    def __call__(self, step: int, **metrics: float) -> None:
        self.calls.append(("step", step, metrics))

    def evaluation(self, step: int, **metrics: float) -> None:
        self.calls.append(("evaluation", step, metrics))


def test_the_loop_measures_before_between_and_after_and_saves_once(tmp_path: Path) -> None:
    report, batches, saved = Recorder(), iter(range(100)), []
    values = iter([0.0, 0.2, 0.4, 0.5])
    task = Task(batches, lambda batch: {"toy/loss": float(batch)}, lambda: {"accuracy": next(values)}, saved.append)
    course = train(task, 5, 2, report, tmp_path)
    assert [call[:2] for call in report.calls] == [
        ("evaluation", 0), ("begins", 5), ("step", 1), ("step", 2), ("evaluation", 2), ("step", 3), ("step", 4),
        ("evaluation", 4), ("step", 5), ("evaluation", 5),
    ]  # fmt: skip
    assert report.calls[0][2] == {"heldout/accuracy": 0.0}
    assert (course.before, course.after, course.steps[-1]) == ({"accuracy": 0.0}, {"accuracy": 0.5}, {"toy/loss": 4.0})
    assert saved == [tmp_path] and next(batches) == 5, "no batch is drawn in vain"
