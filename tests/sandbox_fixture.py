"""A bubblewrap sandbox for tests, and programs run in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rewards.code.judge import Judge, Tests, Verdict
from rewards.services.sandbox.bubblewrap import Bubblewrap
from rewards.services.sandbox.isolation import Limits, Run

LIMITS = Limits(wall_seconds=30.0, cpu_seconds=4, memory_mib=512, processes=8, file_mib=4, output_kib=256)


def need_bubblewrap() -> None:
    """Fail, not skip: isolation that nobody tested is none."""
    if shutil.which("bwrap") is None:
        pytest.fail("these tests need bubblewrap: apt-get install -y bubblewrap")


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Bubblewrap]:
    """A started sandbox for two programs side by side."""
    need_bubblewrap()
    sandbox = Bubblewrap(LIMITS, side_by_side=2)
    sandbox.start()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="session")
def impatient() -> Iterator[Bubblewrap]:
    """A started sandbox that ends programs after two seconds."""
    need_bubblewrap()
    sandbox = Bubblewrap(replace(LIMITS, wall_seconds=2.0), side_by_side=1)
    sandbox.start()
    yield sandbox
    sandbox.close()


def soon() -> float:
    """A deadline that no test should reach."""
    return time.monotonic() + 120.0


def run(sandbox: Bubblewrap, code: str, stdin: str = "") -> Run:
    """A program's run."""
    return sandbox.run_program(code, stdin, soon())


def judge(sandbox: Bubblewrap, code: str, tests: Tests, every_test: bool = True) -> Verdict:
    """A verdict on a program."""
    return Judge(sandbox, every_test, float_tolerance=1e-6).judge(code, tests, soon())
