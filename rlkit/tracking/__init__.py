"""What a run writes and shows. The trainer uses only `Tracker`; actors first call `actor_logging`."""

from rlkit.tracking.logs import actor_logging
from rlkit.tracking.run_folder import RunFolder, RunFolderError
from rlkit.tracking.tracker import Tracker

__all__ = ["RunFolder", "RunFolderError", "Tracker", "actor_logging"]
