"""`python -m rlkit.submit cluster.address=URL [what rlkit.train takes]`: train as a job on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    from rlkit.jobs.submission import run_command

    return exit_code(run_command, arguments, has_dry_run=True)


if __name__ == "__main__":
    sys.exit(main())
