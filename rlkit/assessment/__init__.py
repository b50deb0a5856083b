"""Evaluation of a finished model or run: `rlkit.evaluate`, `generate`, `rescore` and `chat`."""
