"""Made-up run folders, and caches of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import make_evaluation, make_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes of a test of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`main` (a reward that is fooled, tokens, rescored), `older` (before rows had the newer keys) and two evaluations.
    Tests leave them as they are."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "main", 1000, rescored=True)
    make_run(root / "older", 500, seed=3, best_worst=True, tokens=False)
    make_evaluation(root / "first", accuracy=0.4)
    make_evaluation(root / "last", accuracy=0.8)
    return root
