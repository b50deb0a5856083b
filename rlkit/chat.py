"""`rlkit chat CHECKPOINT [key=value ...]`: chat with a checkpoint, a run's newest checkpoint, or any model folder.

rlkit chat runs/x                                    the newest checkpoint
rlkit chat runs/x/checkpoints/step_000060 temperature=0.6 system="Answer briefly."
rlkit chat embedded:policy
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code, split_off_subject
from rlkit.config.messages import ConfigError, ConfigIssue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong option."""
    return exit_code(_chat, arguments)


def _chat(arguments: list[str]) -> int:
    from rlkit.assessment.chat import HELP, Chat, ChatConfig, policy_folder, read_options, talk

    if asks_for_help(arguments):
        from rich.console import Console

        from rlkit.config.help import print_section
        from rlkit.config.messages import all_fields

        print(__doc__)
        print_section(Console(), "options", "", all_fields(ChatConfig))
        print(f"\nWhile it runs:\n{HELP}")
        return 0
    named, options = split_off_subject(arguments)
    if named is None:
        raise ConfigError([ConfigIssue("chat", "no model given: rlkit chat CHECKPOINT [key=value ...]")])
    config, folder = read_options(options), policy_folder(named)
    talk(Chat(folder, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
