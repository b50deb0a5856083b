"""A run becomes a job: every check first, then the upload, then the log until the job ends."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.model_folder import ModelFolderError
from rlkit.config.parts import ResolvedRun
from rlkit.config.plan import plan
from rlkit.jobs.cluster import NO_TOKEN, RUN_FOLDER, Cluster, ClusterError, connect, run_name
from rlkit.jobs.commands import follow_job
from rlkit.jobs.job import (
    CONFIG_IN_ARCHIVE,
    Job,
    environment_problems,
    make_job,
    relative_path_problems,
    resume_problems,
    resume_warnings,
)
from rlkit.jobs.options import Arguments, read_arguments
from rlkit.jobs.resources import demands, missing
from rlkit.jobs.upload import Upload, collect, pack


@dataclass(frozen=True)
class Checked:
    """A run that may be submitted as far as this machine can tell."""

    arguments: Arguments
    run: ResolvedRun
    upload: Upload | None
    """None: the cluster's own rlkit."""


def submit_run(overrides: Sequence[str], file: Path | None) -> int:
    """Check, upload, submit, follow. Returns the job's exit code; 0 after `dry_run=true` or `submit.follow=false`.

    Raises ConfigError, UploadError or ClusterError before anything is sent.
    """
    checked = check_here(overrides, file, Path.cwd())
    submit = checked.arguments.submit
    absent = _absent_paths(overrides, file)
    for warning in checked.run.warnings:
        elsewhere = any(path in str(warning) for path in absent)
        _say(f"warning: {warning}{' (here; the job looks for it on the cluster)' if elsewhere else ''}")
    for text in resume_warnings(checked.run.config):
        _say(f"warning: {text} (here; the job looks for it on the cluster)")
    cluster = connect(checked.arguments.address)
    check_cluster(checked, cluster)
    _say_what_runs(checked)
    _say(f"run folder: {checked.run.config.run_dir}, on the node where the job runs")
    if checked.run.config.dry_run:
        _print_plan(checked.run)
        return 0
    job = make_job(checked.run, checked.arguments.overrides, checked.arguments.file is not None, submit)
    _send(job, checked, cluster)
    _say(f"submitted {job.metadata['rlkit_run']} as job {job.submission_id} to {cluster.address}")
    if not submit.follow:
        _say(f"follow it: python -m rlkit.submit logs {job.submission_id} cluster.address={cluster.address}")
        return 0
    return follow_job(cluster, job.submission_id, submit)


def check_here(overrides: Sequence[str], file: Path | None, here: Path) -> Checked:
    """What can be found wrong without the cluster. Raises ConfigError with all of it, or UploadError."""
    arguments = read_arguments(overrides, file)
    submit, run = arguments.submit, None
    problems = [*arguments.problems, *environment_problems(submit)]
    try:
        run = load_config(arguments.overrides, file, _absent_paths(arguments.overrides, file))
    except ConfigError as error:
        problems += error.problems
    if problems or run is None:
        raise ConfigError(problems)
    upload = None
    if submit.code == "upload":
        upload = collect(here, submit.exclude, submit.max_file_mib, submit.max_upload_mib)
    problems = [*relative_path_problems(run, upload, here), *resume_problems(run.config)]
    if problems:
        raise ConfigError(problems)
    return Checked(arguments, run, upload)


def check_cluster(checked: Checked, cluster: Cluster) -> None:
    """Token, resources, no other job in the same run folder. Raises ClusterError."""
    if not cluster.token:
        _say(f"warning: {NO_TOKEN}")
    lacking, slow = missing(demands(checked.run), cluster.nodes())
    for line in [*slow, *(lacking if checked.arguments.submit.autoscaling else [])]:
        _say(f"warning: {line}")
    if lacking and not checked.arguments.submit.autoscaling:
        raise ClusterError(
            f"{'; '.join(lacking)}. (If the cluster adds nodes when asked for them: submit.autoscaling=true)"
        )
    folder = str(checked.run.config.run_dir)
    for job in cluster.jobs():
        if not job.status.is_terminal() and (job.metadata or {}).get(RUN_FOLDER) == folder:
            raise ClusterError(
                f"job {job.submission_id} is running in run_dir={folder} already: name another folder, or end it with "
                f"python -m rlkit.submit stop {run_name(job)} cluster.address={cluster.address}"
            )


def _say_what_runs(checked: Checked) -> None:
    submit, upload = checked.arguments.submit, checked.upload
    for line in upload.lines() if upload is not None else ():
        _say(line)
    uploaded = upload is not None and "rlkit/__init__.py" in upload.files
    _say(f"the job uses the {'uploaded' if uploaded else 'installed'} rlkit with the cluster's {submit.python}")


def _send(job: Job, checked: Checked, cluster: Cluster) -> None:
    runtime_env: dict[str, object] = {"env_vars": job.environment}
    more = {CONFIG_IN_ARCHIVE: checked.arguments.file} if checked.arguments.file is not None else {}
    with tempfile.TemporaryDirectory(prefix="rlkit-submit-") as folder:
        if checked.upload is not None or more:
            archive = Path(folder) / "working_folder.zip"
            pack(checked.upload or Upload(Path.cwd(), {}, {}), archive, more)
            runtime_env["working_dir"] = str(archive)
        cluster.ask(
            lambda: cluster.client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.submission_id,
                runtime_env=runtime_env,
                metadata=job.metadata,
            )
        )


def _absent_paths(overrides: Sequence[str], file: Path | None) -> list[str]:
    """Values that are absolute paths of nothing here: they may be on the cluster, where the job checks them."""
    values = [text.partition("=")[2].strip("'\"") for text in overrides]
    if file is not None and file.is_file():
        values += re.findall(r""":\s*['"]?(/[^\s'"]+)""", file.read_text(errors="replace"))
    return [value for value in values if value.startswith("/") and not Path(value).exists()]


def _print_plan(run: ResolvedRun) -> None:
    try:
        for line in plan(run):
            print(f"{line.area:<9}{line.what:<31}{line.amount}")
    except ModelFolderError as error:
        _say(f"no plan from here: {error}")
    _say("configuration and cluster fit; nothing was submitted (dry_run=true)")


def _say(text: str) -> None:
    print(f"rlkit: {text}", file=sys.stderr)
