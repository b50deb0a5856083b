"""Diagnostics watch a run: they look at every finished step, warn, and may end the run."""
