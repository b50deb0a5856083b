"""`python -m rlkit.rescore RUN reward=NAME [key=value ...]`: a run's recorded answers under another reward.

python -m rlkit.rescore runs/x reward=rule
python -m rlkit.rescore runs/x reward=polar name=polar2 device=cuda

Writes RUN/rescored/NAME.jsonl and prints both rewards side by side. The other keys are `name`, `device`, `threads`,
`seed` and `dry_run`; rewards take those of rlkit.train (python -m rlkit.train --help reward).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code, split_off_subject
from rlkit.config.messages import ConfigError, ConfigIssue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong configuration, 130."""
    return exit_code(_rescore, arguments, has_dry_run=True)


def _rescore(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        print(__doc__)
        return 0
    from rlkit.assessment.rescoring import load_rescoring, rescore

    run, options = split_off_subject(arguments)
    if run is None:
        raise ConfigError([ConfigIssue("rescore", "no run given: python -m rlkit.rescore RUN reward=NAME")])
    rescoring = load_rescoring(run, options)
    if rescoring.config.dry_run:
        print(f"{rescoring.file} would be written; nothing was started (dry_run=true).")
        return 0
    print(rescore(rescoring))
    print(f"\n{rescoring.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
