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


def exit_code(work: Callable[[list[str]], int], arguments: Sequence[str] | None, *, has_dry_run: bool = False) -> int:
    """Run `work`; return its exit code, or 2 for a wrong configuration, 1 for another UserError or a package of an
    extra that is not installed, 130 after Ctrl-C.

    `--version` among the arguments is handled here.
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
        dry = not has_dry_run or "dry_run=true" in words
        return print_error(error, "" if dry else "; `dry_run=true` checks without running")
    except ModuleNotFoundError as error:
        message = named_extra(error)
        if message is None:
            raise
        return print_error(NotInstalledError(message))
    except KeyboardInterrupt:
        print("rlkit: interrupted", file=sys.stderr)
        return INTERRUPTED


def print_error(error: Exception, hint: str = "") -> int:
    if isinstance(error, ConfigError):
        print(error.report(hint), file=sys.stderr)
        return CONFIG_ERROR
    print(f"rlkit: {error}", file=sys.stderr)
    return FAILED


def print_warnings(warnings: Sequence[ConfigIssue | str]) -> None:
    for warning in warnings:
        print(f"rlkit: warning: {warning}", file=sys.stderr)


HELP = ("-h", "--help")


def asks_for_help(arguments: Sequence[str]) -> bool:
    return bool(set(HELP) & set(arguments))


def split_off_subject(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the run, checkpoint or model that a command is about, and its other arguments. The subject is a first word
    that is neither `key=value` nor `--option`, or the value of `run=`. Raises ConfigError if there are two."""
    words = list(arguments)
    named = [word.removeprefix("run=") for word in words[:1] if _is_subject(word)]
    rest = words[len(named) :]
    named += [word.removeprefix("run=") for word in rest if word.startswith("run=")]
    if len(named) > 1:
        raise ConfigError([ConfigIssue(f"run={named[1]}", f"{named[0]} is already given; leave one of them out")])
    return next(iter(named), None), [word for word in rest if not word.startswith("run=")]


def _is_subject(word: str) -> bool:
    return not word.startswith("-") and word not in ("help", "version") and ("=" not in word or Path(word).exists())


def split_off_file(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the file of `--config FILE` or `--config=FILE`, and the other arguments. Raises ConfigError if FILE is
    missing."""
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
