"""`python -m rlkit.train_reward reward=NAME data.path=FILE [key=value ...]`: train a reward model offline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rlkit.config.problems import ConfigError
from rlkit.reward_training.load import load_reward_training
from rlkit.train import CONFIG_ERROR, INTERRUPTED, split_off_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong configuration, 130, 143."""
    try:
        return _train_reward(list(sys.argv[1:] if arguments is None else arguments))
    except ConfigError as error:
        print(error.report(), file=sys.stderr)
        return CONFIG_ERROR
    except KeyboardInterrupt:
        print("rlkit: interrupted", file=sys.stderr)
        return INTERRUPTED


def _train_reward(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        from rich.console import Console

        from rlkit.reward_training.reference import print_reference

        print_reference(Console())
        return 0
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # a console script does not look for the user's modules here
    file, overrides = split_off_file(arguments)
    resolved = load_reward_training(overrides, file)
    if resolved.config.dry_run:
        print(resolved.text())
        print("The configuration is valid; nothing was started (dry_run=true).")
        return 0
    from rlkit.reward_training.launch import launch

    return launch(resolved)


if __name__ == "__main__":
    sys.exit(main())
