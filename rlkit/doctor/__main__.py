"""`rlkit doctor`: report what this machine and this installation have and lack, and how to install what is missing.

Exit code 0 if runs can start here, else 1. Looking at runs, evaluating recorded answers and dry_run=true need only the
core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import rlkit
from rlkit.config.command import FAILED, asks_for_help, exit_code
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.doctor.findings import lacking_names, lines
from rlkit.doctor.machine import has_gpu, machine_findings
from rlkit.doctor.packages import checkout, install_lines, package_findings, torch_build


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return exit_code(_doctor, arguments)


def _doctor(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        print(__doc__)
        return 0
    for word in arguments:
        raise ConfigError([ConfigIssue(word, "rlkit doctor takes no arguments")])
    extra = "cuda" if has_gpu() else "cpu"
    packages, machine = list(package_findings(extra)), list(machine_findings(torch_build()))
    print(f"rlkit {rlkit.__version__}, {checkout() or 'installed'} ({sys.prefix})")
    print("\n".join([*lines("packages", packages), *lines("machine", machine)]))
    missing = lacking_names([*packages, *machine])
    if not missing:
        print("Runs can start here.")
        return 0
    print(f"Training lacks {', '.join(missing)}.")
    if lacking_names(packages):
        print("To install what it needs on this machine:")
        print("\n".join(f"  {line}" for line in install_lines(extra)))
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
