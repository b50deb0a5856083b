"""`reward=code`: runs the response's Python against the row's tests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.code.judge import BadTests, Judge, Tests, last_python_block, read_tests
from rewards.services.sandbox import Isolation, SandboxOptions, Unavailable
from rlkit.experience import Group, GroupScores, Prompt, Score
from rlkit.experience.texts import encodable


class CodeReward(Reward):
    """1 if the program in the response passes all tests of its row, else 0; or the share of tests passed.

    A program that crashes, hangs or exceeds a limit scores 0. A broken sandbox or unusable tests make the sample
    invalid. Components: `correct`, `passed` (a share; tests on standard input stop at the first failure, or with `soft`
    at the first time-out) and `timeout`.
    """

    class Config(RewardConfig, SandboxOptions):
        tests_column: str = "tests"
        """Data column with the tests: a list of assert statements, Python code that defines `check`, or
        `{"inputs": [...], "outputs": [...], "fn_name": ...}` (also as JSON)."""
        setup_column: str | None = None
        """Column with Python code that runs before the tests and the program (MBPP's `test_imports`)."""
        prompt_is_setup: bool = False
        """The question is Python code and runs before the tests and the program (HumanEval)."""
        entry_point_column: str | None = None
        """Column with the name of the function under test; the tests are then `check(<name>)` (HumanEval)."""
        require_fence: bool = True
        """A response without a fenced code block scores 0. false: its whole text is then the program."""
        soft: bool = False
        """Score the share of tests passed instead of 1 or 0."""
        float_tolerance: float = Field(default=1e-6, ge=0)
        """Tolerance, relative or absolute, when the expected value is a decimal fraction."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        columns = (config.tests_column, config.setup_column, config.entry_point_column)
        return RewardTraits(columns=tuple(column for column in columns if column is not None), uses_gpu=False)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """bubblewrap: run one program, and one that tries to escape. http: only validate the options."""
        sandbox = config.sandbox()
        try:
            sandbox.check()
        except Unavailable as error:
            return [str(error)]
        finally:
            sandbox.close()
        return []

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._sandbox: Isolation | None = None
        self._threads: ThreadPoolExecutor | None = None

    def start(self) -> None:
        self._open()

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        judge, threads = self._open()
        # Keep a fifth of the call's deadline for everything else, so that this gives up before it is killed.
        deadline = time.monotonic() + 0.8 * self.config.timeout_seconds
        pending = [
            {text: threads.submit(self._score, judge, text, group.prompt, deadline) for text in _texts(group)}
            for group in groups
        ]
        return [
            GroupScores(tuple(futures[sample.text].result() for sample in group.samples))
            for group, futures in zip(groups, pending, strict=True)
        ]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def _score(self, judge: Judge, text: str, prompt: Prompt, deadline: float) -> Score:
        code = last_python_block(text)
        if code is None and self.config.require_fence:
            return Score(0.0, components={"correct": 0.0, "passed": 0.0, "timeout": 0.0}, trace="no code block")
        try:
            verdict = judge.judge(text if code is None else code, self._tests(prompt), deadline)
        except BadTests as error:
            return Score.invalid(encodable(f"bad_tests: {error}"))
        except Unavailable as error:
            return Score.invalid(encodable(f"sandbox: {error}"))
        except TimeoutError:
            return Score.invalid("timeout: the time for this call of the reward was used up")
        correct, share = float(verdict.passed == verdict.total), verdict.passed / verdict.total
        components = {"correct": correct, "passed": share, "timeout": float(verdict.timeout)}
        return Score(share if self.config.soft else correct, components=components, trace=encodable(verdict.trace))

    def _tests(self, prompt: Prompt) -> Tests:
        config = self.config
        setup, entry_point = (
            None if column is None else prompt.columns.get(column)
            for column in (config.setup_column, config.entry_point_column)
        )
        question = prompt.messages[-1].content if config.prompt_is_setup else ""
        return read_tests(prompt.columns.get(config.tests_column), setup, entry_point, question)

    def _open(self) -> tuple[Judge, ThreadPoolExecutor]:
        if self._sandbox is None:
            self._sandbox = self.config.sandbox()
            self._sandbox.start()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.config.processes, thread_name_prefix="code")
        return Judge(self._sandbox, self.config.soft, self.config.float_tolerance), self._threads


def _texts(group: Group) -> dict[str, None]:
    return dict.fromkeys(sample.text for sample in group.samples)
