"""Folders for temporary files of a process."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

_REMOVE_AT_THE_END = ["/bin/sh", "-c", 'read _; exec /bin/rm -rf -- "$0"']
"""Removes a folder when its standard input closes, even if this process is killed, as often happens."""


class ScratchFolder:
    """A new folder that is removed when this process ends, however that happens."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._remover = subprocess.Popen(
            [*_REMOVE_AT_THE_END, str(self.path)], stdin=subprocess.PIPE, env={}, start_new_session=True
        )

    def remove(self) -> None:
        self._remover.communicate()
