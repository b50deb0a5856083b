"""`python -m rlkit.sft [key=value ...]`: supervised fine-tuning on a data source's reference answers.

Keys are those of rlkit.train. A step takes `trainer.prompts_per_step` problems, each with one reference, drawn by
`seed`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code
from rlkit.reward_training.sft import USED, fine_tune, load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for unusable data, 2 for a wrong configuration, 130."""
    return exit_code(_sft, arguments)


def _sft(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        print(__doc__)
        for key, text in USED.items():
            print(f"  {key:<30}{text}")
        return 0
    resolved = load(arguments)
    if resolved.config.dry_run:
        print("The configuration is valid; nothing was started (dry_run=true).")
        return 0
    return fine_tune(resolved)


if __name__ == "__main__":
    sys.exit(main())
