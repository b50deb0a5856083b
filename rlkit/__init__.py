"""rlkit: RLHF training with swappable rewards. See README.md for the commands and docs/design.md for the shape."""

__version__ = "0.1.0"
