"""`python -m rlkit.report RUN`: a run as one HTML file, to keep or to send; it needs no server and no network.

python -m rlkit.report runs/today
python -m rlkit.report runs/today --out today.html --max-mb 5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlkit.config.command import exit_code

MEGABYTES = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print its path; returns 0, 1 for a folder without a run or a file that cannot be written."""
    return exit_code(_report, arguments)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlkit report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN's name with .html, in this folder)")
    parser.add_argument("--max-mb", type=float, default=MEGABYTES, help=f"largest size in MB (default: {MEGABYTES:g})")
    return parser


def _report(arguments: list[str]) -> int:
    given = parser().parse_args([word.removeprefix("run=") for word in arguments])
    from rlkit.view.report import write

    for line in write(given.run, given.out, given.max_mb):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
