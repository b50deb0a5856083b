"""`python -m rlkit.sync RUN [RUN ...] tracker=NAME`: send the contents of run folders to a tracker.

python -m rlkit.sync runs/x tracker=wandb
python -m rlkit.sync runs/x runs/y tracker='{kind:mlflow,project:gsm8k}'

What was sent before is not sent again. Of a run that is still going, what exists so far is sent; call it again for the
rest.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlkit.config.command import asks_for_help, exit_code
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.config.named import parse_trackers
from rlkit.experience import UserError
from rlkit.trackers.base import Started, TrackerConfig
from rlkit.trackers.delivery import make_tracker
from rlkit.trackers.known import tracker_class
from rlkit.trackers.ledger import Ledger
from rlkit.trackers.recorded import RecordedRun, numbers
from rlkit.trackers.rows import best_and_worst, texts_are_due

SETTLED_SECONDS = 2.0
"""Records of a running run that are newer are left for the next time: their samples may not be written yet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a tracker or a folder cannot be used, 2 for wrong arguments."""
    return exit_code(_sync, arguments)


def _sync(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        print(__doc__)
        return 0
    arguments = [word.removeprefix("run=") for word in arguments]
    chosen = [word.partition("=")[2] for word in arguments if word.startswith("tracker=")]
    folders = [word for word in arguments if not word.startswith("tracker=")]
    for word in folders:
        if "=" in word and not Path(word).expanduser().is_dir():
            raise ConfigError([ConfigIssue(word, "no such argument; rlkit.sync takes run folders and tracker=NAME")])
    if not folders or len(chosen) != 1:
        usage = "name run folders and one tracker, like: rlkit sync runs/x tracker=wandb"
        raise ConfigError([ConfigIssue(f"rlkit.sync {' '.join(arguments)}".strip(), usage)])
    config = parse_tracker(chosen[0])
    for run in [RecordedRun(Path(folder)) for folder in folders]:
        _refuse_what_is_sent_already(run, config)
        print(f"{run.folder}: {replay(run, config, Ledger(run.folder))}")
    return 0


def parse_tracker(text: str) -> TrackerConfig:
    """Return a tracker's options. Raises ConfigError for an unknown tracker, or one whose package is missing."""
    try:
        value = OverridesParser.create().parse_override(f"tracker={text}").value()
        (config,) = parse_trackers([value])
    except (ValueError, HydraException) as error:
        message = str(error).splitlines()[0].removeprefix("tracker 1: ")
        raise ConfigError([ConfigIssue(f"tracker={text}", message)]) from error
    problems = [ConfigIssue(f"tracker={text}", message) for message in tracker_class(config.kind).check(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _refuse_what_is_sent_already(run: RecordedRun, config: TrackerConfig) -> None:
    own = (run.config.get("tracking") or {}).get("trackers") or ()
    kinds = [tracker.get("kind") if isinstance(tracker, dict) else tracker for tracker in own]
    if config.kind in kinds and run.goes_on():
        raise UserError(f"{run.folder} is still running and sends to {config.name} itself; sync it when it has ended")


@dataclass(frozen=True)
class Sent:
    records: int
    texts: int
    where: str

    def __str__(self) -> str:
        if not self.records:
            return "nothing new"
        to = f" to {self.where}" if self.where else ""
        return f"sent {self.records} records and {self.texts} samples{to}"


def replay(run: RecordedRun, config: TrackerConfig, ledger: Ledger | None, all_samples: bool = False) -> Sent:
    """Send what `ledger` does not list as sent, and record it there; without a ledger, everything, as a new run.

    Raises UserError for whatever the tracker raises; what was sent until then is recorded.
    """
    name = config.name
    before = 0.0 if ledger is None else ledger.until(name)
    newest = math.inf if run.ended else time.time() - SETTLED_SECONDS
    records = [record for record in run.records() if before < record["time"] <= newest]
    if not records:
        return Sent(0, 0, "")
    # An evaluation follows the step that it names.
    first_step = min(record["step"] + (record.get("kind") == "evaluation") for record in records)
    total = max(record["step"] for record in records)
    total = max(total, int((run.config.get("trainer") or {}).get("total_steps") or 0))
    until, texts = before, 0
    started: Started | None = None
    try:
        tracker = make_tracker(config)
        known = None if ledger is None else ledger.id_of(name)
        started = tracker.start(run.config, run.folder.name, run.folder, known, first_step)
        for record in records:
            tracker.scalars(record["step"], numbers(record), record["time"])
            until = max(until, record["time"])
        steps = {record["step"] for record in records}
        for step, rows in run.steps():
            due = step in steps and config.sample_groups > 0 and (all_samples or texts_are_due(step, total))
            chosen = best_and_worst(rows, config.sample_groups) if due and not all_samples else rows
            if due and chosen:
                tracker.samples(step, chosen)
                texts += len(chosen)
        tracker.close("finished" if run.ended else "running")
    except Exception as error:
        raise UserError(f"tracker {name}: {type(error).__name__}: {error}") from error
    finally:
        if ledger is not None and started is not None:
            ledger.write(name, started, until, lost=until < records[-1]["time"])
    return Sent(len(records), texts, started.where)


if __name__ == "__main__":
    sys.exit(main())
