"""`python -m rlkit.submit cluster.address=URL [what rlkit.train takes]`: a run as a job of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code, split_off_file
from rlkit.config.messages import ConfigError, Problem, did_you_mean

USAGE = """\
[bold]python -m rlkit.submit[/] cluster.address=http://HOST:8265 \\[what rlkit.train takes ...] \\[submit.key=value ...]
[bold]python -m rlkit.submit[/] status|logs|stop NAME cluster.address=http://HOST:8265
[bold]python -m rlkit.submit[/] list cluster.address=http://HOST:8265

  NAME is the name of the run folder, or the job's id. cluster.address is the dashboard's; RAY_API_SERVER_ADDRESS
  stands in for it. Exit code: the job's; 1 if it could not be followed or submitted, 2 for a wrong configuration,
  130 after Ctrl-C, 143 for a job that was stopped.
  dry_run=true checks configuration, upload and cluster, and submits nothing.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return exit_code(_command, arguments)


def _command(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        return _help()
    if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "~")):
        return _about_jobs(arguments[0], arguments[1:])
    from rlkit.jobs.submission import submit_run

    file, overrides = split_off_file(arguments)
    return submit_run(overrides, file)


def _about_jobs(word: str, rest: list[str]) -> int:
    """`status`, `logs`, `stop` and `list`. Raises ConfigError for anything else."""
    from rlkit.jobs import commands
    from rlkit.jobs.cluster import connect
    from rlkit.jobs.options import read_arguments

    words = ["status", "logs", "stop", "list"]
    if word not in words:
        raise ConfigError([Problem(word, f"no such command; {did_you_mean(word, words)}")])
    names = [text for text in rest if "=" not in text]
    arguments = read_arguments([text for text in rest if "=" in text], None)
    problems = [*arguments.problems, *(Problem(text, f"has no effect with {word}") for text in arguments.overrides)]
    expected = 0 if word == "list" else 1
    if len(names) != expected:
        problems.append(Problem(word, "takes no name" if expected == 0 else "takes one name: of a run, or a job's id"))
    if problems:
        raise ConfigError(problems)
    cluster = connect(arguments.address)
    if word == "list":
        return commands.list_jobs(cluster)
    if word == "status":
        return commands.status(cluster, names[0])
    if word == "stop":
        return commands.stop(cluster, names[0], arguments.submit)
    return commands.logs(cluster, names[0], arguments.submit)


def _help() -> int:
    from rich.console import Console

    from rlkit.config.help import print_section
    from rlkit.config.messages import all_fields
    from rlkit.jobs.options import SubmitConfig

    console = Console()
    console.print(USAGE, highlight=False)
    print_section(console, "submit", SubmitConfig.__doc__ or "", all_fields(SubmitConfig, "submit."))
    console.print("\nEvery key of the run itself: python -m rlkit.train --help", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
