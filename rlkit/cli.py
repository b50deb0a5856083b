"""The console script `rlkit`: `rlkit train ...` is `python -m rlkit.train ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import rlkit
from rlkit.config.command import HELP, exit_code
from rlkit.config.messages import did_you_mean
from rlkit.config.vocabulary import about_command
from rlkit.experience.names import nearest

COMMANDS = {
    "train": ("rlkit.train", "train a policy by reinforcement learning"),
    "submit": ("rlkit.submit", "train as a job on a Ray cluster; follow, list and stop such jobs"),
    "serve": ("rlkit.serve", "serve a reward over HTTP, for `reward=remote` of a run elsewhere"),
    "sft": ("rlkit.sft", "fine-tune a model on reference answers"),
    "evaluate": (
        "rlkit.evaluate",
        "score a model's answers, with intervals: over checkpoints, from a server, or recorded",
    ),
    "chat": ("rlkit.chat", "talk to a checkpoint in the terminal"),
    "rescore": ("rlkit.rescore", "score a run's recorded answers with another reward, side by side"),
    "generate": ("rlkit.generate", "generate answers to the questions of any data"),
    "train-reward": ("rlkit.train_reward", "train or evaluate a reward model on data of your own"),
    "sync": ("rlkit.sync", "send what a run folder holds to a tracker: W&B, MLflow, ..."),
    "export": ("rlkit.export", "write the samples of a run for another program's viewer"),
    "view": ("rlkit.view.__main__", "look at runs: a page in the browser, while they train or afterwards"),
    "report": ("rlkit.report", "the same page as one file, with a run in it"),
    "doctor": ("rlkit.doctor.__main__", "report what this machine and this installation have and lack"),
    "convert-polar": ("rewards.polar.convert", "convert released POLAR checkpoints, exactly, and back"),
}
"""Name -> (module with a `main(arguments) -> int`, what it does)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named command; returns its exit code, 2 for an unknown one."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] == "--version":
        print(f"rlkit {rlkit.__version__}")
        return 0
    if not given or given[0] in HELP:
        print("usage: rlkit COMMAND [arguments]; rlkit COMMAND --help shows more\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<18}{text}")
        return 0 if given else 2
    name = given[0].replace("_", "-")
    if name not in COMMANDS:
        listed = f"commands: {', '.join(COMMANDS)}"
        wish = None if nearest(name, COMMANDS) else about_command(name)
        if given[0].startswith("-"):
            option = nearest(given[0], ("--help", "--version"))
            wish = f"did you mean {option}?" if option else f"a command comes first, like rlkit train {given[0]}"
        instead = f"{wish}; {listed}" if wish else did_you_mean(name, COMMANDS)
        print(f"rlkit: {given[0]}: no such command; {instead}", file=sys.stderr)
        return 2
    return exit_code(lambda words: int(importlib.import_module(COMMANDS[name][0]).main(words)), given[1:])


if __name__ == "__main__":
    sys.exit(main())
