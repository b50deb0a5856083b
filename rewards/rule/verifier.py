"""Verdicts on (answer, gold) pairs from math-verify, in processes that are killed when they hang."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

from pebble import ProcessExpired, ProcessPool

from rewards.rule.child import prepare, verify_pairs
from rewards.rule.math import compare_plain

Pair = tuple[str, str]

PAIRS_PER_TASK = 16
"""Pairs sent to a process at once: a round trip costs about as much as a verdict."""


_BUDGET_USED_UP = "timeout: the verifier's time for this call was used up"


class VerifierError(RuntimeError):
    """The verifier itself does not work (as opposed to: it could not judge an answer)."""


class Verifier:
    """Judges pairs of cleaned answers; remembers verdicts; owns its processes.

    >>> verifier = Verifier(processes=1, item_timeout_seconds=5.0, cache_size=1000)
    >>> verifier.verdicts([("1/2", "0.5"), ("3", "4")], budget_seconds=60.0)
    {('1/2', '0.5'): 'right', ('3', '4'): 'wrong'}
    """

    def __init__(self, processes: int, item_timeout_seconds: float, cache_size: int) -> None:
        self._processes = processes
        self._item_timeout = item_timeout_seconds
        self._cache_size = cache_size
        self._cache: OrderedDict[Pair, str] = OrderedDict()
        self._pool: ProcessPool | None = None

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
        if self._pool is not None:
            self._pool.stop()
            self._pool.join(timeout=10)
            self._pool = None

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
        """Judge in batches; those of a failed batch are judged again one by one, so that only the culprit is lost."""
        batches = [tuple(pairs[start : start + PAIRS_PER_TASK]) for start in range(0, len(pairs), PAIRS_PER_TASK)]
        verdicts, failures = self._run(batches, deadline, item_timeout)
        again = [(pair,) for batch, reason in failures.items() for pair in batch if not _final(batch, reason)]
        if again:
            late_verdicts, late_failures = self._run(again, deadline, item_timeout)
            verdicts |= late_verdicts
            failures = {batch: reason for batch, reason in failures.items() if _final(batch, reason)} | late_failures
        return verdicts | {pair: reason for batch, reason in failures.items() for pair in batch}

    def _run(
        self, batches: Sequence[tuple[Pair, ...]], deadline: float, item_timeout: float
    ) -> tuple[dict[Pair, str], dict[tuple[Pair, ...], str]]:
        """Verdicts of the batches that came back, and a reason for each that did not."""
        pool = self._open_pool()
        futures = {batch: pool.schedule(verify_pairs, args=(batch,), timeout=item_timeout) for batch in batches}
        verdicts: dict[Pair, str] = {}
        failures: dict[tuple[Pair, ...], str] = {}
        for batch, future in futures.items():
            try:
                remaining = max(0.0, deadline - time.monotonic())
                verdicts.update(zip(batch, future.result(timeout=remaining), strict=True))
            except FutureTimeoutError:
                if future.done():
                    failures[batch] = f"timeout: no verdict within {item_timeout:g} s"
                else:
                    future.cancel()
                    failures[batch] = _BUDGET_USED_UP
            except ProcessExpired as error:
                failures[batch] = f"crash: the verifier process ended with exit code {error.exitcode}"
            except BrokenExecutor:  # a process died between two tasks; the pool is made anew
                failures[batch] = "crash: the verifier process died"
        return verdicts, failures

    def _open_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            # forkserver: forking the caller would copy its threads' locks, and a spawned child imports all anew.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["math_verify", "rewards.rule.child"])
            self._pool = ProcessPool(max_workers=self._processes, initializer=prepare, context=context)
        return self._pool


def _final(batch: tuple[Pair, ...], reason: str) -> bool:
    """Whether to leave it at that: a single pair that hung, or no time left."""
    return reason == _BUDGET_USED_UP or (len(batch) == 1 and reason.startswith("timeout"))
