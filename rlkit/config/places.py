"""Checks of the folders, files, addresses and trackers that a configuration names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.reach import ray_here, refusal
from rlkit.config.schema import ClusterConfig, ModelConfig, RolloutConfig
from rlkit.config.tracking import TENSORBOARD, TrackingConfig
from rlkit.data.base import DataError, DataSource, Split
from rlkit.data.lengths import too_long_prompts, too_long_responses
from rlkit.data.tables import local_files
from rlkit.models.folder import ModelFolderError, ModelShape, model_folder
from rlkit.models.usable import default_template
from rlkit.trackers.known import tracker_class
from rlkit.trackers.ledger import FILE as LEDGER

RUN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints")
"""A folder that has any of these holds a run."""
BESIDE_THEM = ("tensorboard", "logs", "policy", "model", "diagnostics", "tokens", LEDGER, "wandb", "swanlog", "inspect")
"""Other things that a run creates in its folder."""
NOTES = 3
"""How many other files a run folder may hold: the start script, a log, a note."""
RAY_WORKING_DIRS = "/runtime_resources/working_dir_files/"
SYSTEM = ("/proc", "/sys", "/dev")


def run_folder_is_free(run_dir: Path, resume: str) -> Issues:
    """Never mix two runs, or a run and other things, in one folder, nor resume a run with another model."""
    if run_dir.exists() and not run_dir.is_dir():
        yield ConfigIssue("run_dir", "is a file, not a folder; choose another name")
        return
    if run_dir in (Path("/"), Path.home(), Path.cwd()) or _is_the_system_s(run_dir):
        yield ConfigIssue("run_dir", f"{run_dir} is not a folder for a run's files; choose a new one, like runs/NAME")
        return
    present = [name for name in RUN_FILES if (run_dir / name).exists()]
    if present and resume != "auto":
        yield ConfigIssue(
            "run_dir",
            f"already holds a run ({', '.join(present)}); continue it with resume=auto, choose another folder, or move "
            "this one away",
        )
    others = [] if present or not os.access(run_dir, os.R_OK) else _others(run_dir.iterdir())
    if len(others) > NOTES or any((run_dir / name).is_dir() for name in others):
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        yield ConfigIssue("run_dir", f"holds other things ({shown}) but no run; choose a new or empty folder")
    existing = next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        yield ConfigIssue("run_dir", f"cannot be created: {existing} is not a folder that you may write to")


def _is_the_system_s(folder: Path) -> bool:
    return any(folder.is_relative_to(top) for top in SYSTEM) and not folder.is_relative_to("/dev/shm")


def _others(entries: Iterable[Path]) -> list[str]:
    return sorted(
        entry.name for entry in entries if entry.name not in (*RUN_FILES, *BESIDE_THEM) and entry.name[0] != "."
    )


def trackers_are_usable(tracking: TrackingConfig) -> Issues:
    for config in tracking.trackers:
        if config.kind == TENSORBOARD:  # installed with the training packages, which are checked when a run starts
            continue
        for message in tracker_class(config.kind).check(config):
            yield ConfigIssue("tracking.trackers", f"{config.name}: {message}")


def resume_knows_its_folder(resume: str, new_folder: bool) -> Issues:
    if resume == "auto" and new_folder:
        yield ConfigIssue(
            "resume", "has nothing to resume from: without run_dir every run has a new folder; add run_dir=FOLDER"
        )


def run_folder_outlives_the_job(run_dir: Path) -> Issues:
    """In a Ray job with a working directory, a relative folder is inside the files that Ray unpacked."""
    if RAY_WORKING_DIRS in f"{run_dir}/":
        yield ConfigIssue(
            "run_dir",
            "is inside the files that Ray unpacked for this job and deletes some time after it; give the absolute path "
            "of a folder, run_dir=/storage/runs/NAME",
            warning=True,
        )


def chat_template_is_one(model: Any) -> Issues:
    """Parse the template as the tokenizer does: Jinja with loop controls and `generation` blocks."""
    if model.chat_template is None:
        return
    file = Path(model.chat_template).expanduser()
    if not file.is_file():
        yield ConfigIssue("model.chat_template", "no such file")
        return
    try:
        variables = _template_variables(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield ConfigIssue("model.chat_template", f"is not a Jinja template: {error}")
        return
    if "messages" not in variables:
        yield ConfigIssue("model.chat_template", "does not use `messages`, so every prompt would be the same text")


def _template_variables(text: str) -> set[str]:
    """Return the template's undeclared variables. Raise ValueError if the text is not a template."""
    from jinja2 import Environment, TemplateError, meta  # a run with the model's own template does not need it

    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(text)
    except TemplateError as error:
        raise ValueError(str(error)) from error
    return meta.find_undeclared_variables(tree)


GIVEN = {"messages", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
"""Variables that every template gets."""


def chat_template_takes_its_arguments(model: ModelConfig, model_shape: ModelShape | ModelFolderError) -> Issues:
    """A variable that the template does not use would have no effect."""
    arguments = model.chat_template_arguments
    if not arguments or isinstance(model_shape, ModelFolderError):
        return
    try:
        if model.chat_template is not None:
            text = Path(model.chat_template).expanduser().read_text(encoding="utf-8")
        else:
            text = default_template(model_folder(model.path)) or ""
        variables = _template_variables(text)
    except (OSError, ValueError):
        return  # reported with the template or the model
    taken = variables - GIVEN
    for name in arguments.keys() - taken:
        why = "is set for every prompt already" if name in GIVEN else "is not a variable of the chat template"
        has = f"it has {', '.join(sorted(taken))}" if taken else "it has none"
        yield ConfigIssue(f"model.chat_template_arguments.{name}", f"{why}; {has}")


def texts_are_short_enough(
    data: DataSource, model_shape: ModelShape | ModelFolderError, model: ModelConfig, rollout: RolloutConfig
) -> Issues:
    """Check prompts and recorded responses of the first problems; the start counts all, as transformers does."""
    share, template = data.config.bad_row_share, (model.chat_template, model.chat_template_arguments)
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        try:
            problems = data.preview(split)
        except DataError as error:
            yield ConfigIssue("data", str(error))
            return
        if isinstance(model_shape, ModelFolderError):
            return
        folder, rows = model_folder(model.path), sum(problem.rows for problem in problems)
        allowed = int(share * rows + 1e-9)
        limits = {"prompt": rollout.max_prompt_tokens, "response": rollout.max_response_tokens}
        try:
            long = {"prompt": too_long_prompts(problems, folder, template[0], limits["prompt"], allowed, template[1])}
            if rollout.source == "data":
                long["response"] = too_long_responses(problems, folder, limits["response"], allowed)
        except DataError as error:
            yield ConfigIssue("model.path", str(error))
            return
        except (OSError, ValueError):  # the checks of the template and the model report these
            return
        for kind, counted in long.items():
            if len(counted) > allowed:
                tokens, origin = max(counted)
                of = f"the first {rows} {split} " + ("prompts" if kind == "prompt" else "rows have responses that")
                yield ConfigIssue(
                    f"rollout.max_{kind}_tokens",
                    f"at least {len(counted)} of {of} are longer, more than data.max_bad_row_share={share:g} allows; "
                    f"the longest that was counted has {tokens} tokens ({origin})",
                )


def ray_answers(cluster: ClusterConfig, dry_run: bool, here: bool) -> Issues:
    address = cluster.address
    if address is None:
        return
    if address == "auto":
        address = ray_here()
        if address is None:
            why = "no Ray is running on this machine; start one with `ray start --head`, or give another's address"
            yield ConfigIssue("cluster.address", why, warning=dry_run)
            return
    host, _, port = address.rpartition(":")
    problem = refusal(host.strip("[]"), int(port)) if port.isdigit() else None
    if problem:
        yield ConfigIssue(
            "cluster.address", f"no Ray answers there ({address}: {problem}); `ray start --head` prints the address"
        )


def heldout_is_not_trained(data: DataSource) -> Issues:
    train, heldout = (_files(data, name) for name in ("path", "heldout_path"))
    for one in train:
        for other in heldout:
            if _same(one, other):
                yield ConfigIssue(
                    "data.heldout_path",
                    f"has the rows of data.path ({other}): held-out rows must not be trained on; choose other rows, "
                    "or leave it out (then data.heldout_share of the questions is held out)",
                )
                return


def _files(data: DataSource, key: str) -> list[Path]:
    """Return the files that exist; the source itself reports the missing ones."""
    names = getattr(data.config, key, None)
    try:
        return local_files(names, f"data.{key}") if isinstance(names, str | tuple) else []
    except DataError:
        return []


def _same(one: Path, other: Path) -> bool:
    """Whether both are the same file, or have the same size and begin alike."""
    if one.samefile(other):
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        return left.read(2**20) == right.read(2**20)


PLACES = (
    run_folder_is_free,
    resume_knows_its_folder,
    trackers_are_usable,
    run_folder_outlives_the_job,
    chat_template_is_one,
    chat_template_takes_its_arguments,
    texts_are_short_enough,
    ray_answers,
    heldout_is_not_trained,
)
