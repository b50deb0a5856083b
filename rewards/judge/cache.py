"""Verdicts remembered by content: in memory, and on disk if asked for (shared by workers, kept between runs)."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import OrderedDict
from pathlib import Path
from typing import Any

from rewards.judge.verdicts import Verdict

LOCK_SECONDS = 10.0


class VerdictCache:
    """The least recently used verdicts are dropped from memory first; none are dropped from disk."""

    def __init__(self, size: int, file: Path | None) -> None:
        self._size = size
        self._memory: OrderedDict[str, Verdict] = OrderedDict()
        self._disk: sqlite3.Connection | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._disk = sqlite3.connect(file, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
            self._disk.execute("pragma journal_mode=wal")
            self._disk.execute("create table if not exists verdicts (key text primary key, verdict text not null)")

    def get(self, key: str) -> Verdict | None:
        found = self._memory.get(key)
        if found is None and self._disk is not None:
            row = self._disk.execute("select verdict from verdicts where key = ?", (key,)).fetchone()
            if row is not None:
                values, reasoning = json.loads(row[0])
                found = Verdict(tuple(values), reasoning)
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, key: str, verdict: Verdict) -> None:
        self._remember(key, verdict)
        if self._disk is not None:
            text = json.dumps([verdict.values, verdict.reasoning])
            self._disk.execute("insert or replace into verdicts values (?, ?)", (key, text))

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _remember(self, key: str, verdict: Verdict) -> None:
        self._memory[key] = verdict
        self._memory.move_to_end(key)
        if len(self._memory) > self._size:
            self._memory.popitem(last=False)


def key_of(*content: Any) -> str:
    """Equal for equal content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
