"""`python -m rlkit.train_reward reward=NAME data.path=FILE [key=value ...]`: train a reward model offline."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code, split_off_file
from rlkit.reward_training.command import launch, load_reward_training, print_help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong configuration, 130, 143."""
    return exit_code(_train_reward, arguments, has_dry_run=True)


def _train_reward(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        print_help()
        return 0
    file, overrides = split_off_file(arguments)
    resolved = load_reward_training(overrides, file)
    if resolved.config.dry_run:
        print(resolved.text())
        print("The configuration is valid; nothing was started (dry_run=true).")
        return 0
    return launch(resolved)


if __name__ == "__main__":
    sys.exit(main())
