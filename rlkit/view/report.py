"""A run as one HTML file: the page with the results of its queries embedded, keyed by their addresses.

`<script type="application/gzip" id="report">` holds {"samples", "kept", "results": {ADDRESS: RESULT}} as compressed
JSON in base64: a fifth to a tenth of the size, and nothing in it can end its element.
Whole groups are kept while there is room: first suspects of the triage, then groups with token signals, then groups
evenly spread over the steps. Metrics of long runs are thinned. The page shows what is not kept as absent, not empty.
"""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from copy import copy
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlkit.experience import UserError
from rlkit.view.guard import page_policy
from rlkit.view.http import PAGE, page_text
from rlkit.view.query import address, ask
from rlkit.view.runs import Run, Runs
from rlkit.view.samples import summaries

HISTOGRAMS = ("reward", "length")
DISTRIBUTIONS = ("reward", "length", "entropy", "staleness", "advantage")
SCATTERED = ("length", "advantage", "staleness", "correct")
LOGS = ("config.yaml", "summary.json", "logs/console.log")
TAIL_BYTES = 65536
METRICS_SHARE = 0.3
"""Largest share of the file for metrics; if they need more, only every n-th step is kept."""
SLACK = 4000
"""Bytes reserved for the rest of the page, and for data that compress less well in another order."""
GZIP = 31
"""zlib's `wbits` for the gzip format."""
DIGITS = 6
"""Significant digits of numbers in lists."""
_UNREAD = ("token_ids",)
"""Fields of rows that the page does not use."""

Group = tuple[int, str]
Results = dict[str, Any]


def write(folder: str | Path, out: Path | None, max_mb: float) -> list[str]:
    """Write the report; return lines about it for the user. Raises UserError if there is no page or no run, or if
    `max_mb` is too small."""
    if not PAGE.is_file():
        raise UserError("this installation has no page (rlkit/view/page.html is missing), so no report can be made")
    runs = Runs([folder])
    found = runs.all()
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} runs: name one of them, like {found[0].path}")
    (run,) = found
    run.index.follow()
    page = page_text()
    room = int(max_mb * 1e6) - len(page.encode()) - SLACK
    report = _Report(runs, run, room)
    if report.size > room:
        least = (int(max_mb * 1e6) - room + report.size) / 1e6
        raise UserError(f"--max-mb {max_mb:g}: too small; even without samples the report takes {least:.2f}")
    kept, total = report.fill()
    file = out or Path(f"{run.path.name}.html")
    content = {"samples": total, "kept": kept, "results": report.results}
    try:
        file.write_text(with_report(page, content, run.id), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written: {error.strerror or error}") from error
    thinned = "" if kept == total else f" (--max-mb {max_mb:g} leaves no room for more)"
    return [f"{file}: {file.stat().st_size / 1e6:.1f} MB, {kept} of {total} samples{thinned}"]


def with_report(page: str, content: dict[str, Any], title: str) -> str:
    """Return the page with its own policy, a title, and the data in a block that browsers do not execute."""
    allowed = escape(page_policy(page, connect="'none'"))
    policy = f'<meta http-equiv="Content-Security-Policy" content="{allowed}" />'
    packed = zlib.compress(_json(content), wbits=GZIP)
    data = f'<script type="application/gzip" id="report">{b64encode(packed).decode()}</script>'
    page = re.sub(r"<title>.*?</title>", lambda _: f"<title>{escape(title)} - rlkit</title>", page, count=1)
    page = re.sub(r"<head>", lambda match: f"{match.group()}\n    {policy}", page, count=1)
    return re.sub(r"</body>", lambda match: f"{data}\n{match.group()}", page, count=1)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class _Packed:
    """The size, in bytes of base64, of values that are compressed one after another."""

    def __init__(self) -> None:
        self._stream, self._written, self.size = zlib.compressobj(wbits=GZIP), 0, 0

    def with_value(self, value: Any) -> _Packed:
        """Return the size with another value appended; `self` does not change."""
        longer = copy(self)
        longer._stream = self._stream.copy()
        longer._written += len(longer._stream.compress(_json(value)))
        longer.size = (longer._written + len(longer._stream.copy().flush())) * 4 // 3
        return longer


class _Report:
    """The results collected so far, and their size in bytes."""

    def __init__(self, runs: Runs, run: Run, room: int) -> None:
        self._runs, self._run, self._room = runs, run, room
        self._asked = {"run": run.id}
        self.results: dict[str, Any] = {}
        self._packed = _Packed()
        self._keep(self._result("runs", {}) | self._result("config", {"runs": run.id}))
        for name in ("metrics", "overview", "triage", "time", "files", *(["results"] if run.is_evaluation else [])):
            self._keep(self._result(name))
        for key in HISTOGRAMS:
            self._keep(self._result("histogram", self._asked | {"key": key, "bins": 40}))
        for key in DISTRIBUTIONS:
            self._keep(self._result("distribution", self._asked | {"key": key, "bins": 30}))
        for key in SCATTERED:
            self._keep(self._result("scatter", self._asked | {"x": key, "y": "reward"}))
        for name in run.files().keys() & LOGS:
            self._keep(self._result("log", self._asked | {"path": name, "tail_bytes": TAIL_BYTES}))
        self._keep(self._thinned_metrics())

    @property
    def size(self) -> int:
        return self._packed.size

    def _thinned_metrics(self) -> Results:
        found = self._result("metrics", self._asked | {"names": "*"})
        (result,) = found.values()
        n = max(1, -(-_Packed().with_value(result).size // max(1, int(METRICS_SHARE * self._room))))
        training = result["training"]
        for columns in (training, training["values"]):
            for name in columns.keys() - {"values"}:
                columns[name] = columns[name][::-1][::n][::-1]  # keeps the last
        return found

    def fill(self) -> tuple[int, int]:
        """Keep groups while there is room; return the numbers of kept samples and of all samples of the run."""
        rows: list[int] = []
        listed = _Packed()
        for step, group in self._groups():
            results = self._result("group", self._asked | {"step": step, "group": group})
            ids = [row["id"] for row in next(iter(results.values()))["rows"]]
            for one in ids:
                found = self._result("sample", self._asked | {"id": one})
                results |= found
                if next(iter(found.values()))["tokens"]:
                    results |= self._result("tokens", self._asked | {"id": one})
            longer = self._packed.with_value(results)
            listed = listed.with_value([summary.model_dump(mode="json") for summary in summaries(self._run, ids)])
            if longer.size + listed.size > self._room:
                break
            self._packed = longer
            self.results |= results
            rows += ids
        (total,) = self._run.index.all("SELECT count(*) FROM rows")
        shown = [summary.model_dump(mode="json") for summary in summaries(self._run, sorted(rows))]
        self._keep({address("/api/samples", self._asked): {"total": total, "rows": shown, "next": None}})
        return len(rows), total

    def _groups(self) -> Iterator[Group]:
        """Yield each group once, the most interesting first."""
        findings = self.results[address("/api/triage", self._asked)]["findings"]
        suspects = [[(row["step"], row["group_id"]) for row in finding["rows"]] for finding in findings]
        recorded = self._run.index.all("SELECT DISTINCT step, group_id FROM token_rows ORDER BY step, group_id")
        every = self._run.index.all("SELECT step, group_id FROM rows GROUP BY step, group_id ORDER BY min(id)")
        rounds = [group for row in zip_longest(*suspects) for group in row if group is not None]
        known = set(every)
        ordered = [*every[-1:], *rounds, *_spread(recorded), *_spread(every)]
        yield from dict.fromkeys(group for group in ordered if group in known)

    def _result(self, name: str, asked: dict[str, Any] | None = None) -> Results:
        """Return {address: result}."""
        path, asked = f"/api/{name}", self._asked if asked is None else asked
        return {address(path, asked): _lean(ask(self._runs, path, asked).model_dump(mode="json"))}

    def _keep(self, results: Results) -> None:
        self.results |= results
        self._packed = self._packed.with_value(results)


def _spread(groups: Sequence[Group]) -> list[Group]:
    """Order groups so that any first part of them is evenly spread over all."""
    order = sorted(range(len(groups)), key=lambda i: int(f"{i:032b}"[::-1], 2))
    return [groups[i] for i in order]


def _lean(value: Any) -> Any:
    """Drop unused fields of rows, round numbers in lists, and replace numbers that JSON does not support."""
    if isinstance(value, dict):
        return {key: _lean(own) for key, own in value.items() if key not in _UNREAD}
    if isinstance(value, list):
        return [_rounded(own) if isinstance(own, float) else _lean(own) for own in value]
    return _rounded(value, 17) if isinstance(value, float) else value


def _rounded(value: float, digits: int = DIGITS) -> float | None:
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.{digits}g}")
