"""Scalars and sample texts as TensorBoard events, without importing torch or TensorFlow into the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

_FLUSH_SECONDS = 5


class TensorBoardWriter:
    """Appends to an event file in `folder`, created by the first write."""

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        """`first_step` above 1: TensorBoard drops later steps of the folder's earlier files."""
        self._folder, self._first_step = folder, first_step
        self._writer: EventFileWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        indented = "\n".join("    " + line for line in text.splitlines())
        self._add(step, text_pb(tag, indented))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, step: int, summary: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder), flush_secs=_FLUSH_SECONDS)
            if self._first_step > 1:
                start = SessionLog(status=SessionLog.START)
                self._writer.add_event(Event(wall_time=time.time(), step=self._first_step, session_log=start))
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
