"""What every command does before and after its work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import rlkit
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.experience import UserError
from rlkit.experience.extras import NotInstalledError, named_extra

FAILED = 1
CONFIG_ERROR = 2
INTERRUPTED = 130


def exit_code(work: Callable[[list[str]], int], arguments: Sequence[str] | None) -> int:
    """Run `work`; return its exit code, or 2 for a wrong configuration, 1 for another UserError
    or a package that an extra brings, 130 after Ctrl-C.

    `--version` among the arguments is answered here.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in words:
        print(f"rlkit {rlkit.__version__}")
        return 0
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # a console script does not look for the user's modules here
    try:
        return work(words)
    except UserError as error:
        return print_error(error)
    except ModuleNotFoundError as error:
        message = named_extra(error)
        if message is None:
            raise
        return print_error(NotInstalledError(message))
    except KeyboardInterrupt:
        print("rlkit: interrupted", file=sys.stderr)
        return INTERRUPTED


def print_error(error: Exception) -> int:
    if isinstance(error, ConfigError):
        print(error.report(), file=sys.stderr)
        return CONFIG_ERROR
    print(f"rlkit: {error}", file=sys.stderr)
    return FAILED


def print_warnings(warnings: Sequence[ConfigIssue | str]) -> None:
    for warning in warnings:
        print(f"rlkit: warning: {warning}", file=sys.stderr)


HELP = ("-h", "--help")


def asks_for_help(arguments: Sequence[str]) -> bool:
    return bool(set(HELP) & set(arguments))


def split_off_file(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """`--config FILE` or `--config=FILE`, and the other arguments. Raises ConfigError if FILE is missing."""
    file: Path | None = None
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            others.append(argument)
            continue
        text = value if equals else next(rest, "")
        is_another = text.startswith("-") or ("=" in text and not equals and not Path(text).exists())
        if not text or is_another:
            raise ConfigError([ConfigIssue("--config", "needs a file: --config runs/old/config.yaml")])
        file = Path(text).expanduser()
        if file.is_dir():
            inside = file / "config.yaml"
            remedy = f"did you mean {inside}?" if inside.is_file() else "name a file in it"
            raise ConfigError([ConfigIssue(f"--config {file}", f"is a folder; {remedy}")])
    return file, others
