"""Sandboxes of a SandboxFusion-compatible service: `POST /run_code`, retried where the service is to blame."""

from __future__ import annotations

import base64
import json
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rewards.services.sandbox.inside.wire import messages
from rewards.services.sandbox.isolation import Isolation, Job, Limits, Run, Unavailable

if TYPE_CHECKING:
    import httpx

ANSWER_SECONDS = 15.0
"""What the service may take beyond the code's own time: waiting for a free sandbox, making it."""
_SHOWN_CHARACTERS = 2000
_SERVE = (
    "import os, sys; sys.path.insert(0, os.getcwd()); "
    "from rewards.services.sandbox.inside.service import serve; serve()"
)


class _ServiceTrouble(Unavailable):
    """A failure that may pass: no connection, 429, 5xx, an error of the service's sandbox."""


class SandboxFusion(Isolation):
    """A client of the service. How well the service isolates is the service's affair; see docs/rewards.md.

    >>> sandbox = SandboxFusion("http://127.0.0.1:8080", limits, token_variable=None, max_tries=4)
    >>> sandbox.start()
    """

    def __init__(self, url: str, limits: Limits, token_variable: str | None, max_tries: int) -> None:
        self._url = url.rstrip("/") + "/run_code"
        self._limits, self._token_variable, self._max_tries = limits, token_variable, max_tries
        self._client: httpx.Client | None = None
        self._files = _inner_files()

    def check(self) -> None:
        """The options only: the service may not be up yet where a configuration is looked at."""
        if not self._url.startswith(("http://", "https://")):
            raise Unavailable(f"reward.url must start with http:// or https://, not {self._url!r}")
        if self._token_variable is not None and not os.environ.get(self._token_variable):
            raise Unavailable(f"the environment variable {self._token_variable} (reward.token_variable) is not set")

    def start(self) -> None:
        """Connect, and let a program and a test run there. Raises Unavailable."""
        import httpx

        self.check()
        token = os.environ[self._token_variable] if self._token_variable else None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers)
        deadline = time.monotonic() + self._limits.wall_seconds + 2 * ANSWER_SECONDS
        try:
            printed = self.run_program("print(6 * int(input()))", "7", deadline)
            job = {"code": "def f(x): return -x", "setup": ""}
            tested = self.run_tests(job, {"tests": ["assert f(1) == -1"], "setup": "", "entry_point": None}, deadline)
        except TimeoutError as error:
            raise Unavailable(f"{self._url} did not answer in time") from error
        if printed.stdout.strip() != b"42" or tested.results != ([0, "passed", ""],):
            raise Unavailable(f"{self._url} runs code, but not rightly: {printed} {tested}")

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def run_program(self, code: str, stdin: str, deadline: float) -> Run:
        """A program with its standard input."""
        return self._run(code, stdin, {}, deadline)

    def run_calls(self, job: Job, deadline: float) -> Run:
        """Calls of a function."""
        return self._run_inner({"role": "calls", "job": job}, deadline)

    def run_tests(self, solution: Job, tests: Job, deadline: float) -> Run:
        """Tests and solution in two processes of one sandbox of the service."""
        return self._run_inner({"role": "tests", "solution": solution, "tests": tests}, deadline)

    def _run_inner(self, job: Job, deadline: float) -> Run:
        mark = secrets.token_hex(16)
        run = self._run(_SERVE, json.dumps({**job, "mark": mark}), self._files, deadline)
        _, found, answer = run.stdout.partition(mark.encode() + b"\n")
        if run.ended == "exit" and not found:
            raise Unavailable(f"the service could not run the inner process: {run.stderr[-500:]}")
        return Run(run.ended, run.exit_code, b"", run.stderr, tuple(messages(answer)))

    def _run(self, code: str, stdin: str, files: dict[str, str], deadline: float) -> Run:
        import tenacity

        trouble = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_ServiceTrouble),
            stop=tenacity.stop_after_attempt(self._max_tries)
            | tenacity.stop_before_delay(max(0.0, deadline - time.monotonic())),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=20.0),
            reraise=True,
        )
        request = {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "files": files,
            "compile_timeout": self._limits.wall_seconds,
            "run_timeout": self._limits.wall_seconds,
            "memory_limit_MB": self._limits.memory_mib,
        }
        return trouble(self._post, request, deadline)

    def _post(self, request: dict[str, Any], deadline: float) -> Run:
        import httpx

        assert self._client is not None, "start() first"
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        own = self._limits.wall_seconds + ANSWER_SECONDS
        try:
            response = self._client.post(self._url, json=request, timeout=min(own, remaining))
        except httpx.TimeoutException as error:
            if remaining < own:
                raise TimeoutError from error
            raise _ServiceTrouble(f"{self._url} did not answer within {own:g} s") from error
        except httpx.RequestError as error:  # with DecodingError: a body that is not the gzip it says
            raise _ServiceTrouble(f"{self._url} cannot be reached: {type(error).__name__}: {error}") from error
        if response.status_code == 429 or response.status_code >= 500:
            raise _ServiceTrouble(f"{self._url} answered {response.status_code}: {response.text[:200]}")
        if response.status_code >= 300:
            raise Unavailable(f"{self._url} refuses the request with {response.status_code}: {response.text[:200]}")
        try:
            return _outcome(response.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable(f"{self._url} does not answer like SandboxFusion: {response.text[:200]}") from error


def _outcome(answer: dict[str, Any]) -> Run:
    """SandboxFusion's answer as a Run."""
    if answer["status"] == "SandboxError":
        raise _ServiceTrouble(f"the service's sandbox failed: {str(answer.get('message'))[:500]}")
    run: dict[str, Any] = answer["run_result"]
    compiled = answer.get("compile_result")
    if compiled is not None and (compiled["status"] != "Finished" or compiled["return_code"] != 0):
        run = compiled
    if run["status"] == "Error":
        raise _ServiceTrouble(f"the service's sandbox failed: {str(run.get('stderr'))[:500]}")
    ends: dict[str, Literal["exit", "timeout"]] = {"Finished": "exit", "TimeLimitExceeded": "timeout"}
    stderr = (run.get("stderr") or "")[-_SHOWN_CHARACTERS:]
    return Run(ends[run["status"]], run.get("return_code"), (run.get("stdout") or "").encode(), stderr)


def _inner_files() -> dict[str, str]:
    """The inner programs as base64, by the path that they have beside the program."""
    folders = ("rewards", "rewards/services", "rewards/services/sandbox")
    files = {f"{folder}/__init__.py": "" for folder in folders}
    for source in (Path(__file__).parent / "inside").glob("*.py"):
        files[f"rewards/services/sandbox/inside/{source.name}"] = base64.b64encode(source.read_bytes()).decode()
    return files
