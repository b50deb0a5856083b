"""Checkpoints: writing, checking and pruning them, and resuming."""
