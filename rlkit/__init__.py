"""rlkit: RLHF training with swappable rewards. See README.md for the commands and docs/design.md for the design."""

__version__ = "0.1.0"
