"""Token signals as files may have them: without texts, with tokens that lack a value, thinned or damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rlkit.view.tokens import Place, of_samples, recorded, samples_in, signals_of, token_row, tokens_result


def write(run: Path, step: int, **columns: Any) -> None:
    (run / "tokens").mkdir(exist_ok=True)
    rows = {"group_id": ["g", "g"], "sample": [0, 3], "token_id": [[5, 6], [7]], "mask": [[True, False], [True]]}
    table = pa.table(rows | {"version": [[1, None], [2]]} | columns)
    parquet.write_table(table, run / "tokens" / f"step_{step:06d}.parquet")


def test_columns_that_are_there(tmp_path: Path) -> None:
    logprobs = {"logprob_learner": [[-1.0, None], [-0.5]], "logprob_sampler": [[-1.5, None], [-0.5]]}
    write(tmp_path, 4, **logprobs, value=[[None, None], [0.5]], clipped=[[True, None], [False]])
    row = token_row(tmp_path, Place(4, "g", 0))
    assert row is not None
    assert signals_of(row) == ["logprob_learner", "logprob_sampler", "clipped", "mismatch"]  # no value has a value
    found = tokens_result(row, None, 0, None)
    assert found.pieces == ["5 ", "6 "]  # ids, without texts
    assert found.version == [1, -1]
    assert found.signals["mismatch"] == [0.5, None]
    assert found.signals["clipped"] == [1.0, None]
    assert (found.ranges["mismatch"].low, found.ranges["mismatch"].signed) == (0.5, True)
    chosen = tokens_result(row, ["mismatch"], 1, 99)
    assert (chosen.from_, chosen.to, chosen.total, list(chosen.signals)) == (1, 2, 2, ["mismatch"])
    assert tokens_result(row, None, 50, None).pieces == []


def test_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, 4)
    assert token_row(tmp_path, Place(4, "g", 1)) is None
    assert token_row(tmp_path, Place(5, "g", 0)) is None
    (tmp_path / "tokens" / "step_000005.parquet").write_bytes(b"half")
    assert samples_in(tmp_path / "tokens" / "step_000005.parquet") == []
    assert token_row(tmp_path, Place(5, "g", 0)) is None
    assert len(recorded(tmp_path, "entropy")[0]) == 0


def test_trained_tokens_over_steps(tmp_path: Path) -> None:
    write(tmp_path, 4, entropy=[[0.1, 9.0], [0.2]])
    write(tmp_path, 9, entropy=[None, [0.3]])
    steps, values = recorded(tmp_path, "entropy")
    assert steps.tolist() == [4, 4, 9]
    assert values.tolist() == [0.1, 0.2, 0.3]
    assert [own.tolist() for own in of_samples(tmp_path, "entropy")] == [[0.1], [0.2], [0.3]]
