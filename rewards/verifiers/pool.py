"""What runs in a verifier process: its limits, and math-verify on pairs of extracted answers.

Judging untrusted text in processes that are killed and replaced when they hang, grow or die.

Verdicts on (answer, gold) pairs from math-verify, in processes that are killed when they hang.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import multiprocessing
import os
import re
import resource
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from rewards.verifiers.math import compare_plain

MEMORY_BYTES = 3 * 2**30
"""Address space that answers may take in one process: a memory bomb fails alone instead of taking the machine along."""


def prepare() -> None:
    """Tie this process to its parent, limit its memory and load math-verify before any deadline runs."""
    die_with_parent()
    # math-verify warns that its own time-outs are off: they are, on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    verify_pairs([("\\frac{1}{2}", "0.5")])  # builds the LaTeX grammar, which the first parse would wait for
    limit_memory()


def limit_memory() -> None:
    """Let this process take `MEMORY_BYTES` beyond what it has, and write no core dump."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """Let the kernel end this process when the parent ends, even if it was killed and this one hangs in C code.

    PR_SET_PDEATHSIG would watch the fork server, which lives until its last child is gone. The parent's end of this
    process's sentinel pipe closes with the parent, and O_ASYNC turns that into SIGIO, whose default is to end.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, fcntl.fcntl(parent.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():
        os._exit(1)


def verify_pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A verdict per (answer, gold) pair: `right`, `wrong`, `gold_unparsable`, or `exception: ...`."""
    return [_verify(answer, gold) for answer, gold in pairs]


def _verify(answer: str, gold: str) -> str:
    from math_verify import verify

    try:
        parsed_gold = _parse(gold)
        if not parsed_gold:
            return "gold_unparsable"
        # The time-outs of math-verify are signals, which need the main thread; the parent's deadline replaces them.
        right = verify(parsed_gold, _parse(answer), timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # whatever sympy does on model-written text is this pair's verdict, not a crash
        return f"exception: {type(error).__name__}: {str(error)[:200]}"
    return "right" if right else "wrong"


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list[object]:
    """What math-verify reads in an answer: as the content of a box, else as it stands. Empty: no expression.

    Remembered: all samples of a group share their gold answer, and many an answer.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    in_latex = re.sub(r"(?<!\\)%", r"\\%", answer)  # a bare % starts a comment
    for text in (f"\\boxed{{{in_latex}}}", answer):
        parsed: list[object] = parse(text, extraction_config=targets, parsing_timeout=None, raise_on_error=True)
        if any(not isinstance(expression, str) for expression in parsed):
            return parsed
    return []


Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_PER_TASK = 16
"""Items sent to a process at once: a round trip costs about as much as a verdict."""

_BUDGET_USED_UP = "timeout: the verifier's time for this call was used up"


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an item has no result: `timeout: ...` or `crash: ...`."""

    reason: str


class Processes:
    """A pool whose processes start when they are first needed.

    `prepare(*prepare_arguments)` runs in each new process before any deadline; `preload` are the modules that the
    fork server imports once for all (those of the first pool of this process count).
    """

    def __init__(
        self, count: int, prepare: Callable[..., None], preload: Sequence[str], prepare_arguments: Sequence[Any] = ()
    ) -> None:
        self._count = count
        self._prepare = prepare
        self._prepare_arguments = tuple(prepare_arguments)
        self._preload = list(preload)
        self._pool: ProcessPool | None = None

    def map(
        self,
        function: Callable[[Sequence[Item]], list[Result]],
        items: Sequence[Item],
        deadline: float,
        item_timeout: float,
    ) -> list[Result | Failed]:
        """`function` on all items, in order, at most until `deadline` (of `time.monotonic`).

        Items go in batches; those of a failed batch go again one by one, so that only the culprit is lost.
        """
        starts = range(0, len(items), ITEMS_PER_TASK)
        batches = [range(start, min(start + ITEMS_PER_TASK, len(items))) for start in starts]
        results, failures = self._run(function, items, batches, deadline, item_timeout)
        again = [range(index, index + 1) for batch, reason in failures if not _final(batch, reason) for index in batch]
        if again:
            late_results, late_failures = self._run(function, items, again, deadline, item_timeout)
            results |= late_results
            failures = [(batch, reason) for batch, reason in failures if _final(batch, reason)] + late_failures
        failed = {index: Failed(reason) for batch, reason in failures for index in batch}
        return [results[index] if index in results else failed[index] for index in range(len(items))]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join(timeout=10)
            self._pool = None

    def _run(
        self,
        function: Callable[[Sequence[Item]], list[Result]],
        items: Sequence[Item],
        batches: Sequence[range],
        deadline: float,
        item_timeout: float,
    ) -> tuple[dict[int, Result], list[tuple[range, str]]]:
        """Results of the batches that came back, and a reason for each that did not."""
        pool = self._open_pool()
        futures = [
            (batch, pool.schedule(function, args=([items[index] for index in batch],), timeout=item_timeout))
            for batch in batches
        ]
        results: dict[int, Result] = {}
        failures: list[tuple[range, str]] = []
        for batch, future in futures:
            try:
                remaining = max(0.0, deadline - time.monotonic())
                results.update(zip(batch, future.result(timeout=remaining), strict=True))
            except FutureTimeoutError:
                if future.done():
                    failures.append((batch, f"timeout: no verdict within {item_timeout:g} s"))
                else:
                    future.cancel()
                    failures.append((batch, _BUDGET_USED_UP))
            except ProcessExpired as error:
                failures.append((batch, f"crash: the verifier process ended with exit code {error.exitcode}"))
            except BrokenExecutor:  # a process died between two tasks; the pool is made anew
                failures.append((batch, "crash: the verifier process died"))
        return results, failures

    def _open_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            # forkserver: forking the caller would copy its threads' locks, and a spawned child imports all anew.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(self._preload)
            if "RLKIT_RUN_TOKEN" in os.environ:
                # Ray kills Python's tracker of semaphores with this process; by their name the janitor finds them.
                config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
                config["semprefix"] = f"/rlkit-{os.environ['RLKIT_RUN_TOKEN']}"
            self._pool = ProcessPool(
                max_workers=self._count,
                initializer=self._prepare,
                initargs=self._prepare_arguments,
                context=context,
            )
        return self._pool


def _final(batch: range, reason: str) -> bool:
    """Whether to leave it at that: a single item that hung, or no time left."""
    return reason == _BUDGET_USED_UP or (len(batch) == 1 and reason.startswith("timeout"))


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
        self._processes = Processes(processes, prepare, ["math_verify", "rewards.verifiers.pool"])
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
