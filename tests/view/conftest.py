"""A browser, made-up runs, a server that shows them, and a reader of its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_fixture import Reader, chromium, reading, serving
from synthetic_run import make_all

ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6, "questions": 64}
RESULTS = {
    "schema": 1,
    "judge": "verifier=math",
    "lines": [
        {
            "step": 0, "decoding": "sampled", "kind": "heldout", "mean": ESTIMATE, "of_k": {"pass@": {"8": ESTIMATE}},
            "answers": 512, "wrong": 256, "left_out": 0, "length": ESTIMATE, "truncated_share": 0.0, "reward": None,
        }
    ],
    "comparisons": [
        {
            "first": "step 0", "second": "step 60", "difference": ESTIMATE, "better": 40, "worse": 8,
            "sign_test_p": 1e-4, "winner": "step 60",
        }
    ],
}  # fmt: skip
"""As `python -m rlkit.evaluate` writes them."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_all(folder, 2000, tokens=True)
    (folder / "evaluation_first" / "results.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.fixture(scope="module")
def address(browser: Any, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(runs, cache=tmp_path_factory.mktemp("cache")) as link:
        yield link


@pytest.fixture
def reader(browser: Any, address: str) -> Iterator[Reader]:
    with reading(browser, address) as opened:
        yield opened
