"""Recorded data and the algorithms that learn from them: what does not fit is refused before a run, by dry_run too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from table_fixture import good, write

Typed = Callable[..., str]


def pairs(count: int = 40) -> list[Any]:
    return [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": f"{i}"} for i in range(count)]


def labelled(*labels: Any) -> list[Any]:
    return [{"prompt": f"{i} + 1?", "completion": "2", "label": labels[i % len(labels)]} for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "arguments", "expected"),
    [
        (labelled(1, -1), "algorithm=kto data=responses", "label must be true, false or a number from 0 to 1, not -1"),
        (labelled(1, 3, 5), "algorithm=kto data=responses", "Numbers of any size are scores (data.score_column)"),
        (
            labelled(1, 5),
            "algorithm=kto data=responses data.score_column=label",
            "rows.jsonl:2 has a score of 5: name a column of true and false labels (data.label_column)",
        ),
        (labelled(True), "algorithm=kto data=responses", "are good: add bad ones, or imitate these (algorithm=sft"),
        (labelled(0), "algorithm=bco data=responses", "are bad: add good ones"),
        (pairs(), "algorithm=grpo data=pairs", "Recorded pairs train algorithm=dpo"),
        (
            [*pairs(), {"prompt": "x", "chosen": "a " * 2000, "rejected": "b"}],
            "algorithm=dpo data=pairs rollout.max_response_tokens=32",
            "at least 1 of the first 39 train rows have responses that are longer",
        ),
        (
            good(40),
            "algorithm=grpo data=jsonl rollout.structured.choices=column:chioces",
            "rows.jsonl has no column 'chioces' besides those that other keys name; it has none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    refused: Typed, tmp_path: Path, rows: list[Any], arguments: str, expected: str
) -> None:
    file = write(tmp_path / "rows.jsonl", rows)
    assert expected in " ".join(refused(*arguments.split(), f"data.path={file}").split())


def test_a_mixture_says_which_of_its_sources_lacks_something(refused: Typed, tmp_path: Path) -> None:
    files = {"pairs": write(tmp_path / "pairs.jsonl", pairs()), "jsonl": write(tmp_path / "asked.jsonl", good(40))}
    sources = [f"data.sources.my_{k}.{f}" for k, v in files.items() for f in (f"kind={k}", f"path={v}")]
    message = refused("algorithm=dpo", "data=mixture", "rollout.source=data", *sources)
    assert "data.sources.my_jsonl does not say which are better" in " ".join(message.split())


def test_a_dry_run_says_which_rows_are_skipped(accepted: Typed, tmp_path: Path) -> None:
    rows = pairs(200)
    rows[7]["rejected"] = rows[7]["chosen"]
    output = accepted("algorithm=dpo", "data=pairs", f"data.path={write(tmp_path / 'rows.jsonl', rows)}")
    assert "1 of the first 200 rows" in output
    assert "rows.jsonl:8: chosen and rejected are equal" in output
