"""The cluster at an address: reached, of the same Ray, with the right token; its nodes and its jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from rlkit.experience import UserError
from rlkit.jobs.resources import Node

REQUEST_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
RUN_NAME = "rlkit_run"
"""Key in a job's metadata: the name of its run folder."""
RUN_FOLDER = "rlkit_run_dir"
TOKEN_HELP = (
    "give it in RAY_AUTH_TOKEN, or name its file in RAY_AUTH_TOKEN_PATH (default: ~/.ray/auth_token); it is the token "
    "that the cluster was started with"
)
NO_TOKEN = (
    "the cluster answers without a token: whoever reaches its ports can run code on it. Start it with "
    "RAY_AUTH_MODE=token (ray get-auth-token --generate), and keep the dashboard on 127.0.0.1"
)


class ClusterError(UserError, RuntimeError):
    """The cluster cannot be used; the message says why and what to do."""


class Cluster:
    """A connection that was checked. `client` is Ray's JobSubmissionClient whose requests have a deadline."""

    def __init__(self, address: str, client: Any, token: bool, ray_version: str) -> None:
        self.address, self.client, self.token, self.ray_version = address, client, token, ray_version

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        listed = self._get("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        return [
            Node(node["node_ip"], node["resources_total"].get("CPU", 0.0), node["resources_total"].get("GPU", 0.0))
            for node in listed
            if node["state"] == "ALIVE"
        ]

    def jobs(self) -> list[Any]:
        """Ray's JobDetails of all jobs that were submitted, the newest first."""
        found = [job for job in self.ask(self.client.list_jobs) if job.submission_id]
        return sorted(found, key=lambda job: -(job.start_time or 0))

    def job(self, name: str) -> Any:
        """The newest job of the run of that name, or the job of that id. Raises ClusterError if there is none."""
        jobs = self.jobs()
        for job in jobs:
            if name in (run_name(job), job.submission_id):
                return job
        known = ", ".join(dict.fromkeys(run_name(job) for job in jobs[:10])) or "none at all"
        raise ClusterError(f"{self.address} has no job of a run named {name}; it has: {known}")

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of Ray's client; ClusterError instead of its several errors."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return question(*arguments)
        except requests.RequestException as error:
            raise ClusterError(f"cluster.address={self.address}: no answer ({_reason(error)})") from error
        except (RuntimeError, AuthenticationError) as error:
            raise ClusterError(f"cluster.address={self.address}: {error}") from error

    def _get(self, endpoint: str) -> Any:
        response = self.ask(self.client._do_request, "GET", endpoint)
        if response.status_code != 200:
            raise ClusterError(f"{self.address}{endpoint} answers {response.status_code}: {response.text[:200]}")
        return response.json()


def connect(given: str | None) -> Cluster:
    """Reach the dashboard at `given` and check its Ray and the token. Raises ClusterError."""
    address = dashboard_address(given)
    token = _wants_token(address)
    # Ray would prefer these to the address it is given, and reads the third when it is imported.
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    if token and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
    import ray
    from ray.exceptions import AuthenticationError

    try:
        client = _client(address)
        version = client._do_request("GET", "/api/version").json()["ray_version"]
    except AuthenticationError as error:
        reason = "does not accept this token" if "Authentication failed" in str(error) else "asks for a token"
        raise ClusterError(f"cluster.address={address} {reason}: {TOKEN_HELP}") from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ClusterError(f"cluster.address={address}: Ray's job server does not answer ({_reason(error)})") from error
    if version != ray.__version__:
        raise ClusterError(
            f"cluster.address={address} runs Ray {version}, here is Ray {ray.__version__}: install the cluster's, "
            f"pip install 'ray[default]=={version}', or start the cluster with {ray.__version__}"
        )
    return Cluster(address, client, token, version)


def dashboard_address(given: str | None) -> str:
    """The dashboard's URL without a slash at its end. Raises ClusterError for what cannot be one."""
    text = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not text:
        raise ClusterError("cluster.address is needed: cluster.address=http://HOST:8265, the cluster's dashboard")
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"cluster.address={text} is no address of a dashboard; write http://HOST:8265 (port 6379 and ray:// are "
            "other doors of the cluster)"
        )
    return url.rstrip("/")


def run_name(job: Any) -> str:
    """The run's name, or the job's id if it was submitted by other means."""
    return str((job.metadata or {}).get(RUN_NAME, job.submission_id))


def _wants_token(address: str) -> bool:
    """Whether the cluster wants a token; asked before Ray is imported, which is when Ray decides to send one."""
    import requests

    try:
        response = requests.get(f"{address}/api/authentication_mode", timeout=REQUEST_SECONDS)
        mode = response.json()["authentication_mode"] if response.status_code == 200 else None
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"cluster.address={address}: no Ray dashboard answers ({_reason(error)}). Is the cluster up, with its "
            "dashboard, and is the port forwarded (ssh -L 8265:127.0.0.1:8265 HOST, or kubectl port-forward)?"
        ) from error
    return mode == "token"


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types here
        """Ray's requests have no deadline."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            seconds = UPLOAD_SECONDS if options.get("data") is not None else REQUEST_SECONDS
            return super()._do_request(method, endpoint, timeout=seconds, **options)

    return Client(address)


def _reason(error: BaseException) -> str:
    """The innermost cause in few words; requests nests them deeply."""
    text = str(getattr(error, "args", [error])[0] if error.args else error)
    for words in ("Connection refused", "Name or service not known", "timed out", "No route to host"):
        if words in text:
            return words.lower()
    return f"{type(error).__name__}: {text[:200]}"
