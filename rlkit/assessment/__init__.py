"""What a finished model, or a finished run, is worth: `rlkit.evaluate`, `generate`, `rescore` and `chat`."""
