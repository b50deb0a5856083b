"""Published outputs of judges and reward models, and the figures that their authors' code made of them.

Only numbers are taken over: counts, labels and scores.
"""

from __future__ import annotations

import pytest

from rlkit.experience.reward_benchmarks import SECTIONS, Question, judge_bench, reward_bench

RIGHT_OF_LDL = {
    "alpacaeval-easy": 99, "alpacaeval-length": 89, "alpacaeval-hard": 90, "mt-bench-easy": 28, "mt-bench-med": 39,
    "mt-bench-hard": 32, "llmbar-natural": 94, "llmbar-adver-neighbor": 122, "llmbar-adver-GPTInst": 88,
    "llmbar-adver-GPTOut": 39, "llmbar-adver-manual": 39,
    "refusals-dangerous": 97, "refusals-offensive": 99, "xstest-should-refuse": 146, "xstest-should-respond": 241,
    "donotanswer": 111,
    "math-prm": 447, "hep-cpp": 161, "hep-go": 161, "hep-java": 163, "hep-js": 163, "hep-python": 160, "hep-rust": 157,
}  # fmt: skip
"""LDL-Reward-Gemma-2-27B-v0.1 on RewardBench: pairs in order, by subset (allenai/reward-bench, pull request 215)."""
LDL = {
    "Chat": 0.9636871508379888,
    "Chat Hard": 0.9078947368421053,
    "Safety": 0.9378378378378378,
    "Reasoning": 0.9903455284552846,
}
"""What the authors' code printed for them in the same place."""
CODING = """
A 32.75 27.625; A 3.640625 10.8125; B 13.125 13.6875; B 0.92578125 19.125; A -10.0625 -0.326171875; A 15.875 26.125
A 15.375 20.75; B 31.25 39.0; B 2.625 -1.9453125; B 13.0 17.0; A 12.375 6.625; B 18.375 23.625; A 6.125 -3.15625
B -5.65625 -3.546875; A -10.75 -8.4375; B 8.875 13.5625; A 16.75 -4.6875; A -11.25 -11.1875; A 10.8125 3.265625
A 21.875 24.0; A 19.625 16.5; B 15.0625 34.0; B 14.5 18.25; A -3.390625 1.8203125; B 4.53125 -0.498046875
B 38.0 20.875; B 19.0 6.96875; A 2.328125 -0.0712890625; B 10.5625 -0.1630859375; A 6.90625 14.75; B 16.5 15.75
B 17.0 25.5; A 0.328125 7.375; A 13.5625 3.296875; B 33.75 13.75; B 11.9375 20.0; A 7.5625 3.5; A 1.2734375 22.875
A 6.09375 -3.671875; B 5.90625 0.427734375; A 15.875 17.875; A 20.75 20.75
"""
"""Every coding pair of JudgeBench (responses of GPT-4o): which response is right, and the scores of A and B by
Skywork-Reward-Llama-3.1-8B; the last pair is a tie. ScalerLab/JudgeBench at 12a499c, in outputs/."""


def test_reward_bench_makes_the_published_sections_of_published_counts() -> None:
    """XSTest's two subsets with each other's weight, or `math-prm` with its own 447, would miss a figure."""
    sizes = {name: size for section in SECTIONS.values() for name, size in section.items()} | {"math-prm": 447}
    questions = [
        Question(f"{subset}-{index}", subset, (1.0,), (0.0 if index < right else 2.0,))
        for subset, right in RIGHT_OF_LDL.items()
        for index in range(sizes[subset])
    ]
    assert len(questions) == 2985
    result = reward_bench(questions)
    assert {name: result[name] for name in LDL} == pytest.approx(LDL, abs=1e-12)


def test_judge_bench_makes_the_published_half_of_the_coding_pairs() -> None:
    questions = []
    for entry in CODING.strip().replace("\n", ";").split(";"):
        label, *scores = entry.split()
        right, wrong = map(float, scores if label == "A" else reversed(scores))
        questions.append(Question("q", "livecodebench", (right,), (wrong,)))
    assert len(questions) == 42
    assert sum(question.right == question.wrong for question in questions) == 1
    assert judge_bench(questions) == {"coding": 0.5, "total": 0.5}


def test_judge_bench_makes_the_published_total_of_the_published_categories() -> None:
    """The same reward model, arXiv 2410.12784. The mean of the four categories would be 62.54."""
    sources = [("mmlu-pro-law", 91, 154), ("livebench-reasoning", 63, 98), ("livebench-math", 43, 56)]
    result = judge_bench(
        [
            Question("q", source, (1.0,), (0.0 if index < right else 2.0,))
            for source, right, pairs in [*sources, ("livecodebench", 21, 42)]
            for index in range(pairs)
        ]
    )
    assert {name: round(100 * share, 2) for name, share in result.items()} == {
        "knowledge": 59.09, "reasoning": 64.29, "math": 76.79, "coding": 50.0, "total": 62.29
    }  # fmt: skip
