"""What every data source must keep to. Run it against your own:

    DATA=my_module.MySource DATA_OPTIONS='{"my_key": 3}' python -m pytest tests/contract

Without the variable it checks all of the package's.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlkit.config.parts import import_part
from rlkit.data.base import BadRow, DataConfig, DataSource, Problem
from rlkit.data.rows import question_key

BUILT_IN: dict[str, dict[str, Any]] = {
    "rlkit.data.arithmetic.Arithmetic": {"train_problems": 64, "heldout_problems": 16},
    "rlkit.data.files.FileSource": {"path": "rows.jsonl"},
    "rlkit.data.files.HfSource": {"path": "rows.jsonl"},
    "rlkit.data.recorded.PairsSource": {"path": "rows.jsonl"},
    "rlkit.data.recorded.ResponsesSource": {"path": "rows.jsonl"},
    "rlkit.data.recorded.ChatSource": {"path": "rows.jsonl"},
}


@pytest.fixture(params=[os.environ["DATA"]] if "DATA" in os.environ else list(BUILT_IN))
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if "DATA" not in os.environ:  # a source of your own looks for its files where you are
        rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}", "level": i} for i in range(40)]
        rows = [row | {"response": f"{i + 1}", "chosen": f"{i + 1}", "rejected": "no"} for i, row in enumerate(rows)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.chdir(tmp_path)
    return str(request.param)


@pytest.fixture
def options(target: str) -> dict[str, Any]:
    return BUILT_IN[target] if "DATA" not in os.environ else json.loads(os.environ.get("DATA_OPTIONS", "{}"))


@pytest.fixture
def source(target: str, options: dict[str, Any]) -> DataSource:
    return new_source(target, options)


def new_source(target: str, options: dict[str, Any], seed: int = 7) -> DataSource:
    kind = import_part("data", target)
    source: DataSource = kind(kind.Config(**options), seed)
    return source


def test_its_options_are_typed_and_documented(target: str, options: dict[str, Any]) -> None:
    config = import_part("data", target).Config
    assert issubclass(config, DataConfig)
    undocumented = [name for name, field in config.model_fields.items() if not field.description]
    assert undocumented == [], "write what each option means under it, as a string"
    with pytest.raises(ValueError, match="no_such_option"):
        config(**options, no_such_option=1)


def test_importing_it_is_cheap(target: str) -> None:
    """The configuration layer imports it; heavy libraries belong into load()."""
    module, heavy = target.rpartition(".")[0], ("torch", "transformers", "datasets", "vllm", "ray")
    script = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", "import these inside load()"


def test_its_checks_pass(source: DataSource) -> None:
    assert source.check() == [], "check() says what is missing; with these options nothing should be"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_its_problems_can_be_asked(source: DataSource, split: Any) -> None:
    problems, bad = source.load(split)
    assert problems
    assert all(isinstance(problem, Problem) for problem in problems)
    assert all(isinstance(row, BadRow) and row.origin and row.reason for row in bad)
    for problem in problems:
        assert problem.id
        assert problem.messages
        assert problem.messages[-1].role != "assistant", "there is nothing to answer"
        assert all(message.content for message in problem.messages)
        assert problem.answer is None or isinstance(problem.answer, str)
        assert all(isinstance(reference, str) for reference in problem.references)
    assert pickle.loads(pickle.dumps(problems)) == problems, "problems travel between processes"


def test_no_id_and_no_question_is_in_both_splits(source: DataSource) -> None:
    train, heldout = source.load("train")[0], source.load("heldout")[0]
    ids = [problem.id for problem in (*train, *heldout)]
    assert len(set(ids)) == len(ids)
    assert not {question_key(problem) for problem in train} & {question_key(problem) for problem in heldout}


def test_every_problem_has_what_the_source_says(source: DataSource) -> None:
    provided = source.provides()
    for problem in (*source.load("train")[0], *source.load("heldout")[0]):
        assert "answer" not in provided or problem.answer is not None
        assert "references" not in provided or problem.references
        assert "responses" not in provided or problem.responses
        assert "pairs" not in provided or problem.pairs
        assert {pair.winner for pair in problem.pairs} | {pair.loser for pair in problem.pairs} <= set(
            range(len(problem.responses))
        )
        assert provided - {"answer", "references", "responses", "pairs", "labels"} <= problem.columns.keys()


def test_equal_options_and_seed_give_equal_problems(target: str, options: dict[str, Any]) -> None:
    first, second = new_source(target, options), new_source(target, options)
    for split in ("train", "heldout"):
        assert first.load(split) == second.load(split)  # type: ignore[arg-type]
