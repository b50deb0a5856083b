"""The code reward: which program is judged, what a row's tests may look like, scores, options."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from reward_samples import make_group
from sandbox_fixture import need_bubblewrap

from rewards.base import RewardContext
from rewards.code.judge import (
    AssertTests,
    BadTests,
    CallTests,
    InputOutputTests,
    last_python_block,
    read_tests,
    same_output,
    same_value,
)
from rewards.code.reward import CodeReward
from rewards.services.sandbox import bubblewrap as layout
from rewards.services.sandbox.inside.wire import decode, encode
from rlkit.experience import Group, Score

ASSERTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(-1) == 0"]


def reward(**options: Any) -> CodeReward:
    need_bubblewrap()
    return CodeReward(CodeReward.Config(isolation="bubblewrap", **options), RewardContext())


@pytest.fixture(scope="module")
def started() -> Iterator[CodeReward]:
    made = reward()
    made.start()
    yield made
    made.close()


def group(columns: dict[str, Any], *texts: str, question: str = "Add one.") -> Group:
    made = make_group("g", texts, question=question)
    return replace(made, prompt=replace(made.prompt, columns=columns))


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def scores(reward: CodeReward, columns: dict[str, Any], *texts: str, question: str = "Add one.") -> list[Score]:
    (scored,) = reward.score([group(columns, *texts, question=question)])
    return list(scored.samples)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```Python3\nb\n```\nand so on", "b\n"),
        ("```python\na\n```\n```\nprinted\n```", "a\n"),
        ("```\na\n```\ntext\n```\nb\n```", "b\n"),
        ("```python\na\n```\n```bash\nrm -r\n```", "a\n"),
        ("```bash\nrm -r\n```", None),
        ("```python\na", "a"),
        ("~~~python\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("1. so\n   ```python title=x\n   a\n   ```", "   a\n"),
        ("```python\n```", ""),
        ("inline ```python``` only", None),
        ("def f(): pass", None),
        ("", None),
    ],
)
def test_the_last_python_block(text: str, code: str | None) -> None:
    assert last_python_block(text) == code


def test_tests_of_a_row() -> None:
    assert read_tests(ASSERTS, ["import math"]) == AssertTests(tuple(ASSERTS), "import math")
    assert read_tests("def check(c): pass", None, "f", "def f(): 0") == AssertTests(
        ("def check(c): pass\n\ncheck(f)\n",), "def f(): 0", "f"
    )
    assert read_tests({"inputs": ["1\n", ["2", "3"]], "outputs": ["2", ["4", "5"]]}) == InputOutputTests(
        ("1\n", "2\n3"), ("2", "4\n5")
    )
    calls = {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}
    assert read_tests(json.dumps(calls)) == CallTests("add", ([1, 2],), (3,))
    assert read_tests(json.dumps(ASSERTS)) == AssertTests(tuple(ASSERTS))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " ",
        [],
        [1],
        7,
        {},
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"},
        {"inputs": [[1]], "outputs": ["1"]},
    ],
)
def test_tests_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(BadTests):
        read_tests(value)
    with pytest.raises(BadTests):
        read_tests(ASSERTS, 7)
    with pytest.raises(BadTests):
        read_tests(ASSERTS, None, "f()")


def test_output_is_compared_by_words_and_lines() -> None:
    assert same_output("1  2 \n3\n\n", "1 2\n3", 0.0)
    assert not same_output("1 2 3", "1 2\n3", 0.0) and not same_output("1", "2", 1.0)
    assert same_output("0.3333333", "0.33333333333", 1e-6) and not same_output("0.3333333", "0.33333333333", 0.0)
    assert not same_output("3.0", "3", 1e-6), "a whole number is expected as it stands"
    assert not same_output("nan", "0.5", 1e-6) and not same_output("", "0.5", 1e-6) and same_output("", "\n", 0.0)


def test_values_are_compared_as_json() -> None:
    assert same_value((1, 2.0), [1, 2], 0.0) and same_value({1: "a"}, {"1": "a"}, 0.0)
    assert not same_value(True, 1, 0.0) and not same_value(None, 0, 0.0) and not same_value("1", 1, 0.0)
    assert same_value(0.1 + 0.2, 0.3, 1e-9) and not same_value(0.1 + 0.2, 0.3, 0.0)
    assert not same_value(10**400, 1.5, 1e-6) and same_value(10**400, 10**400, 0.0)
    assert not same_value(float("nan"), 0.5, 1.0) and not same_value([1], [1, 1], 0.0)


def test_a_value_that_cannot_be_compared_is_not_the_expected_one(started: CodeReward) -> None:
    for body, expected in (("10 ** 400", 1.5), ("[10 ** 400]", [1.5]), ("{10 ** 5000: 1}", {"a": 1})):
        tests = {"inputs": [[1]], "outputs": [expected], "fn_name": "f"}
        (score,) = scores(started, {"tests": tests}, fenced(f"def f(x): return {body}"))
        assert score.value == 0, score


@pytest.mark.parametrize("name", ["Fraction", "Decimal"])
def test_a_forged_number_is_not_computed(started: CodeReward, name: str) -> None:
    for text in ("1e10000000", "1e-10000000", "9" * 3000, "1_0", "\u0661"):
        with pytest.raises(ValueError, match="no plain"):
            decode([name, text], int)
    made = {"Fraction": Fraction, "Decimal": Decimal}[name]
    for text in ("-3", "0", "12" * 500, *(("-1/3",) if name == "Fraction" else ("-1.50", "1E+10", "NaN", "Infinity"))):
        message = encode(made(text), lambda value: 0)
        assert message == [name, text] and str(decode(message, int)) == text
    assert encode(made("1" * 3000), lambda value: 7) == ["handle", 7]
    forged = "from fractions import Fraction\nfrom decimal import Decimal\n"
    forged += f"class Forged({name}):\n    def __str__(self): return '1e10000000'\ndef f(x): return Forged(1)"
    before = time.monotonic()
    (score,) = scores(started, {"tests": {"inputs": [[1]], "outputs": [1], "fn_name": "f"}}, fenced(forged))
    assert score.value == 0 and time.monotonic() - before < 5.0


def test_scores(started: CodeReward) -> None:
    right, wrong, partly, bare, none = scores(
        started,
        {"tests": ASSERTS},
        fenced("def f(x): return x + 1"),
        fenced("def f(x): return x"),
        fenced("def f(x): return abs(x) + 1"),
        "def f(x): return x + 1",
        "I do not know.",
    )
    assert [right.value, wrong.value, partly.value, bare.value, none.value] == [1, 0, 0, 0, 0]
    assert right.components == {"correct": 1.0, "passed": 1.0, "timeout": 0.0}
    assert partly.components["passed"] == pytest.approx(2 / 3) and "f(-1) == 0" in partly.trace
    assert none.trace == "no code block"


def test_the_share_of_tests_and_code_without_a_fence() -> None:
    soft = reward(soft=True, require_fence=False)
    partly, bare = scores(soft, {"tests": ASSERTS}, fenced("def f(x): return abs(x) + 1"), "def f(x): return x + 1")
    stdio = {"tests": {"inputs": ["1", "2", "3"], "outputs": ["2", "3", "4"]}}
    (three_lines,) = scores(soft, stdio, fenced("x = int(input())\nprint(x + 1 if x != 2 else 0)"))
    soft.close()
    assert partly.value == pytest.approx(2 / 3) and partly.components["correct"] == 0
    assert bare.value == 1
    assert three_lines.value == pytest.approx(2 / 3), "every test is run for its share"


def test_a_row_without_usable_tests_is_invalid_and_not_zero(started: CodeReward) -> None:
    for columns in ({}, {"tests": ""}, {"tests": ["assert f("]}, {"tests": ["assert f(print) == 1"]}):
        (score,) = scores(started, columns, fenced("def f(x): return x"))
        assert not score.valid and score.reason.startswith("bad_tests: ")


def test_tests_that_are_no_valid_text_spoil_their_own_row_alone(started: CodeReward) -> None:
    right = fenced("print(input())")
    half = [
        {"tests": '{"inputs": ["\\ud83d"], "outputs": ["x"]}'},
        {"tests": '{"inputs": ["x"], "outputs": [["\\ud83d"]]}'},
    ]
    groups = [group(columns, right) for columns in (*half, {"tests": {"inputs": ["x"], "outputs": ["x"]}})]
    first, second, third = (scored.samples[0] for scored in started.score(groups))
    for score in (first, second):
        assert not score.valid and score.reason.startswith("bad_tests: ") and "not valid Unicode" in score.reason
    assert third.value == 1


def test_code_that_takes_too_long_is_a_real_zero_and_says_so() -> None:
    quick = reward(wall_seconds=1.0)
    hung, slow = scores(quick, {"tests": ASSERTS}, fenced("while True: pass"), fenced("import time\ntime.sleep(500)"))
    quick.close()
    for score in (hung, slow):
        assert score.value == 0 and score.components["timeout"] == 1 and "took too long" in score.trace


def test_a_value_with_which_a_test_takes_too_long_is_a_real_zero_too() -> None:
    """The CPU time ends in the tests' process, not in the program's."""
    strict = reward(cpu_seconds=1, wall_seconds=60.0, soft=True)
    tests = {"tests": ["assert f(1) == 10**12", "for _ in range(f(3)): pass"]}
    (score,) = scores(strict, tests, fenced("def f(x): return 10**12"))
    strict.close()
    assert score.components == {"correct": 0, "passed": 0.5, "timeout": 1}, score.reason
    assert score.value == 0.5 and "took too long" in score.trace


def test_what_a_program_says_can_be_written_to_a_file(started: CodeReward) -> None:
    deep = "y = []\nfor _ in range(900): y = [y]\ndef f(x): return y"
    for tests in (ASSERTS, {"inputs": [[1]], "outputs": [2], "fn_name": "f"}):
        for score in scores(started, {"tests": tests}, fenced("def f(x): raise ValueError('\\ud800')"), fenced(deep)):
            assert score.value == 0 and score.trace.encode()


def test_after_a_timeout_the_other_inputs_are_not_tried() -> None:
    quick = reward(wall_seconds=1.0, soft=True)
    tests = {"tests": {"inputs": ["1", "2"] + ["2"] * 50, "outputs": ["2"] * 52}}
    (score,) = scores(quick, tests, fenced("x = int(input())\nwhile x > 1: pass\nprint(2)"))
    quick.close()
    assert score.value == pytest.approx(1 / 52) and score.components["timeout"] == 1


def test_time_of_the_call_used_up_is_invalid() -> None:
    hurried = reward(timeout_seconds=2.5, processes=1, wall_seconds=60.0, cpu_seconds=60)
    hurried.start()
    first, second = scores(
        hurried,
        {"tests": ASSERTS},
        fenced("import time\ntime.sleep(500)"),
        fenced("def f(x): return 0 * time.sleep(500)"),
    )
    hurried.close()
    for score in (first, second):
        assert not score.valid and score.reason.startswith("timeout: ")


def test_a_sandbox_that_breaks_is_invalid_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking = reward()
    breaking.start()
    monkeypatch.setattr(layout.Layout, "arguments", lambda self, namespace: ["/no/such/bwrap"])
    (gone,) = scores(breaking, {"tests": ASSERTS}, fenced("def f(x): return x + 1"))
    arguments = ["/bin/sh", "-c", "echo bwrap: Creating new namespace failed >&2; exit 1"]
    monkeypatch.setattr(layout.Layout, "arguments", lambda self, namespace: arguments)
    (refused,) = scores(breaking, {"tests": ASSERTS}, fenced("def f(x): return x + 1"))
    breaking.close()
    assert not gone.valid and gone.reason.startswith("sandbox: a sandbox cannot be started")
    assert not refused.valid and "Creating new namespace failed" in refused.reason


def test_columns_and_needs() -> None:
    human_eval = reward(tests_column="test", entry_point_column="entry_point", prompt_is_setup=True)
    assert human_eval.traits(human_eval.config).columns == ("test", "entry_point")
    columns = {"test": "def check(c):\n    assert c(1) == helper(1)\n", "entry_point": "f"}
    question = "def helper(x):\n    return x + 1\n\ndef f(x):\n    ''' Adds one. '''\n"
    right, rest, wrong = scores(
        human_eval,
        columns,
        fenced("def f(x):\n    return helper(x)"),
        fenced("    return x + 1"),
        fenced("def f(x):\n    return x"),
        question=question,
    )
    human_eval.close()
    assert [right.value, rest.value, wrong.value] == [1, 1, 0]


def test_isolation_must_be_chosen_and_options_must_act() -> None:
    with pytest.raises(ValidationError, match="isolation"):
        CodeReward.Config()
    with pytest.raises(ValidationError, match="isolation"):
        CodeReward.Config(isolation="none")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="url has no effect with isolation=bubblewrap"):
        CodeReward.Config(isolation="bubblewrap", url="http://127.0.0.1:1")
    with pytest.raises(ValidationError, match="max_processes, python has no effect with isolation=http"):
        CodeReward.Config(isolation="http", url="http://127.0.0.1:1", python="/usr/bin/python3", max_processes=2)
    with pytest.raises(ValidationError, match="isolation=http needs url"):
        CodeReward.Config(isolation="http")


def test_check_runs_a_sandbox_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need_bubblewrap()
    assert CodeReward.check(CodeReward.Config(isolation="bubblewrap")) == []
    (message,) = CodeReward.check(CodeReward.Config(isolation="bubblewrap", python=str(tmp_path / "python")))
    assert "does not run" in message
    monkeypatch.setattr(layout.shutil, "which", lambda name, path=None: None)
    (message,) = CodeReward.check(CodeReward.Config(isolation="bubblewrap"))
    assert "apt-get install -y bubblewrap" in message


def test_another_interpreter_can_be_named() -> None:
    system = Path("/usr/bin/python3")
    if not system.exists():
        pytest.skip("there is no /usr/bin/python3")
    other = reward(python=str(system))
    (score,) = scores(other, {"tests": ["assert f() == '/usr'"]}, fenced("import sys\ndef f(): return sys.prefix"))
    other.close()
    assert score.value == 1, score


def test_values_that_all_hash_alike_are_not_put_into_a_set() -> None:
    modulus = 2**61 - 1
    for made in ({i * modulus for i in range(1, 200)}, {i * modulus: 0 for i in range(1, 200)}):
        with pytest.raises(ValueError, match="with the same hash"):
            decode(encode(made, lambda _: 0), lambda _: None)
    fine = {str(i) for i in range(1000)} | set(range(1000))
    assert decode(encode(fine, lambda _: 0), lambda _: None) == fine
