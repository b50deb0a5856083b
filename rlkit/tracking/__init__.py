"""What a run writes and shows: the run folder, metrics, samples, TensorBoard, and the console.

The trainer talks to `Tracker` alone; actors call `actor_logging` first of all.
"""

from rlkit.tracking.logs import actor_logging
from rlkit.tracking.run_folder import RunFolder, RunFolderError
from rlkit.tracking.tracker import Tracker

__all__ = ["RunFolder", "RunFolderError", "Tracker", "actor_logging"]
