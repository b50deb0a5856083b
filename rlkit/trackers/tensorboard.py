"""Writes scalars and sample texts as TensorBoard events, without importing torch or TensorFlow into the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.trackers.base import RunTracker, Started, Status, TrackerConfig
from rlkit.trackers.rows import prompt_text, response_text

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

_FLUSH_SECONDS = 5


class TensorBoardWriter:
    """Appends to an event file in `folder`, which the first write creates."""

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        """`first_step` above 1: TensorBoard drops the steps from there on in the folder's earlier files."""
        self._folder, self._first_step = folder, first_step
        self._writer: EventFileWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(step, summary, wall_time)

    def text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        indented = "\n".join("    " + line for line in text.splitlines())
        self._add(step, text_pb(tag, indented))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, step: int, summary: object, wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder), flush_secs=_FLUSH_SECONDS)
            if self._first_step > 1:
                start = SessionLog(status=SessionLog.START)
                self._writer.add_event(Event(wall_time=time.time(), step=self._first_step, session_log=start))
        now = time.time() if wall_time is None else wall_time
        self._writer.add_event(Event(wall_time=now, step=step, summary=summary))


class TensorBoardConfig(TrackerConfig):
    kind: str = "tensorboard"


class TensorBoard(RunTracker):
    """Writes `tensorboard/` of the run folder."""

    Config = TensorBoardConfig
    modules = ("tensorboard.summary.writer.event_file_writer", "tensorboard.plugins.text.summary_v2")

    def start(
        self, config: Mapping[str, Any], name: str, folder: Path, resume_id: str | None, first_step: int
    ) -> Started:
        self._writer = TensorBoardWriter(folder / "tensorboard", first_step)
        return Started(name)

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._writer.scalars(step, values, time)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        shown = {str(row.get("rank")): row for row in reversed(rows)}  # of the first group
        for rank, row in shown.items():
            text = f"{prompt_text(row)}\n\n{response_text(row)}\n\nreward {row.get('reward')}"
            self._writer.text(step, f"samples/{rank}", text)

    def close(self, status: Status) -> None:
        self._writer.close()
