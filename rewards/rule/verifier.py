"""Verdicts on (answer, gold) pairs from math-verify, in processes that are killed when they hang."""

from __future__ import annotations

import importlib.util
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from rewards.rule.child import prepare, verify_pairs
from rewards.rule.math import compare_plain
from rewards.rule.processes import Failed, Processes

Pair = tuple[str, str]


class VerifierError(RuntimeError):
    """The verifier itself does not work (as opposed to: it could not judge an answer)."""


class Verifier:
    """Judges pairs of cleaned answers; remembers verdicts; owns its processes.

    >>> verifier = Verifier(processes=1, item_timeout_seconds=5.0, cache_size=1000)
    >>> verifier.verdicts([("1/2", "0.5"), ("3", "4")], budget_seconds=60.0)
    {('1/2', '0.5'): 'right', ('3', '4'): 'wrong'}
    """

    def __init__(self, processes: int, item_timeout_seconds: float, cache_size: int) -> None:
        self._processes = Processes(processes, prepare, ["math_verify", "rewards.rule.child"])
        self._item_timeout = item_timeout_seconds
        self._cache_size = cache_size
        self._cache: OrderedDict[Pair, str] = OrderedDict()

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Start the processes and prove that they judge. Raises VerifierError with the cause if they do not."""
        if importlib.util.find_spec("math_verify") is None:
            raise VerifierError("math-verify is not installed: pip install 'math-verify[antlr4_9_3]'")
        probes = {("1/2", "0.5"): "right", ("\\frac{3}{4}", "0.5"): "wrong"}
        verdicts = self._judge(list(probes), time.monotonic() + timeout_seconds, timeout_seconds)
        if verdicts != probes:
            raise VerifierError(f"math-verify does not work in its processes: expected {probes}, got {verdicts}")

    def verdicts(self, pairs: Iterable[Pair], budget_seconds: float) -> dict[Pair, str]:
        """`right`, `wrong` or the reason why there is no verdict (`timeout: ...`, `crash: ...`) for each pair.

        Takes at most about `budget_seconds`; pairs not reached by then are `timeout: ...`.
        """
        deadline = time.monotonic() + budget_seconds
        known: dict[Pair, str] = {}
        unknown: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            verdict = self._remembered(pair)
            if verdict is None:
                unknown.append(pair)
            else:
                known[pair] = verdict
        judged = self._judge(unknown, deadline, self._item_timeout) if unknown else {}
        for pair, verdict in judged.items():
            if verdict in ("right", "wrong", "gold_unparsable"):
                self._remember(pair, verdict)
        return known | judged

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def _remembered(self, pair: Pair) -> str | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
            return self._cache[pair]
        answer, gold = pair
        if answer == gold:
            return "right"
        equal = compare_plain(answer, gold)
        return None if equal is None else ("right" if equal else "wrong")

    def _remember(self, pair: Pair, verdict: str) -> None:
        self._cache[pair] = verdict
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _judge(self, pairs: Sequence[Pair], deadline: float, item_timeout: float) -> dict[Pair, str]:
        results = self._processes.map(verify_pairs, pairs, deadline, item_timeout)
        reasons = (result.reason if isinstance(result, Failed) else result for result in results)
        return dict(zip(pairs, reasons, strict=True))
