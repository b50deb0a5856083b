"""`python -m rlkit.submit`: run as a job on a Ray cluster. All checks first, then upload and log."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from rlkit.checkpoint.resume import find_resume
from rlkit.config.command import asks_for_help, split_off_file
from rlkit.config.compose import PATH_KEYS, at_home
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError, ConfigIssue, all_fields, did_you_mean, validate
from rlkit.config.overrides import parse_overrides, quoted
from rlkit.config.parts import ResolvedRun, plain
from rlkit.config.report import plan, plan_text
from rlkit.config.schema import RunConfig
from rlkit.experience.section import Section
from rlkit.jobs.cluster import (
    RUN_FOLDER,
    RUN_NAME,
    Cluster,
    ClusterError,
    connect,
    follow,
    list_jobs,
    run_name,
    say,
    show_log,
    show_status,
    stop,
)
from rlkit.jobs.resources import Node, demands, missing
from rlkit.jobs.upload import Upload, collect, pack
from rlkit.models.folder import ModelFolderError

ADDRESS = "cluster.address"
CONFIG_IN_ARCHIVE = "submitted_config.yaml"
ELSEWHERE = " (here; the job looks for it on the cluster)"
USAGE = """\
[bold]python -m rlkit.submit[/] cluster.address=http://HOST:8265 \\[rlkit.train's arguments] \\[submit.key=value ...]
[bold]python -m rlkit.submit[/] status|logs|stop NAME cluster.address=http://HOST:8265
[bold]python -m rlkit.submit[/] list cluster.address=http://HOST:8265

  NAME is the name of the run folder, or the job's id. cluster.address is the dashboard's address;
  RAY_API_SERVER_ADDRESS can give it instead. Exit code: the job's; 1 if it could not be followed or submitted, 2 for a
  wrong configuration, 130 after Ctrl-C, 143 for a job that was stopped.
  dry_run=true checks configuration, upload and cluster, and submits nothing.
"""
NO_TOKEN = (
    "the cluster answers without a token: anyone who reaches its ports can run code on it. Start it with "
    "RAY_AUTH_MODE=token (ray get-auth-token --generate), and keep the dashboard on 127.0.0.1"
)


class SubmitConfig(Section):
    """How a run is submitted as a job to a Ray cluster."""

    code: Literal["upload", "installed"] = "upload"
    """upload: send the working folder, without outputs and virtual environments; installed: use the cluster's rlkit."""
    python: str = "python"
    """The job's Python on the cluster: a command or an absolute path."""
    exclude: tuple[str, ...] = ()
    """Further names or patterns not to upload: [data,"*.ckpt"]. What git ignores is never uploaded."""
    max_file_mib: float = Field(default=20.0, gt=0)
    """Larger files are not uploaded; a message names each."""
    max_upload_mib: float = Field(default=100.0, gt=0, le=450)
    """A larger folder (before compression) is refused. Ray accepts packages below 512 MiB."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for the job and its workers: {NAME: value}. Anyone who can see the cluster's jobs can read them."""
    pass_environment: tuple[str, ...] = ()
    """Names of local environment variables to pass to the job. The same people can read them."""
    autoscaling: bool = False
    """Whether the cluster adds nodes on demand: missing GPUs are then only a warning."""
    follow: bool = True
    """Show the log until the job ends, and exit with its code."""
    reconnect_seconds: float = Field(default=600.0, gt=0)
    """Stop following after this long without an answer from the cluster; the job is left alone."""
    stop_seconds: int = Field(default=60, ge=1)
    """How long the job may take to shut down after `stop` before it is killed."""


@dataclass(frozen=True)
class Arguments:
    address: str | None
    """`cluster.address` as typed."""
    submit: SubmitConfig
    overrides: list[str]
    """Arguments of `rlkit.train`, as typed."""
    problems: list[ConfigIssue]
    """Problems of the job's own keys."""


def read_arguments(overrides: Sequence[str]) -> Arguments:
    """Split the arguments. Never raises: problems of the job's own keys are in the result."""

    def is_about_job(text: str) -> bool:
        key = text.partition("=")[0].lstrip("+~").strip()
        return key.startswith("submit.") or key in ("submit", ADDRESS)

    parsed = parse_overrides([text for text in overrides if is_about_job(text)], {})
    values, problems = dict(parsed.values), list(parsed.problems)
    address = values.pop(ADDRESS, None)
    if "submit" in values:
        del values["submit"]
        problems.append(
            ConfigIssue(parsed.typed["submit"], "is a section; set its keys one by one, like submit.code=upload")
        )
    section, more = validate(
        SubmitConfig,
        {key.removeprefix("submit."): value for key, value in values.items()},
        "submit.",
        [key for key, _ in all_fields(SubmitConfig, "submit.")],
        lambda key, value: parsed.typed.get(key, f"{key}={value}"),
        {},
    )
    return Arguments(
        address=None if address is None else str(address),
        submit=section if isinstance(section, SubmitConfig) else SubmitConfig(),
        overrides=[text for text in overrides if not is_about_job(text)],
        problems=[*problems, *more],
    )


@dataclass(frozen=True)
class Checked:
    arguments: Arguments
    run: ResolvedRun
    file: Path | None
    """`--config FILE`, sent with the job."""
    upload: Upload | None
    """None: the job uses the cluster's own rlkit."""
    warnings: list[str]


def check_here(overrides: Sequence[str], file: Path | None, folder: Path) -> Checked:
    """Check what can be checked without the cluster. Raises ConfigError with all problems, or UploadError."""
    arguments = read_arguments(overrides)
    submit, absent, run = arguments.submit, _absent_paths(arguments.overrides, file, folder), None
    problems = list(arguments.problems)
    for name in submit.pass_environment:
        if name not in os.environ:
            problems.append(ConfigIssue(f"submit.pass_environment=[{name}]", f"{name} is not set here"))
    try:
        run = load_config(arguments.overrides, file, absent)
    except ConfigError as error:
        problems += error.problems
    if problems or run is None:
        raise ConfigError(problems)
    upload = None
    if submit.code == "upload":
        upload = collect(folder, submit.exclude, submit.max_file_mib, submit.max_upload_mib)
    problems = relative_path_problems(run, upload, folder)
    resume = run.config.resume
    if resume not in ("auto", "never") and not Path(resume).expanduser().is_absolute():
        why = "the job starts in a copy of this folder, without its runs; name the run by an absolute path"
        problems.append(ConfigIssue(f"resume={resume}", why))
    if problems:
        raise ConfigError(problems)
    warnings = [f"{text}{ELSEWHERE if any(path in str(text) for path in absent) else ''}" for text in run.warnings]
    return Checked(arguments, run, file, upload, warnings + [text + ELSEWHERE for text in resume_warnings(run.config)])


def _absent_paths(overrides: Sequence[str], file: Path | None, folder: Path) -> list[str]:
    """Return absolute paths that do not exist here; they may exist on the cluster, where the job checks them."""
    trees: list[Any] = [parse_overrides(overrides, {}).values]
    if file is not None:
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # reported when the file is merged
            trees.append(yaml.safe_load(file.read_text()))
    paths = [at_home(text) for _, text in _texts(trees)]
    return [path for path in paths if path.startswith("/") and not _found(path, folder)]


def _found(path: str, folder: Path) -> list[str]:
    """Return `path` if it exists, else what it matches as a pattern."""
    # Not pathlib's: its `exists` raises for a text too long for a path, and its `glob` for an absolute pattern.
    there = os.path.exists(folder / path)  # noqa: PTH110
    return [path] if there else sorted(glob(path, root_dir=folder))  # noqa: PTH207


def relative_path_problems(run: ResolvedRun, upload: Upload | None, folder: Path) -> list[ConfigIssue]:
    """Return problems of relative paths that exist here but are not among the uploaded files."""
    problems = []
    for key, value in _texts(plain(run.config)):
        if not key.endswith(PATH_KEYS) or Path(value).is_absolute() or value.startswith("~"):
            continue
        lacking = [path for path in _found(value, folder) if upload is None or not upload.has(path)]
        if not lacking:
            continue
        if upload is None:
            why = "with submit.code=installed the job does not start in this folder"
        else:
            why = (
                f"{lacking[0]} is not among the uploaded files (outside this folder, ignored, too large, or behind a "
                "link to a folder)"
            )
        problems.append(
            ConfigIssue(f"{key}={value}", f"{why}; name it by an absolute path on storage the cluster sees")
        )
    return problems


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (full key, text) for all texts in sections and lists; those in a list have the list's key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value


def resume_warnings(config: RunConfig) -> list[str]:
    """Return warnings on what `resume` finds here. On storage shared with the cluster, the job finds the same."""
    try:
        point = find_resume(config)
    except ConfigError as error:
        return [f"{problem.where}: {problem.message}" for problem in error.problems]
    return [] if point is None else [f"resume: continues from {point.checkpoint.path}", *point.notices]


def check_cluster(checked: Checked, cluster: Cluster) -> None:
    """Check token and resources, and that no other job uses the run folder. Raises ClusterError."""
    if not cluster.token:
        say(f"warning: {NO_TOKEN}")
    resources = [(node.node_ip, node.resources_total) for node in cluster.nodes()]
    nodes = [Node(name, total.get("CPU", 0.0), total.get("GPU", 0.0)) for name, total in resources]
    lacking, slow = missing(demands(checked.run), nodes)
    autoscaling = checked.arguments.submit.autoscaling
    for line in [*slow, *(lacking if autoscaling else [])]:
        say(f"warning: {line}")
    if lacking and not autoscaling:
        raise ClusterError(f"{'; '.join(lacking)}. (If the cluster adds nodes on demand: submit.autoscaling=true)")
    folder = str(checked.run.config.run_dir)
    for job in cluster.jobs():
        if not job.status.is_terminal() and (job.metadata or {}).get(RUN_FOLDER) == folder:
            raise ClusterError(
                f"job {job.submission_id} is already running in run_dir={folder}: name another folder, or end it with "
                f"python -m rlkit.submit stop {run_name(job)} cluster.address={cluster.address}"
            )


def environment(submit: SubmitConfig) -> dict[str, str]:
    """Return variables for the driver and all actors; an actor's own settings override them."""
    passed = {name: os.environ[name] for name in submit.pass_environment if name in os.environ}
    return {
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        # Ray leaves the device variables of actors without a GPU unchanged.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Seconds between SIGTERM and SIGKILL; Ray's own 3 s are too few for an orderly end of a run.
        "RAY_JOB_STOP_WAIT_TIME_S": str(submit.stop_seconds),
        **passed,
        **submit.environment,
    }


def make_job(run: ResolvedRun, overrides: Sequence[str], has_config_file: bool, submit: SubmitConfig) -> dict[str, Any]:
    """Return the arguments of Ray's `submit_job`; `overrides` (and a configuration file) describe `run`."""
    folder = run.config.run_dir
    name = re.sub(r"[^\w.-]+", "-", folder.name)
    arguments = ["-m", "rlkit.train", *(["--config", CONFIG_IN_ARCHIVE] if has_config_file else [])]
    arguments += [text for text in overrides if text.partition("=")[0] not in ("run_dir", "dry_run")]
    arguments.append(f"run_dir={quoted(str(folder))}")
    return {
        "submission_id": f"{name}-{uuid.uuid4().hex[:6]}",
        "entrypoint": f"exec {shlex.join([submit.python, *arguments])}",
        "runtime_env": {"env_vars": environment(submit)},
        "metadata": {RUN_NAME: folder.name, RUN_FOLDER: str(folder)},
    }


def submit_run(overrides: Sequence[str], file: Path | None) -> int:
    """Check, upload, submit, follow. Returns the job's exit code; 0 after `dry_run=true` or `submit.follow=false`.

    Raises ConfigError, UploadError or ClusterError before anything is sent.
    """
    checked = check_here(overrides, file, Path.cwd())
    run, submit, upload = checked.run, checked.arguments.submit, checked.upload
    for warning in checked.warnings:
        say(f"warning: {warning}")
    cluster = connect(checked.arguments.address)
    check_cluster(checked, cluster)
    for line in upload.lines() if upload is not None else ():
        say(line)
    uploaded = upload is not None and "rlkit/__init__.py" in upload.files
    say(f"the job uses the {'uploaded' if uploaded else 'installed'} rlkit with the cluster's {submit.python}")
    say(f"run folder: {run.config.run_dir}, on the node where the job runs")
    if run.config.dry_run:
        _print_plan(run)
        return 0
    job_id = _send(checked, cluster)
    say(f"submitted {run.config.run_dir.name} as job {job_id} to {cluster.address}")
    if submit.follow:
        return follow(cluster, job_id, submit.reconnect_seconds)
    say(f"follow it: python -m rlkit.submit logs {job_id} cluster.address={cluster.address}")
    return 0


def _print_plan(run: ResolvedRun) -> None:
    try:
        print(plan_text(plan(run)))
    except ModelFolderError as error:
        say(f"no plan can be made here: {error}")
    say("configuration and cluster fit together; nothing was submitted (dry_run=true)")


def _send(checked: Checked, cluster: Cluster) -> str:
    job = make_job(checked.run, checked.arguments.overrides, checked.file is not None, checked.arguments.submit)
    more = {} if checked.file is None else {CONFIG_IN_ARCHIVE: checked.file}
    with tempfile.TemporaryDirectory(prefix="rlkit-submit-") as folder:
        if checked.upload is not None or more:
            archive = Path(folder) / "working_folder.zip"
            pack(checked.upload, archive, more)
            job["runtime_env"]["working_dir"] = str(archive)  # Ray's client uploads it
        return str(cluster.ask(cluster.client.submit_job, **job))


def run_command(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        return _help()
    if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "~")):
        return _about_jobs(arguments[0], arguments[1:])
    file, overrides = split_off_file(arguments)
    return submit_run(overrides, file)


def _about_jobs(word: str, rest: list[str]) -> int:
    words = ["status", "logs", "stop", "list"]
    if word not in words:
        raise ConfigError([ConfigIssue(word, f"no such command; {did_you_mean(word, words)}")])
    names = [text for text in rest if "=" not in text]
    arguments = read_arguments([text for text in rest if "=" in text])
    problems = [*arguments.problems, *(ConfigIssue(text, f"has no effect with {word}") for text in arguments.overrides)]
    if len(names) != (word != "list"):
        problems.append(
            ConfigIssue(word, "takes no name" if word == "list" else "takes one name: a run's name or a job's id")
        )
    if problems:
        raise ConfigError(problems)
    submit, cluster = arguments.submit, connect(arguments.address)
    if word == "logs":
        return show_log(cluster, names[0], submit.follow, submit.reconnect_seconds)
    if word == "list":
        list_jobs(cluster)
    elif word == "status":
        show_status(cluster, names[0])
    else:
        stop(cluster, names[0], submit.stop_seconds)
    return 0


def _help() -> int:
    from rich.console import Console

    from rlkit.config.help import print_section

    console = Console()
    console.print(USAGE, highlight=False)
    print_section(console, "submit", SubmitConfig.__doc__ or "", all_fields(SubmitConfig, "submit."))
    console.print("\nEvery key of the run itself: python -m rlkit.train --help", highlight=False)
    return 0
