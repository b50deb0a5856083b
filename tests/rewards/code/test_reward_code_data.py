"""HumanEval and MBPP: every reference solution passes its tests, and changed ones fail."""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from paths import SHARED
from reward_samples import make_group
from sandbox_fixture import need_bubblewrap

from rewards.base import RewardContext
from rewards.code.reward import CodeReward
from rlkit.experience import Group, Score

DATA = SHARED / "data" / "code"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="../shared/data/code is not there")

Row = dict[str, Any]


def human_eval_rows() -> list[Row]:
    with gzip.open(DATA / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def mbpp_rows() -> list[Row]:
    return [json.loads(line) for line in (DATA / "mbpp_sanitized_100.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def human_eval() -> Iterator[CodeReward]:
    need_bubblewrap()
    options = {"tests_column": "test", "entry_point_column": "entry_point", "prompt_is_setup": True}
    yield from started(**options)


@pytest.fixture(scope="module")
def mbpp() -> Iterator[CodeReward]:
    need_bubblewrap()
    yield from started(tests_column="test_list", setup_column="test_imports")


def started(**options: Any) -> Iterator[CodeReward]:
    config = CodeReward.Config(
        isolation="bubblewrap", timeout_seconds=1200.0, wall_seconds=60.0, cpu_seconds=20, **options
    )
    reward = CodeReward(config, RewardContext())
    reward.start()
    yield reward
    reward.close()


def grouped(row: Row, *codes: str) -> Group:
    group = make_group(str(row["task_id"]), [f"```python\n{code}\n```" for code in codes], question=row["prompt"])
    columns = {key: value for key, value in row.items() if key != "prompt"}
    return replace(group, prompt=replace(group.prompt, columns=columns))


def judged(reward: CodeReward, rows: list[Row], codes: list[list[str]]) -> list[tuple[Score, ...]]:
    groups = [grouped(row, *programs) for row, programs in zip(rows, codes, strict=True)]
    return [scores.samples for scores in reward.score(groups)]


_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


class _Mutation(ast.NodeTransformer):
    """Makes every return give None instead, or turns the first comparison around."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.changed = 0

    def visit_Return(self, node: ast.Return) -> ast.Return:
        if self.kind == "return":
            self.changed += 1
            return ast.Return(ast.Constant(None))
        self.generic_visit(node)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        self.generic_visit(node)
        if self.kind == "comparison" and self.changed == 0:
            self.changed += 1
            node.ops[0] = _OPPOSITES[type(node.ops[0])]()
        return node


def mutated(code: str, kind: str) -> str | None:
    """The code with one mutation; None if there is nothing to change."""
    mutation = _Mutation(kind)
    tree = ast.fix_missing_locations(mutation.visit(ast.parse(code)))
    return ast.unparse(tree) if mutation.changed else None


def human_eval_solution(row: Row) -> str:
    return str(row["prompt"] + row["canonical_solution"])


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_reference_solutions_of_human_eval_pass(human_eval: CodeReward, step: int) -> None:
    assert len(human_eval_rows()) == 164
    rows = human_eval_rows()[::step]
    scored = judged(human_eval, rows, [[human_eval_solution(row)] for row in rows])
    assert {row["task_id"]: score for row, (score,) in zip(rows, scored, strict=True) if score.value != 1} == {}


def test_the_end_of_a_function_is_a_solution_of_human_eval(human_eval: CodeReward) -> None:
    rows = human_eval_rows()[::16]
    scored = judged(human_eval, rows, [[row["canonical_solution"]] for row in rows])
    assert [score.value for (score,) in scored] == [1] * len(rows)


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_reference_solutions_of_mbpp_pass(mbpp: CodeReward, step: int) -> None:
    assert len(mbpp_rows()) == 100
    rows = mbpp_rows()[::step]
    scored = judged(mbpp, rows, [[row["code"]] for row in rows])
    assert {row["task_id"]: score for row, (score,) in zip(rows, scored, strict=True) if score.value != 1} == {}


SURVIVORS: dict[str, set[Any]] = {"human_eval": set(), "mbpp": {101}}
"""Problems whose first comparison can be turned around without any test noticing: in 101 it decides on a statement
without effect (`a == b` where `a = b` was meant)."""


def survivors(reward: CodeReward, rows: list[Row], codes: list[str], kind: str) -> tuple[int, set[Any]]:
    """How many solutions could be mutated, and the problems where the mutated one still passes."""
    pairs = [(row, mutant) for row, code in zip(rows, codes, strict=True) if (mutant := mutated(code, kind))]
    scored = judged(reward, [row for row, _ in pairs], [[mutant] for _, mutant in pairs])
    assert [score.reason for (score,) in scored if not score.valid] == []
    return len(pairs), {row["task_id"] for (row, _), (score,) in zip(pairs, scored, strict=True) if score.value == 1}


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["return", "comparison"])
def test_mutated_solutions_of_human_eval_fail(human_eval: CodeReward, kind: str, step: int) -> None:
    rows = human_eval_rows()[::step]
    count, alive = survivors(human_eval, rows, [human_eval_solution(row) for row in rows], kind)
    expected = SURVIVORS["human_eval"] if kind == "comparison" else set()
    assert count > 10
    assert alive == {row["task_id"] for row in rows} & expected


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["return", "comparison"])
def test_mutated_solutions_of_mbpp_fail(mbpp: CodeReward, kind: str, step: int) -> None:
    rows = mbpp_rows()[::step]
    count, alive = survivors(mbpp, rows, [row["code"] for row in rows], kind)
    expected = SURVIVORS["mbpp"] if kind == "comparison" else set()
    assert count > 7
    assert alive == {row["task_id"] for row in rows} & expected
