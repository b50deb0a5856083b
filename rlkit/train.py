"""`python -m rlkit.train [group=option ...] [key=value ...]`: validate the configuration, then train."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.checkpoint.resume import ResumePoint, find_resume
from rlkit.config.command import asks_for_help, exit_code, split_off_file
from rlkit.config.loading import load_config
from rlkit.config.parts import ResolvedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong configuration, 130, 143."""
    return exit_code(_train, arguments)


def _train(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        from rich.console import Console

        from rlkit.config.help import print_reference

        print_reference(Console())
        return 0
    file, overrides = split_off_file(arguments)
    resolved = load_config(overrides, file)
    point = find_resume(resolved.config)
    if resolved.config.dry_run:
        for warning in resolved.warnings:  # a run shows them itself
            print(f"rlkit: warning: {warning}", file=sys.stderr)
        _print_plan(resolved, point)
        return 0
    if point is not None and point.checkpoint.step == resolved.config.trainer.total_steps:
        print(f"rlkit: nothing left to do: {point.checkpoint.path} has all {point.checkpoint.step} steps")
        return 0
    from rlkit.run import run

    return run(resolved, point)


def _print_plan(resolved: ResolvedRun, point: ResumePoint | None) -> None:
    from rlkit.config.plan import plan

    last = ""
    for line in plan(resolved):
        print(f"{line.area if line.area != last else '':<9}{line.what:<31}{line.amount}")
        last = line.area
    if point is not None:
        print(f"{'resume':<9}{'from':<31}{point.checkpoint.path} (after {point.checkpoint.step} steps)")
        for notice in point.notices:
            print(f"{'':<9}{'':<31}{notice}")
    print("The configuration is valid; nothing was started (dry_run=true).")


if __name__ == "__main__":
    sys.exit(main())
