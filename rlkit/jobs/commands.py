"""Jobs at the terminal: followed until they end or Ctrl-C, shown, listed, stopped."""

from __future__ import annotations

import sys
import time
from datetime import datetime

from rlkit.jobs.cluster import RUN_FOLDER, Cluster, ClusterError, run_name
from rlkit.jobs.follow import exit_code, follow, outcome
from rlkit.jobs.options import SubmitConfig

INTERRUPTED = 130
KILL_SECONDS = 30.0
"""What Ray may take, after the job's own time, to kill it and say so."""


def follow_job(cluster: Cluster, job_id: str, submit: SubmitConfig) -> int:
    """Show the log until the job ends; returns its exit code, or 130 after Ctrl-C, which leaves the job alone."""
    try:
        details = follow(cluster, job_id, _write, _say, submit.reconnect_seconds)
    except KeyboardInterrupt:
        return _interrupted(cluster, job_id, submit)
    _say(outcome(details))
    return exit_code(details)


def logs(cluster: Cluster, name: str, submit: SubmitConfig) -> int:
    """The log from its beginning; followed to the end unless `submit.follow=false`."""
    job = cluster.job(name)
    if submit.follow:
        return follow_job(cluster, job.submission_id, submit)
    _write(cluster.ask(cluster.client.get_job_logs, job.submission_id))
    return 0


def status(cluster: Cluster, name: str) -> int:
    """What is known of one job."""
    job = cluster.job(name)
    print(f"run      {run_name(job)}\njob      {job.submission_id}\nstate    {job.status.value}")
    if job.status.is_terminal():
        print(f"exit     {exit_code(job)}")
    print(f"started  {_clock(job.start_time)}\nended    {_clock(job.end_time)}")
    print(f"folder   {(job.metadata or {}).get(RUN_FOLDER, 'unknown: not submitted by rlkit')}")
    print(f"command  {job.entrypoint}")
    return 0


def list_jobs(cluster: Cluster) -> int:
    """A line for every job, the newest first."""
    rows = [
        (
            run_name(job),
            job.status.value,
            str(exit_code(job)) if job.status.is_terminal() else "",
            _clock(job.start_time),
            job.submission_id,
        )
        for job in cluster.jobs()
    ]
    rows.insert(0, ("run", "state", "exit", "started", "job"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def stop(cluster: Cluster, name: str, submit: SubmitConfig) -> int:
    """End a job in order, and wait until it has ended. Raises ClusterError if it does not."""
    job = cluster.job(name)
    if job.status.is_terminal():
        _say(f"{run_name(job)} ({job.submission_id}) has ended already: {job.status.value.lower()}")
        return 0
    cluster.ask(cluster.client.stop_job, job.submission_id)
    _say(f"stopping {run_name(job)} ({job.submission_id}); what it leaves is in its run folder")
    # The job itself knows how long it was given when it was submitted.
    given = ((job.runtime_env or {}).get("env_vars") or {}).get("RAY_JOB_STOP_WAIT_TIME_S", submit.stop_seconds)
    deadline = time.monotonic() + float(given) + KILL_SECONDS
    while time.monotonic() < deadline:
        now = cluster.ask(cluster.client.get_job_info, job.submission_id)
        if now.status.is_terminal():
            _say(outcome(now))
            return 0
        time.sleep(0.5)
    raise ClusterError(f"job {job.submission_id} has not ended: see Ray's logs/jobs/ on the cluster's head node")


def _interrupted(cluster: Cluster, job_id: str, submit: SubmitConfig) -> int:
    """The job goes on, unless the user at a terminal says otherwise."""
    _say(f"no longer following; job {job_id} goes on.")
    for word in ("logs", "stop"):
        _say(f"  python -m rlkit.submit {word} {job_id} cluster.address={cluster.address}")
    try:
        if sys.stdin.isatty() and input("Stop the job as well? [y/N] ").strip().lower() in ("y", "yes"):
            stop(cluster, job_id, submit)
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)  # a second Ctrl-C is a no
    return INTERRUPTED


def _clock(milliseconds: int | None) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S") if milliseconds else "-"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(f"rlkit: {text}", file=sys.stderr)
