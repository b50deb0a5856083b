"""Judges untrusted text in processes that are replaced when they hang, grow or die."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rlkit.cluster.processes import die_with_parent
from rlkit.experience import Group, GroupScores, Prompt, Score
from rlkit.experience.section import Deadline

if TYPE_CHECKING:
    from pebble import ProcessPool

MEMORY_BYTES = 3 * 2**30
ITEMS_PER_TASK = 16
"""A round trip costs about as much as a verdict."""

MAX_TRACE_CHARACTERS = 400
_NO_VERDICT = "timeout: no verdict"
_ENDED = "crash: the verifier process ended"
_BUDGET_USED_UP = "timeout: the verifier's time for this call was used up"

Item = TypeVar("Item")
Result = TypeVar("Result")


def limit_memory() -> None:
    """Limit this process to its present size plus `MEMORY_BYTES`, and forbid core dumps."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an item has no result: `timeout: ...` or `crash: ...`."""

    reason: str

    @property
    def by_its_item(self) -> bool:
        """Whether the item itself hung or killed the process; other failures are the machine's."""
        return self.reason.startswith((_NO_VERDICT, _ENDED))


class Processes:
    """A pool whose processes start on first use.

    `prepare(*prepare_arguments)` runs in each process before any deadline starts. The fork server imports `preload`
    once (that of the first pool in this process).
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
        """Apply `function` to all items, in order, until `deadline` (of `time.monotonic`).

        The items of a failed batch are retried one by one.
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
        from pebble import ProcessExpired  # here, because the configuration layer imports this module

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
                    failures.append((batch, f"{_NO_VERDICT} within {item_timeout:g} s"))
                else:
                    future.cancel()
                    failures.append((batch, _BUDGET_USED_UP))
            except ProcessExpired as error:
                failures.append((batch, f"{_ENDED} with exit code {error.exitcode}"))
            except BrokenExecutor:  # a process died between two tasks; the next call opens another pool
                failures.append((batch, "crash: the verifier process died"))
        return results, failures

    def _open_pool(self) -> ProcessPool:
        from pebble import ProcessPool

        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            # forkserver: a fork of the caller would copy its threads' locks, and a spawned child imports all again.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(self._preload)
            if "RLKIT_RUN_TOKEN" in os.environ:
                # Ray kills Python's semaphore tracker together with this process; the janitor finds them by name.
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
    return reason == _BUDGET_USED_UP or (len(batch) == 1 and reason.startswith("timeout"))


class TextRuleConfig(RewardConfig):
    item_timeout_seconds: Deadline = 5.0
    """Deadline of one verdict. When it passes, the process is replaced; if other responses can be judged, this one is
    at fault."""
    processes: int = Field(default=1, ge=1)
    """Verifier processes per worker."""


class CannotJudgeError(Exception):
    """The prompt lacks something that the rule needs, or it is unusable: `class: details`."""


class TextRule(Reward):
    """Judges a response only by its text and its prompt.

    A text on which `judge` hangs, dies or raises gets the score of an empty one (`worst`) if that can be judged, so
    that a policy cannot avoid a verdict by what it writes. If not, the sample is invalid.
    """

    Config = TextRuleConfig
    imports: ClassVar[tuple[str, ...]] = ()
    """Modules that the processes import before any deadline starts, in addition to the rule's own."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(uses_gpu=False)

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._processes: Processes | None = None

    @abstractmethod
    def task(self, prompt: Prompt) -> Any:
        """Return plain data for `judge`. Raise CannotJudgeError."""

    @staticmethod
    @abstractmethod
    def judge(config: Any, task: Any, text: str, /) -> Score: ...

    @classmethod
    def worst(cls, config: Any, task: Any) -> Score:
        return cls.judge(config, task, "")

    def start(self) -> None:
        (answer,) = self._open().map(_echo, ["ready"], time.monotonic() + 60.0, 60.0)
        if isinstance(answer, Failed):
            raise RuntimeError(f"the verifier processes of {type(self).__name__} do not start: {answer.reason}")

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        scores: list[list[Score | None]] = []
        indices: list[tuple[int, int]] = []
        items: list[tuple[Any, str]] = []
        for row, group in enumerate(groups):
            try:
                task = self.task(group.prompt)
            except CannotJudgeError as error:
                scores.append([Score.invalid(str(error))] * len(group.samples))
                continue
            scores.append([None] * len(group.samples))
            indices += [(row, column) for column in range(len(group.samples))]
            items += [(task, sample.text) for sample in group.samples]
        for (row, column), score in zip(indices, self._judge_all(items), strict=True):
            scores[row][column] = score
        return [GroupScores(tuple(score for score in row if score is not None)) for row in scores]

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()

    def _judge_all(self, items: Sequence[tuple[Any, str]]) -> list[Score]:
        if not items:
            return []
        # Keep a fifth of the call's deadline for everything else, so that the processes give up before it passes.
        deadline = time.monotonic() + 0.8 * self.config.timeout_seconds
        function = partial(_judge_texts, type(self), self.config)
        results = self._open().map(function, items, deadline, self.config.item_timeout_seconds)
        failures = {index: result for index, result in enumerate(results) if isinstance(result, Failed)}
        culprits = [index for index, failed in failures.items() if failed.by_its_item]
        scores = [Score.invalid(result.reason) if isinstance(result, Failed) else result for result in results]
        if culprits:
            worst = partial(_judge_worst, type(self), self.config)
            tasks = [(items[index][0], failures[index].reason) for index in culprits]
            blamed = self._open().map(worst, tasks, deadline, self.config.item_timeout_seconds)
            for index, score in zip(culprits, blamed, strict=True):
                if not isinstance(score, Failed):
                    scores[index] = score
        return scores

    def _open(self) -> Processes:
        if self._processes is None:
            modules = [type(self).__module__, *self.imports]
            self._processes = Processes(self.config.processes, _prepare, modules, modules)
        return self._processes


def excerpt(text: str) -> str:
    """Return the text quoted, with the middle cut out if it is longer than MAX_TRACE_CHARACTERS."""
    if len(text) > MAX_TRACE_CHARACTERS:
        half = MAX_TRACE_CHARACTERS // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return repr(text)


def column_value(prompt: Prompt, column: str) -> Any:
    """Return a column's value; a text that looks like JSON is parsed. Raise CannotJudgeError if there is none."""
    value = prompt.columns.get(column)
    if value is None:
        raise CannotJudgeError(f"no_column: the prompt has nothing in column {column!r}")
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise CannotJudgeError(f"bad_column: column {column!r} looks like JSON but is not: {error}") from error
    return value


def _prepare(*modules: str) -> None:
    die_with_parent()
    for module in modules:
        importlib.import_module(module)
    limit_memory()


def _echo(items: Sequence[str]) -> list[str]:
    return list(items)


def _judge_texts(kind: type[TextRule], config: Any, items: Sequence[tuple[Any, str]]) -> list[Score]:
    return [_judge_text(kind, config, task, text) for task, text in items]


def _judge_text(kind: type[TextRule], config: Any, task: Any, text: str) -> Score:
    try:
        return kind.judge(config, task, text)
    except CannotJudgeError as error:
        return Score.invalid(str(error))
    except Exception as error:  # a parser's failure on model-written text is this sample's verdict, not a crash
        return _worst(kind, config, task, f"exception: {type(error).__name__}: {str(error)[:200]}")


def _judge_worst(kind: type[TextRule], config: Any, items: Sequence[tuple[Any, str]]) -> list[Score]:
    return [_worst(kind, config, task, reason) for task, reason in items]


def _worst(kind: type[TextRule], config: Any, task: Any, reason: str) -> Score:
    try:
        return replace(kind.worst(config, task), trace=f"cannot be judged ({reason}), so judged as an empty response")
    except Exception:  # so this text is not at fault
        return Score.invalid(reason)
