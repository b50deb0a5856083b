"""Measures the throughput of the rule verifiers, and of bare math-verify on as many cores, on real solutions.

    python benchmarks/verifiers.py --solutions ../shared/data/gsm8k/model_solutions.jsonl [--cores 2] [--repeat 3]

Bare math-verify: `verify(parse(gold), parse(solution))` with the library's own time-outs, in a multiprocessing pool of
`--cores` processes, started and warmed up before timing. The rule reward: as many verifier processes, started before
timing, without cached verdicts (a new reward for each repetition) unless the row says so. `plain` rows judge the
solutions unchanged. In `fraction` rows both answers are rewritten as fractions, so that no comparison of plain numbers
helps and every distinct pair goes through math-verify. Times are medians over repetitions, which alternate. Prints a
table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True)
class Work:
    """Solutions, their gold answers and people's labels."""

    texts: list[str]
    golds: list[str]
    correct: list[bool]


def load(path: Path) -> Work:
    """Load all four models' solutions, in the order of the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [(row[name]["solution"], row["ground_truth"], row[name]["is_correct"]) for row in rows for name in MODELS]
    texts, golds, correct = (list(column) for column in zip(*found, strict=True))
    return Work(texts, golds, correct)


def as_fractions(work: Work) -> Work:
    r"""Rewrite the last number x after `A:` as `\boxed{\frac{3x}{3}}`; solutions without one are unchanged."""
    from rewards.verifiers.answers import final_answer
    from rewards.verifiers.numerals import plain_decimal

    def rewrite(text: str) -> str:
        answer = final_answer(text)
        number = plain_decimal(answer.text) if answer is not None else None
        return text if number is None else rf"So it is \boxed{{\frac{{{3 * number:f}}}{{3}}}}."

    return Work([rewrite(text) for text in work.texts], [rewrite(gold) for gold in work.golds], work.correct)


def bare_verdict(pair: tuple[str, str]) -> bool:
    """Use math-verify as its documentation does."""
    from math_verify import parse, verify

    text, gold = pair
    return bool(verify(parse(gold), parse(text)))


def bare_pool(cores: int) -> Any:
    """Return a pool of processes that have built the grammar."""
    pool = multiprocessing.get_context("forkserver").Pool(cores)
    pool.map(bare_verdict, [(r"\boxed{\frac{1}{2}}", r"\boxed{0.5}")] * cores * 8, chunksize=1)
    return pool


def rule_reward(cores: int) -> Any:
    """Return a rule reward that has been started."""
    from rewards.base import RewardContext
    from rewards.verifiers.math import MathReward

    reward = MathReward(MathReward.Config(processes=cores, timeout_seconds=1200), RewardContext())
    reward.start()
    return reward


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure_math(work: Work, cores: int, repeat: int) -> dict[str, tuple[float, float]]:
    """Return row name -> (solutions per second, agreement with the labels)."""
    seconds: dict[str, list[float]] = {
        "bare math-verify": [],
        "rule reward": [],
        "rule reward, verdicts remembered": [],
    }
    verdicts: dict[str, list[bool]] = {}
    pairs = list(zip(work.texts, work.golds, strict=True))
    pool = bare_pool(cores)
    for _ in range(repeat):
        took, verdicts["bare math-verify"] = timed(partial(pool.map, bare_verdict, pairs, chunksize=16))
        seconds["bare math-verify"].append(took)
        reward = rule_reward(cores)
        for name in ("rule reward", "rule reward, verdicts remembered"):
            took, scores = timed(partial(reward.judge, work.texts, work.golds))
            seconds[name].append(took)
            verdicts[name] = [score.value == 1.0 for score in scores]
        reward.close()
    pool.terminate()
    pool.join()
    count = len(pairs)
    return {
        name: (
            count / statistics.median(times),
            sum(a == b for a, b in zip(verdicts[name], work.correct, strict=True)) / count,
        )
        for name, times in seconds.items()
    }


def measure_others(work: Work, cores: int, repeat: int) -> dict[str, float]:
    """Return solutions per second of the other verifiers in their own processes, on the same texts."""
    from rewards.base import RewardContext
    from rlkit.config.parts import import_part
    from rlkit.experience import Score

    call = {"tool_calls": [{"name": "f", "parameters": {"a": 1}}]}
    always = [{"id": "punctuation:no_comma"}, {"id": "length_constraints:number_words",
              "kwargs": {"num_words": 20, "relation": "at least"}}]  # fmt: skip
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "exact_match": ("match.ExactMatch", {}, {}),
        "regex_match": ("match.RegexMatch", {"pattern": r"(?m)^A: {answer}$"}, {}),
        "format": ("match.TagFormat", {}, {}),
        "tool_call": ("tool_call.ToolCallMatch", {}, call),
        "instructions (2 constraints)": ("instructions.Instructions", {"always": always}, {}),
        "json_schema": ("json_schema.JsonSchema", {}, {"json_schema": {"type": "object"}}),
    }
    rates = {}
    for name, (target, options, columns) in kinds.items():
        kind = import_part("reward", f"rewards.verifiers.{target}")
        reward = kind(kind.Config(processes=cores, **options), RewardContext())
        reward.start()
        groups = [group_of(text, gold, columns) for text, gold in zip(work.texts, work.golds, strict=True)]
        times = []
        for _ in range(repeat):
            took, scored = timed(partial(reward.score, groups))
            times.append(took)
            judged: list[Score] = [scores.samples[0] for scores in scored]
            assert all(score.valid for score in judged), next(score for score in judged if not score.valid)
        reward.close()
        rates[name] = len(work.texts) / statistics.median(times)
    return rates


def group_of(text: str, gold: str, columns: dict[str, Any]) -> Any:
    """Return a group of one sample."""
    import numpy as np

    from rlkit.experience import Group, Message, Prompt, Sample

    sample = Sample(0, np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", (0, 0), 0)
    return Group("g", Prompt("p", (Message("user", "?"),), (1,), answer=gold, columns=columns), (sample,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--solutions", type=Path, default=ROOT / ".." / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
    )
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.solutions.is_file():
        parser.error(f"{arguments.solutions} is not there; name it with --solutions")
    work = load(arguments.solutions)
    load_before = os.getloadavg()[0]
    report: dict[str, Any] = {"solutions": len(work.texts), "cores": arguments.cores, "load_before": load_before}
    print(f"{len(work.texts)} solutions, {arguments.cores} cores, load before {load_before:.1f}\n")
    print(f"| {'answers':9} | {'verifier':34} | per second | beside bare | agrees with labels |")
    print(f"|{'-' * 11}|{'-' * 36}|{'-' * 12}|{'-' * 13}|{'-' * 20}|")
    for answers, some in (("plain", work), ("fraction", as_fractions(work))):
        rows = measure_math(some, arguments.cores, arguments.repeat)
        bare = rows["bare math-verify"][0]
        for name, (rate, agreement) in rows.items():
            print(f"| {answers:9} | {name:34} | {rate:10.0f} | {rate / bare:10.2f}x | {agreement:18.4f} |", flush=True)
            report[f"{answers}/{name}"] = {"per_second": rate, "ratio": rate / bare, "agreement": agreement}
    for name, rate in measure_others(work, arguments.cores, arguments.repeat).items():
        print(f"| {'':9} | {name:34} | {rate:10.0f} | {'':11} | {'':18} |", flush=True)
        report[name] = {"per_second": rate}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
