"""`python -m rlkit.export FORMAT RUN [into=FOLDER]`: the samples of a run for another program's viewer.

python -m rlkit.export inspect runs/x                  logs for Inspect View, in runs/x/inspect
python -m rlkit.export trackio runs/x into=board       a run with all samples as traces, for `trackio show`
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlkit.config.command import asks_for_help, exit_code
from rlkit.config.messages import ConfigError, ConfigIssue, did_you_mean
from rlkit.experience.extras import lacking
from rlkit.sync import replay
from rlkit.trackers.boards import TrackioConfig
from rlkit.trackers.recorded import RecordedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if the folder cannot be used, 2 for wrong arguments."""
    return exit_code(_export, arguments)


def _export(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        print(__doc__)
        return 0
    arguments = [word.removeprefix("run=") for word in arguments]
    words = [word for word in arguments if not word.startswith("into=")]
    into = next((Path(word.removeprefix("into=")).expanduser() for word in arguments if word not in words), None)
    usage = "name a format and a run, like: rlkit export inspect runs/x, or: rlkit export trackio runs/x into=FOLDER"
    if len(words) != 2 or any("=" in word and not Path(word).expanduser().is_dir() for word in words):
        raise ConfigError([ConfigIssue(f"rlkit.export {' '.join(arguments)}".strip(), usage)])
    form, folder = words
    if form not in FORMATS:
        raise ConfigError([ConfigIssue(form, f"no such format; {did_you_mean(form, FORMATS)}")])
    package, export = FORMATS[form]
    if problems := lacking(package, form):
        raise ConfigError([ConfigIssue(form, problems[0])])
    print(export(RecordedRun(Path(folder)), into))
    return 0


def _to_trackio(run: RecordedRun, into: Path | None) -> str:
    if into is not None:
        os.environ["TRACKIO_DIR"] = str(into.absolute())
    return str(replay(run, TrackioConfig(), ledger=None, all_samples=True))


def _to_inspect(run: RecordedRun, into: Path | None) -> str:
    from rlkit.trackers.inspect_logs import write_logs

    target = run.folder / "inspect" if into is None else into
    samples, logs = write_logs(run, target)
    return f"{samples} samples in {logs} logs; view them with: inspect view --log-dir {target}"


FORMATS: Mapping[str, tuple[str, Callable[[RecordedRun, Path | None], str]]] = {
    "inspect": ("inspect_ai", _to_inspect),
    "trackio": ("trackio", _to_trackio),
}
"""Name of the format and of the extra -> (package, writer)."""


if __name__ == "__main__":
    sys.exit(main())
