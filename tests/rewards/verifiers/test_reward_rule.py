"""The rule reward: extraction, real solutions, agreement with math-verify, verifiers that hang or die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT, SHARED

from rewards.base import RewardContext
from rewards.verifiers.answers import MAX_ANSWER_CHARACTERS, final_answer, gold_answer
from rewards.verifiers.math import MathReward
from rewards.verifiers.numerals import compare_plain, plain_decimal
from rewards.verifiers.symbolic import verify_pairs
from rlkit.experience import Group, Message, Prompt, Sample

SLOW = "9^{9^{9+0}}"
"""Larger than the estimate of work sees."""
GSM8K = SHARED / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="../shared/data/gsm8k is not there")


@pytest.fixture(scope="module")
def reward() -> Iterator[MathReward]:
    reward = MathReward(MathReward.Config(item_timeout_seconds=1.0), RewardContext())
    reward.start()
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def patient() -> Iterator[MathReward]:
    """With the deadlines of its defaults."""
    reward = MathReward(MathReward.Config(), RewardContext())
    yield reward
    reward.close()


def group(answer: str | None, *texts: str) -> Group:
    samples = tuple(
        Sample(
            index=index,
            token_ids=np.array([1], dtype=np.int32),
            logprobs=np.array([-0.1], dtype=np.float32),
            text=text,
            finish_reason="stop",
            policy_versions=(0, 0),
            seed=index,
        )
        for index, text in enumerate(texts)
    )
    return Group("g", Prompt("p", (Message("user", "?"),), (1,), answer=answer), samples)


@pytest.mark.parametrize(
    ("text", "answer", "marker"),
    [
        ("so 40 + 2.\n#### 42", "42", "####"),
        ("#### 42.", "42", "####"),
        ("#### 42.0", "42", "####"),
        ("#### $42", "42", "####"),
        ("####42", "42", "####"),
        ("####\n42", "42", "####"),
        ("#### 1,234", "1234", "####"),
        ("#### -$5.50", "-5.5", "####"),
        ("#### 42 apples per day", "42", "####"),
        ("#### 42\n" + "and so on " * 40, "42", "####"),
        ("#### 42 " + "and so on " * 40, "42", "####"),
        ("#### **42**", "42", "####"),
        ("#### +5", "5", "####"),
        ("#### .5", "0.5", "####"),
        ("#### 1e3", "1000", "####"),
        ("#### 1.8 million", "1800000", "####"),
        ("#### 6 * 7 = 42", "42", "####"),
        ("#### 1 1/2", "3/2", "####"),
        ("#### 42 + 1", "42 + 1", "####"),
        ("#### 42, 43", "42, 43", "####"),
        ("#### 12 x 3", "12 x 3", "####"),
        ("#### 50%", "50%", "####"),
        ("#### 7\nNo, wait.\n#### 8", "8", "####"),
        (r"Hence \boxed{\frac{3}{4}}.", r"\frac{3}{4}", "boxed"),
        (r"The answer is $\boxed{1{,}234}$.", "1234", "boxed"),
        (r"\boxed{\boxed{5}}", "5", "boxed"),
        (r"#### \boxed{9}", "9", "boxed"),
        (r"#### 3 \boxed{unclosed", r"3 \boxed{unclosed", "####"),
        ("The answer is 42. Let me explain.", "42", "answer is"),
        ("**Final answer:** 42", "42", "answer is"),
        ("He has 5.\nA: 72", "72", "A:"),
    ],
)
def test_final_answer_is_found(text: str, answer: str, marker: str) -> None:
    found = final_answer(text)
    assert found is not None
    assert (found.text, found.marker, found.marked) == (answer, marker, True)


@pytest.mark.parametrize(
    ("text", "answer", "marker"),
    [
        ("#### 42\nI hope my answer is helpful!", "42", "####"),
        ("\\boxed{42}\n\nThe answer was verified by substitution.", "42", "boxed"),
        ("The answer is 42.\nNote: this answer is rounded to the nearest dollar.", "42", "answer is"),
        ("#### 41\nNo, the answer is 42.", "42", "answer is"),
        ("#### 41\nNo, the answer is $-42$ dollars.", "-42", "answer is"),
        ("#### 41\nNo, the answer is \\frac{1}{2}.", "\\frac{1}{2}", "answer is"),
        ("#### 41\nNo, the answer is (1, 2).", "(1, 2)", "answer is"),
        ("\\boxed{41}. No, the answer is .5", "0.5", "answer is"),
        ("\\boxed{41}. No, the answer is $x + 1$.", "x + 1", "answer is"),
        ("The answer is east.\nThe answer is west.", "west", "answer is"),
    ],
)
def test_prose_about_the_answer_does_not_replace_it(text: str, answer: str, marker: str) -> None:
    found = final_answer(text)
    assert found is not None and (found.text, found.marker) == (answer, marker)


def test_an_answer_that_leaves_a_choice_is_not_right(reward: MathReward) -> None:
    texts = ["5 or 6", "5 and 6", "5 or -5", "5 or x", "5 dollars", "5 and I hope that this helps", "5 or so"]
    scores = reward.judge([f"#### {text}" for text in texts], ["5"] * len(texts))
    assert [score.value for score in scores] == [0.0] * 4 + [1.0] * 3


def test_without_a_marker_only_the_last_number_counts_and_only_if_asked() -> None:
    text = "First 12 apples, then 13. Done"
    assert final_answer(text) is None
    found = final_answer(text, accept_last_number=True)
    assert found is not None
    assert (found.text, found.marked) == ("13", False)
    assert final_answer("no number", accept_last_number=True) is None
    assert final_answer("####") is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("6*12=<<6*12=72>>72\n#### 72", "72"), ("x\nA: 2,125", "2125"), ("72", "72"), (r"\frac{1}{2}", r"\frac{1}{2}")],
)
def test_gold_answers_are_reduced(gold: str, answer: str) -> None:
    assert gold_answer(gold) == answer


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="#\\boxed{}answer is:A$,.0123456789-+/eE x\n", max_size=200))
def test_extraction_takes_any_text(text: str) -> None:
    found = final_answer(text, accept_last_number=True)
    assert found is None or found.text


def test_extraction_time_is_linear() -> None:
    hostile = "\\boxed{" * 20_000 + "####" * 20_000 + "answer is " * 20_000
    start = time.perf_counter()
    final_answer(hostile, accept_last_number=True)
    assert time.perf_counter() - start < 2.0


def test_what_is_made_once_takes_no_pairs_time() -> None:
    """In a new process; its first pair once had the LaTeX grammar built in its own processor time."""
    program = (
        "from rewards.verifiers import symbolic\n"
        "symbolic.CPU_SECONDS = 0.05\n"
        "print(*symbolic.verify_pairs([(r'\\frac{1}{3}', r'\\frac{2}{6}')]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["right"], done.stderr


@settings(max_examples=200, deadline=None)
@given(
    st.decimals(-(10**8), 10**8, places=3, allow_nan=False),
    st.sampled_from([Decimal(0), Decimal("0.001"), Decimal(1), Decimal("-0.5"), Decimal(10)]),
)
def test_the_exact_comparison_agrees_with_math_verify(number: Decimal, difference: Decimal) -> None:
    answer, gold = (f"#### {value}" for value in (number + difference, number))
    pair = (final_answer(answer).text, gold_answer(gold))  # type: ignore[union-attr]
    assert compare_plain(*pair) == (verify_pairs([pair]) == ["right"])


def test_plain_numbers() -> None:
    assert plain_decimal("1,234.50") == Decimal("1234.5")
    assert all(plain_decimal(text) is None for text in ("1,23", "3/4", "50%", "", "-", ".", "x", "1 2"))
    assert compare_plain("3/4", "0.75") is None
    assert compare_plain("0.3333333", "0.3333334") is False
    assert compare_plain("1234567890123456", "1234567890123457") is False
    assert compare_plain("10 000", "10,000.0") is True


def test_gold_answers_that_are_prose_are_said_before_the_run() -> None:
    prose = "It depends on how warm the water was when the experiment began."
    numbers = [
        replace(group(answer).prompt, id=answer) for answer in ("5", "#### 72", r"\frac{1}{2}", "east", "3 km/h")
    ]
    assert MathReward.doubts(MathReward.Config(), numbers * 100) == []
    prompts = [*numbers, replace(group(prose).prompt, id="water")]
    (said,) = MathReward.doubts(MathReward.Config(), prompts)
    assert said.startswith("17% of the gold answers are prose, for example 'It depends on how warm") and "water" in said
    assert MathReward.doubts(MathReward.Config(), [group(None).prompt]) == []


def test_verdicts_and_scores(reward: MathReward) -> None:
    texts = ["#### 3/4", r"\boxed{0.75}", "#### 0.8", "I do not know", "#### " + "7" * (MAX_ANSWER_CHARACTERS + 1)]
    (scored,) = reward.score([group("0.75", *texts)])
    assert [score.value for score in scored.samples] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(score.valid and score.trace for score in scored.samples)
    assert [score.components["format"] for score in scored.samples] == [1.0, 1.0, 1.0, 0.0, 1.0]
    symbolic = reward.judge(
        [r"\boxed{1+x}", r"\boxed{(1, 2)}", "#### 50%", "#### 1 1/2"], ["x+1", "(1,2)", "50", "3/2"]
    )
    assert [score.value for score in symbolic] == [1.0, 1.0, 1.0, 1.0]


def test_the_format_bonus_is_added_where_configured() -> None:
    reward = MathReward(MathReward.Config(format_weight=0.1, accept_last_number=True), RewardContext())
    scores = reward.judge(["#### 5", "#### 6", "it is 5", "nothing"], ["5"] * 4)
    reward.close()
    assert [score.value for score in scores] == [1.1, 0.1, 1.0, 0.0]


def test_a_gold_answer_that_is_missing_or_unreadable_is_invalid_not_zero(reward: MathReward) -> None:
    missing, unreadable = reward.judge(["#### 5", "#### 5"], [None, "???"])
    assert (missing.valid, missing.value) == (False, None)
    assert missing.reason.startswith("no_gold:")
    assert unreadable.reason.startswith("gold_unparsable:")


def test_a_hanging_comparison_is_killed_and_its_answer_is_wrong(reward: MathReward) -> None:
    assert reward.judge([r"\boxed{w}"], ["2w"])[0].value == 0.0
    hung = verifier_processes()
    start = time.perf_counter()
    scores = reward.judge([rf"\boxed{{{SLOW}}}", r"\boxed{x+1}", r"\boxed{2x}"], ["5", "1+x", "x"])
    assert time.perf_counter() - start < 20.0
    assert [score.value for score in scores] == [0.0, 1.0, 0.0]
    assert "wrong: timeout: no verdict" in scores[0].trace
    assert len(hung) == 1
    assert not hung[0].is_running()


def test_a_slow_answer_ends_after_its_processor_time_and_keeps_the_process(patient: MathReward) -> None:
    assert patient.judge([r"\boxed{w}"], ["2w"])[0].value == 0.0
    (process,) = [verifier for verifier in verifier_processes() if verifier.is_running()][-1:]
    assert verify_pairs([(SLOW, "5"), ("x+1", "1+x")]) == [
        "wrong: takes more than 2 s of processor time",
        "right",
    ]
    assert process.is_running()


def test_a_dead_verifier_process_is_replaced(reward: MathReward) -> None:
    assert reward.judge([r"\boxed{y}"], ["2y"])[0].value == 0.0  # the process is up, whatever happened before
    killed = verifier_processes()
    assert killed, "no verifier process found"
    for child in killed:
        child.kill()
    (score,) = reward.judge([r"\boxed{y+1}"], ["1+y"])
    assert score.value == 1.0 or score.reason.startswith("crash:")
    (score,) = reward.judge([r"\boxed{y+2}"], ["2+y"])
    assert score.value == 1.0


def verifier_processes() -> list[psutil.Process]:
    """Children of this process's fork servers (this process may have other children: Ray, for example)."""
    servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    return [verifier for server in servers for verifier in server.children()]


def test_a_memory_bomb_fails_alone(reward: MathReward) -> None:
    bomb, fine = reward.judge([r"\boxed{2^{2^{38+0}}}", r"\boxed{z+1}"], ["5", "1+z"])
    assert (bomb.value, fine.value) == (0.0, 1.0)


def test_the_call_ends_within_its_budget() -> None:
    config = MathReward.Config(item_timeout_seconds=2.0, timeout_seconds=3.0)
    reward = MathReward(config, RewardContext())
    start = time.perf_counter()
    scores = reward.judge([rf"\boxed{{9^{{9^{{9+{n}-{n}}}}}}}" for n in range(5)], ["5"] * 5)
    assert time.perf_counter() - start < 6.0
    assert all(score.value == 0.0 or score.reason.startswith("timeout: the verifier's time") for score in scores)
    reward.close()


def test_verifier_processes_do_not_outlive_a_killed_parent() -> None:
    script = textwrap.dedent(
        r"""
        from rewards.base import RewardContext
        from rewards.verifiers.math import MathReward

        if __name__ == "__main__":
            reward = MathReward(MathReward.Config(item_timeout_seconds=100.0, timeout_seconds=100.0), RewardContext())
            reward.start()
            print("ready", flush=True)
            reward.judge([r"\boxed{9^{9^{9+0}}}"], ["5"])
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert any(_busy(child) for child in family), "no verifier is at work"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=5)
    for survivor in alive:
        survivor.kill()
    assert not alive


def _busy(process: psutil.Process) -> bool:
    return process.cpu_percent(0.2) > 10


@needs_gsm8k
def test_real_model_solutions_are_judged_as_people_labelled_them(patient: MathReward) -> None:
    texts, golds, labels = [], [], []
    for line in (GSM8K / "model_solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            texts.append(row[name]["solution"])
            golds.append(row["ground_truth"])
            labels.append(row[name]["is_correct"])
    scores = patient.judge(texts, golds)
    assert len(scores) == 2640
    assert all(score.valid for score in scores)
    agreement = np.mean([score.value == float(label) for score, label in zip(scores, labels, strict=True)])
    assert agreement >= 0.995, f"only {agreement:.4f} of the verdicts agree"


@needs_gsm8k
def test_every_reference_solution_scores_one(patient: MathReward) -> None:
    answers = [json.loads(line)["answer"] for split in ("train", "test") for line in (GSM8K / f"{split}.jsonl").open()]
    scores = patient.judge(answers, answers)
    assert len(scores) == 8792
    assert [answer for answer, score in zip(answers, scores, strict=True) if score.value != 1.0] == []


@needs_gsm8k
def test_the_exact_comparison_agrees_with_math_verify_on_real_solutions() -> None:
    pairs = set()
    for line in (GSM8K / "model_solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("6b_finetuning", "175b_verification"):
            answer = final_answer(row[name]["solution"], accept_last_number=True)
            if answer is not None:
                pairs.add((answer.text, gold_answer(row["ground_truth"])))
    decided = [pair for pair in sorted(pairs) if compare_plain(*pair) is not None]
    assert len(decided) > 800
    verdicts = verify_pairs(decided)
    assert [
        pair for pair, verdict in zip(decided, verdicts, strict=True) if compare_plain(*pair) != (verdict == "right")
    ] == []
