"""Rewards over HTTP: `rlkit.serve`."""
