"""`python -m rlkit.sft [key=value ...]`: rlkit.train with algorithm=sft, fine-tuning on recorded responses.

On data with reference answers (data=jsonl), these are the responses; data=chat and data=responses bring their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.train import train

CHOICE = "algorithm=sft"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, like rlkit.train."""
    return exit_code(_sft, arguments, has_dry_run=True)


def _sft(arguments: list[str]) -> int:
    other = next((word for word in arguments if word.startswith("algorithm=") and word != CHOICE), None)
    if other is not None:
        raise ConfigError([ConfigIssue(other, "has no effect in rlkit.sft; use python -m rlkit.train")])
    if asks_for_help(arguments):
        print(__doc__)
    return train([CHOICE, *(word for word in arguments if word != CHOICE)])


if __name__ == "__main__":
    sys.exit(main())
