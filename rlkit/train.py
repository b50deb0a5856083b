"""`python -m rlkit.train [group=option ...] [key=value ...]`: validate the configuration, then train."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.checkpoint.resume import find_resume
from rlkit.config.command import HELP, asks_for_help, exit_code, print_warnings, split_off_file
from rlkit.config.help import print_help
from rlkit.config.loading import load_config
from rlkit.config.machine import refuse_missing_gpus, refuse_missing_packages
from rlkit.config.parts import ResolvedRun
from rlkit.config.report import plan, plan_text
from rlkit.experience.extras import lacking_for_training


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong configuration, 130, 143."""
    return exit_code(train, arguments, has_dry_run=True)


def train(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        return print_help([word for word in arguments if word not in HELP])
    file, overrides = split_off_file(arguments)
    resolved = load_config(overrides, file)
    point, trainer = find_resume(resolved.config), resolved.config.trainer
    if resolved.config.dry_run:
        print_warnings(resolved.warnings)  # a real run shows them itself
        if resolved.environment_class is not None:
            print_warnings(_template_doubts(resolved))
        print(plan_text([*plan(resolved), *(point.plan() if point else [])]))
        print("The configuration is valid; nothing was started (dry_run=true).")
    elif point is not None and trainer.total_epochs is None and (done := point.nothing_left(trainer.total_steps)):
        print(f"rlkit: {done}")
    else:
        refuse_missing_packages(resolved.config)
        refuse_missing_gpus(resolved.config)
        from rlkit.run import run

        return run(resolved, point)
    return 0


def _template_doubts(resolved: ResolvedRun) -> list[str]:
    if missing := lacking_for_training("torch", "transformers", "ray"):
        return [f"could not check whether episodes can be played with the model's chat template: {missing[0]}"]
    from rlkit.prompts import template_doubts

    return template_doubts(resolved)


if __name__ == "__main__":
    sys.exit(main())
