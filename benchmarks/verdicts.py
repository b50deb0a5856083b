"""Compares verdicts of the rule reward and of bare math-verify with a person's, class by class.

    python benchmarks/verdicts.py [--suite math_verify-0.9.0]

The person's verdicts are tests/rewards/verifiers/verdicts.tsv. `--suite`: also the test cases of Math-Verify, from its
source distribution (`pip download math-verify==0.9.0 --no-binary :all: --no-deps`, unpacked): responses with a box or
the word answer unchanged; a bare formula in a box; other prose with `accept_last_number`. Prints how many verdicts of
each are right, how many wrong answers it accepts, and one line per case on which the rule reward differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import resource
import sys
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TABLE = ROOT / "tests" / "rewards" / "verifiers" / "verdicts.tsv"
BARE_SECONDS = 10
_FORMULA = re.compile(r"\s*(?:\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\])\s*", re.DOTALL)
_MARKED = re.compile(r"\\f?boxed|answer", re.IGNORECASE)
_BARE = re.compile(r"[-\d., €$²m%/+*]+")


@dataclass(frozen=True)
class Case:
    kind: str
    right: bool
    gold: str
    response: str
    last_number: bool = False


def table() -> list[Case]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    cases = []
    for kind, verdict, gold, text in (line.split("\t") for line in lines):
        text = text.replace("⏎", "\n")
        response = rf"So it is \boxed{{{text[1:]}}}." if text.startswith("□") else text
        cases.append(Case(kind, verdict == "1", gold, response))
    return cases


def suite(folder: Path) -> list[Case]:
    """Return the parametrised cases of Math-Verify's own tests."""
    sys.modules["tests"] = types.ModuleType("tests")
    sys.path.insert(0, str(folder / "src"))
    cases = []
    for path in sorted((folder / "tests").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"tests.{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"tests.{path.stem}"] = module
        spec.loader.exec_module(module)
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", ()) if name.startswith("test") else ():
                columns = [column.strip() for column in mark.args[0].split(",")]
                if {"gold", "pred"} <= set(columns):
                    cases += [_suite_case(dict(zip(columns, values, strict=True))) for values in mark.args[1]]
    return cases


def _suite_case(row: dict[str, Any]) -> Case:
    gold, response, right = row["gold"], row["pred"], bool(row.get("expected", row.get("result")))
    if _MARKED.search(response):
        return Case("suite: marked", right, gold, response)
    formula = _FORMULA.fullmatch(response)
    if formula is not None or _BARE.fullmatch(response):
        inside = next(group for group in formula.groups() if group is not None) if formula is not None else response
        return Case("suite: boxed", right, gold, rf"\boxed{{{inside}}}")
    return Case("suite: prose", right, gold, response, last_number=True)


def rule_verdicts(cases: Sequence[Case]) -> list[bool | None]:
    """Return the rule reward's verdicts; None: invalid."""
    from rewards.base import RewardContext
    from rewards.verifiers.math import MathReward

    verdicts: dict[int, bool | None] = {}
    for last_number in (False, True):
        reward = MathReward(MathReward.Config(accept_last_number=last_number, processes=2), RewardContext())
        some = [index for index, case in enumerate(cases) if case.last_number == last_number]
        scores = reward.judge([cases[index].response for index in some], [cases[index].gold for index in some])
        reward.close()
        verdicts |= {
            index: None if score.value is None else score.value == 1.0
            for index, score in zip(some, scores, strict=True)
        }
    return [verdicts[index] for index in range(len(cases))]


def bare_verdicts(cases: Sequence[Case]) -> list[bool | None]:
    """Return math-verify's verdicts; None: killed after BARE_SECONDS, as its own time-outs do not interrupt C code."""
    from pebble import ProcessPool

    with ProcessPool(2) as pool:
        return [
            _result(future) for future in [pool.schedule(bare_verdict, [case], timeout=BARE_SECONDS) for case in cases]
        ]


def _result(future: Any) -> bool | None:
    try:
        return bool(future.result())
    except Exception:
        return None


def bare_verdict(case: Case) -> bool:
    """Use math-verify as its documentation does; a bare gold answer is put between dollar signs, as it requires."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    golds = [case.gold] if case.kind.startswith("suite") or "\\boxed" in case.gold else [case.gold, f"${case.gold}$"]
    response = parse(case.response, targets)
    return any(verify(parse(gold, targets), response) for gold in golds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, help="folder of math-verify's source distribution")
    arguments = parser.parse_args()
    cases = table() + (suite(arguments.suite) if arguments.suite is not None else [])
    rule, bare = rule_verdicts(cases), bare_verdicts(cases)
    agree: dict[str, Counter[str]] = {"rule": Counter(), "bare": Counter()}
    too_kind: dict[str, Counter[str]] = {"rule": Counter(), "bare": Counter()}
    counts = Counter(case.kind for case in cases)
    for case, own, other in zip(cases, rule, bare, strict=True):
        for name, verdict in (("rule", own), ("bare", other)):
            agree[name][case.kind] += verdict is case.right
            too_kind[name][case.kind] += verdict is True and not case.right
        if own is not case.right:
            print(
                f"{case.kind}: gold {case.gold[-60:]!r}, response {case.response[-90:]!r}: {own}, a person {case.right}"
            )
    print("| class | cases | rule reward | bare math-verify | right though wrong: rule | bare |")
    print("|---|---|---|---|---|---|")
    for kind, count in counts.items():
        row = (kind, count, agree["rule"][kind], agree["bare"][kind], too_kind["rule"][kind], too_kind["bare"][kind])
        print("| " + " | ".join(str(cell) for cell in row) + " |")


if __name__ == "__main__":
    main()
