"""`trackers.json` of a run folder: each tracker's id of the run, and how much it has received."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from rlkit.trackers.base import Started

FILE = "trackers.json"


class Ledger:
    """Used by the threads of all trackers of a run. A folder that is not writable has no ledger, so a resumed run gets
    new ids."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._lock = threading.Lock()

    def id_of(self, name: str) -> str | None:
        entry = self._read().get(name)
        return entry["id"] if entry else None

    def until(self, name: str) -> float:
        """Return the Unix time of the record up to which the tracker has everything; 0: it has nothing."""
        entry = self._read().get(name)
        return float(entry["until"]) if entry else 0.0

    def lost(self, name: str) -> bool:
        """Whether the tracker lacks records after `until`, so that later ones do not advance it."""
        return bool(self._read().get(name, {}).get("lost"))

    def write(self, name: str, started: Started, until: float, lost: bool) -> None:
        with self._lock:
            entry = {"id": started.id, "where": started.where, "until": until, "lost": lost}
            entries = self._read() | {name: entry}
            aside = self._file.with_suffix(".new")
            try:
                aside.write_text(json.dumps(entries, indent=2) + "\n")
                aside.replace(self._file)
            except OSError:
                aside.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        usable = {"id", "where", "until"}
        return {name: entry for name, entry in entries.items() if isinstance(entry, dict) and usable <= entry.keys()}
