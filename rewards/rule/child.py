"""What runs in a verifier process: its limits, and math-verify on pairs of extracted answers."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

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
