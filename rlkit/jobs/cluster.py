"""A cluster's job server, through Ray's own client."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from rlkit.experience import UserError
from rlkit.experience.extras import lacking

REQUEST_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
QUIET_SECONDS = 60.0
"""Reopen a log that is silent for this long: a dead connection looks the same."""
KILL_SECONDS = 30.0
"""Time for Ray to kill a job after its stop_seconds, and to report it."""
PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to reconnect; the last one repeats."""
STOPPED, INTERRUPTED = 143, 130
"""Exit codes of SIGTERM and SIGINT."""
RUN_NAME, RUN_FOLDER = "rlkit_run", "rlkit_run_dir"
"""Keys of a job's metadata: name and path of its run folder."""
TOKEN_HELP = (
    "give it in RAY_AUTH_TOKEN, or name its file in RAY_AUTH_TOKEN_PATH (default: ~/.ray/auth_token); it is the token "
    "that the cluster was started with"
)


class ClusterError(UserError, RuntimeError): ...


class Cluster:
    """A cluster's job server. `client`: a JobSubmissionClient whose requests have a deadline."""

    def __init__(self, address: str, client: Any, token: bool) -> None:
        self.address, self.client, self.token = address, client, token

    def ask(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call Ray; turn its various errors into ClusterError."""
        import requests
        from ray.exceptions import AuthenticationError
        from ray.util.state.exception import RayStateApiException

        try:
            return method(*arguments, **options)
        except requests.RequestException as error:
            raise ClusterError(f"cluster.address={self.address}: no answer ({_reason(error)})") from error
        except (RuntimeError, AuthenticationError, RayStateApiException) as error:
            raise ClusterError(f"cluster.address={self.address}: {error}") from error

    def nodes(self) -> list[Any]:
        from ray.util.state import list_nodes

        options = {"limit": 10_000, "timeout": int(REQUEST_SECONDS), "raise_on_missing_output": False}
        return list(self.ask(list_nodes, self.address, [("state", "=", "ALIVE")], **options))

    def jobs(self) -> list[Any]:
        jobs = [job for job in self.ask(self.client.list_jobs) if job.submission_id]
        return sorted(jobs, key=lambda job: -(job.start_time or 0))

    def job(self, name: str) -> Any:
        """Return the newest job of the run called `name`, or the job with that id. Raises ClusterError."""
        jobs = self.jobs()
        for job in jobs:
            if name in (run_name(job), job.submission_id):
                return job
        known = ", ".join(dict.fromkeys(run_name(job) for job in jobs[:10])) or "none"
        raise ClusterError(f"{self.address} has no job of a run named {name}; its runs: {known}")

    def details(self, job_id: str) -> Any:
        return self.ask(self.client.get_job_info, job_id)


def connect(configured: str | None) -> Cluster:
    """Connect to the dashboard; check its Ray version and the token. Raises ClusterError."""
    address = dashboard_address(configured)
    for message in lacking("ray"):
        raise ClusterError(message)
    token = _wants_token(address)
    # Ray would prefer these to `address`, and reads RAY_AUTH_MODE on import.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    if token and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types here
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            seconds = UPLOAD_SECONDS if options.get("data") is not None else REQUEST_SECONDS
            return super()._do_request(method, endpoint, timeout=seconds, **options)

    try:
        client = Client(address)
    except AuthenticationError as error:
        reason = "does not accept this token" if "Authentication failed" in str(error) else "requires a token"
        raise ClusterError(f"cluster.address={address} {reason}: {TOKEN_HELP}") from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ClusterError(f"cluster.address={address}: Ray's job server does not answer ({_reason(error)})") from error
    version = client._server_ray_version
    if version != ray.__version__:
        raise ClusterError(
            f"cluster.address={address} runs Ray {version}, but Ray {ray.__version__} is installed here: install the "
            f"cluster's, pip install 'ray[default]=={version}', or start the cluster with {ray.__version__}"
        )
    return Cluster(address, client, token)


def dashboard_address(configured: str | None) -> str:
    """Return the dashboard's address without a trailing slash. Raises ClusterError."""
    text = configured or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not text:
        raise ClusterError("cluster.address is needed: cluster.address=http://HOST:8265, the cluster's dashboard")
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"cluster.address={text} is not the address of a dashboard; write http://HOST:8265 (port 6379 and ray:// "
            "lead to other services of the cluster)"
        )
    return url.rstrip("/")


def _wants_token(address: str) -> bool:
    """Ask whether the cluster wants a token, before Ray is imported, which is when it decides whether to send one."""
    import requests

    try:
        response = requests.get(f"{address}/api/authentication_mode", timeout=REQUEST_SECONDS)
        mode = response.json()["authentication_mode"] if response.status_code == 200 else None
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"cluster.address={address}: no Ray dashboard answers ({_reason(error)}). Is the cluster up, with its "
            "dashboard, and is the port forwarded (ssh -L 8265:127.0.0.1:8265 HOST, or kubectl port-forward)?"
        ) from error
    return bool(mode == "token")


def _reason(error: BaseException) -> str:
    text = str(error.args[0] if error.args else error)
    for words in ("Connection refused", "Name or service not known", "timed out", "No route to host"):
        if words in text:
            return words.lower()
    return f"{type(error).__name__}: {text[:200]}"


def run_name(job: Any) -> str:
    """Return the run's name, or the job's id if rlkit did not submit it."""
    return str((job.metadata or {}).get(RUN_NAME, job.submission_id))


def exit_code(job: Any) -> int:
    """Return the exit code as in a shell: 143 if the job was stopped, 1 if it never ran."""
    if job.status.value == "STOPPED":
        return STOPPED
    if job.driver_exit_code is None:
        return 0 if job.status.value == "SUCCEEDED" else 1
    code = int(job.driver_exit_code)
    return code if code >= 0 else 128 - code


def follow(cluster: Cluster, job_id: str, give_up_seconds: float) -> int:
    """Show the log until the job ends; return its exit code, or 130 after Ctrl-C, which leaves the job running.

    Raises ClusterError if the cluster has not answered for `give_up_seconds`.
    """
    try:
        job = asyncio.run(_follow(cluster, job_id, give_up_seconds))
    except KeyboardInterrupt:
        say(f"no longer following; job {job_id} continues.")
        for word in ("logs", "stop"):
            say(f"  {_command(cluster, word, job_id)}")
        return INTERRUPTED
    say(_outcome(job))
    return exit_code(job)


async def _follow(cluster: Cluster, job_id: str, give_up_seconds: float) -> Any:
    """Follow a log, which Ray sends from its beginning each time: `shown` counts the characters written."""
    import aiohttp

    shown = failures = 0
    answered = time.monotonic()

    def show(text: str, start: int) -> int:
        """`text` begins at character `start` of the log; return where it ends."""
        nonlocal shown
        _write(text[max(0, shown - start) :])
        shown = max(shown, start + len(text))
        return start + len(text)

    def note_answer() -> None:
        nonlocal answered, failures
        if failures:
            say("reconnected")
        answered, failures = time.monotonic(), 0

    while True:
        try:
            position = 0
            async with aclosing(cluster.client.tail_job_logs(job_id)) as log:
                try:
                    while (text := await asyncio.wait_for(anext(log, None), QUIET_SECONDS)) is not None:
                        note_answer()
                        position = show(text, position)
                except TimeoutError:
                    pass
            job = await asyncio.to_thread(cluster.details, job_id)
            note_answer()
            if job.status.is_terminal():
                # Ray closes the connection when the job ends, perhaps before the last lines were sent.
                show(await asyncio.to_thread(cluster.ask, cluster.client.get_job_logs, job_id), 0)
                return job
        except (aiohttp.ClientError, OSError, RuntimeError) as error:  # RuntimeError: a broken connection, ClusterError
            silent = time.monotonic() - answered
            if silent > give_up_seconds:
                raise ClusterError(
                    f"no answer from {cluster.address} for {silent:.0f} s ({error}). The job continues if the cluster "
                    f"is still up; to follow it again: {_command(cluster, 'logs', job_id)}"
                ) from error
            if not failures:
                say(f"connection lost ({type(error).__name__}); the job continues, trying again")
            await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
            failures += 1


def show_log(cluster: Cluster, name: str, to_the_end: bool, give_up_seconds: float) -> int:
    """Show a job's log. Returns its exit code if followed to the end, else 0."""
    job_id = cluster.job(name).submission_id
    if to_the_end:
        return follow(cluster, job_id, give_up_seconds)
    _write(cluster.ask(cluster.client.get_job_logs, job_id))
    return 0


def show_status(cluster: Cluster, name: str) -> None:
    job = cluster.job(name)
    print(f"run      {run_name(job)}\njob      {job.submission_id}\nstate    {job.status.value}")
    if job.status.is_terminal():
        print(f"exit     {exit_code(job)}")
    print(f"started  {_clock(job.start_time)}\nended    {_clock(job.end_time)}")
    print(f"folder   {(job.metadata or {}).get(RUN_FOLDER, 'unknown: not submitted by rlkit')}")
    print(f"command  {job.entrypoint}")


def list_jobs(cluster: Cluster) -> None:
    rows = [("run", "state", "exit", "started", "job")]
    for job in cluster.jobs():
        code = str(exit_code(job)) if job.status.is_terminal() else ""
        rows.append((run_name(job), job.status.value, code, _clock(job.start_time), job.submission_id))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def stop(cluster: Cluster, name: str, stop_seconds: float) -> None:
    """Stop a job and wait for its end. Raises ClusterError if it does not end."""
    job = cluster.job(name)
    if job.status.is_terminal():
        return say(f"{run_name(job)} ({job.submission_id}) has already ended: {job.status.value.lower()}")
    cluster.ask(cluster.client.stop_job, job.submission_id)
    say(f"stopping {run_name(job)} ({job.submission_id}); its files stay in its run folder")
    # As set when the job was submitted.
    variables = (job.runtime_env or {}).get("env_vars") or {}
    deadline = time.monotonic() + float(variables.get("RAY_JOB_STOP_WAIT_TIME_S", stop_seconds)) + KILL_SECONDS
    while time.monotonic() < deadline:
        job = cluster.details(job.submission_id)
        if job.status.is_terminal():
            return say(_outcome(job))
        time.sleep(0.5)
    raise ClusterError(f"job {job.submission_id} has not ended: see Ray's logs/jobs/ on the cluster's head node")


def say(text: str) -> None:
    print(f"rlkit: {text}", file=sys.stderr)


def _command(cluster: Cluster, word: str, job_id: str) -> str:
    return f"python -m rlkit.submit {word} {job_id} cluster.address={cluster.address}"


def _outcome(job: Any) -> str:
    """Return how a job ended, with Ray's message if the run could not report anything itself."""
    seconds = max(0.0, ((job.end_time or 0) - (job.start_time or 0)) / 1000)
    text = f"{run_name(job)}: {job.status.value.lower()} after {seconds:.0f} s, exit code {exit_code(job)}"
    never_ran = job.status.value == "FAILED" and job.driver_exit_code is None
    return f"{text}\n{job.message}" if never_ran else text


def _clock(milliseconds: int | None) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S") if milliseconds else "-"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
