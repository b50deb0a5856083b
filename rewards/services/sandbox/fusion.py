"""Sandboxes of a SandboxFusion-compatible service: `POST /run_code`."""

from __future__ import annotations

import base64
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Literal

import httpx

from rewards.services.http import (
    BlockingHttpClient,
    OutOfTimeError,
    RefusedError,
    TransientError,
    excerpt,
    json_body,
)
from rewards.services.http import Limits as HttpLimits
from rewards.services.sandbox.inside.service import unsealed
from rewards.services.sandbox.inside.wire import messages
from rewards.services.sandbox.isolation import Isolation, Job, Limits, Run, Unavailable

ANSWER_SECONDS = 15.0
"""Added to the code's time limit, for creating a sandbox."""
LONGEST_PAUSE = 20.0
CONCURRENT = 100
_SHOWN_CHARACTERS = 2000
_SERVE = (
    "import os, sys; sys.path.insert(0, os.getcwd()); "
    "from rewards.services.sandbox.inside.service import serve; serve()"
)


class SandboxFusion(Isolation):
    def __init__(self, url: str, limits: Limits, token_variable: str | None, max_tries: int) -> None:
        self._url = url.rstrip("/") + "/run_code"
        self._limits, self._token_variable, self._max_tries = limits, token_variable, max_tries
        self._client: BlockingHttpClient | None = None
        self._files = _inner_files()

    def check(self) -> None:
        """Check only the options: the service may not be up yet."""
        if not self._url.startswith(("http://", "https://")):
            raise Unavailable(f"url must start with http:// or https://, not {self._url!r}")
        if self._token_variable is not None and not os.environ.get(self._token_variable):
            raise Unavailable(f"the environment variable {self._token_variable} (token_variable) is not set")

    def start(self) -> None:
        """Run a program and a test in the service; raise Unavailable if that fails."""
        self.check()
        limits = HttpLimits(
            attempts=self._max_tries,
            try_seconds=self._limits.wall_seconds + ANSWER_SECONDS,
            concurrent=CONCURRENT,
            longest_pause=LONGEST_PAUSE,
        )
        token = os.environ[self._token_variable] if self._token_variable else None
        self._client = BlockingHttpClient([self._url], limits, token)
        deadline = time.monotonic() + self._limits.wall_seconds + 2 * ANSWER_SECONDS
        try:
            printed = self.run_program("print(6 * int(input()))", "7", deadline)
            job = {"code": "def f(x): return -x", "setup": ""}
            tested = self.run_tests(job, {"tests": ["assert f(1) == -1"], "setup": "", "entry_point": None}, deadline)
        except TimeoutError as error:
            raise Unavailable(f"{self._url} did not answer in time") from error
        if printed.stdout.strip() != b"42" or tested.results != ([0, "passed", ""],):
            raise Unavailable(f"{self._url} runs code, but gets wrong results: {printed} {tested}")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def run_program(self, code: str, stdin: str, deadline: float) -> Run:
        return self._run(code, stdin, {}, deadline)

    def run_calls(self, job: Job, deadline: float) -> Run:
        return self._run_inner({"role": "calls", "job": job}, deadline)

    def run_tests(self, solution: Job, tests: Job, deadline: float) -> Run:
        return self._run_inner({"role": "tests", "solution": solution, "tests": tests}, deadline)

    def _run_inner(self, job: Job, deadline: float) -> Run:
        key = secrets.token_hex(16)
        run = self._run(_SERVE, json.dumps({**job, "key": key}), self._files, deadline)
        answer = tuple(messages(unsealed(run.stdout, key)))  # the first one is `ready`
        if run.ended == "exit" and not answer:
            raise Unavailable(f"the service could not run the inner process: {run.stderr[-500:]}")
        return Run(run.ended, run.exit_code, b"", run.stderr, answer[1:])

    def _run(self, code: str, stdin: str, files: dict[str, str], deadline: float) -> Run:
        assert self._client is not None, "start() first"
        request = {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "files": files,
            "compile_timeout": self._limits.wall_seconds,
            "run_timeout": self._limits.wall_seconds,
            "memory_limit_MB": self._limits.memory_mib,
        }
        try:
            return self._client.post(json_body(request), deadline, _outcome)
        except OutOfTimeError as error:
            if error.last is None:
                raise TimeoutError from error
            raise Unavailable(self._trouble(error.last)) from error
        except TransientError as error:
            raise Unavailable(self._trouble(error)) from error
        except RefusedError as error:
            raise Unavailable(f"{self._url} refuses the request with {error.status}: {error.answer}") from error

    def _trouble(self, error: TransientError) -> str:
        if error.timed_out:
            return f"{self._url} did not answer within {self._limits.wall_seconds + ANSWER_SECONDS:g} s"
        if error.status is None:
            return f"{self._url} cannot be reached: {error.problem}"
        return error.problem if error.status == 200 else f"{self._url} answered {error.status}: {error.answer}"


def _outcome(response: httpx.Response) -> Run:
    try:
        return _run_of(response.json(), str(response.url))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"{response.url} does not answer like SandboxFusion: {excerpt(response)}") from error


def _run_of(answer: dict[str, Any], url: str) -> Run:
    failed = "the service's sandbox failed: "
    if answer["status"] == "SandboxError":
        raise TransientError(url, f"{failed}{str(answer.get('message'))[:500]}", 200)
    run: dict[str, Any] = answer["run_result"]
    compiled = answer.get("compile_result")
    if compiled is not None and (compiled["status"] != "Finished" or compiled["return_code"] != 0):
        run = compiled
    if run["status"] == "Error":
        raise TransientError(url, f"{failed}{str(run.get('stderr'))[:500]}", 200)
    ends: dict[str, Literal["exit", "timeout"]] = {"Finished": "exit", "TimeLimitExceeded": "timeout"}
    stderr = (run.get("stderr") or "")[-_SHOWN_CHARACTERS:]
    return Run(ends[run["status"]], run.get("return_code"), (run.get("stdout") or "").encode(), stderr)


def _inner_files() -> dict[str, str]:
    folders = ("rewards", "rewards/services", "rewards/services/sandbox")
    files = {f"{folder}/__init__.py": "" for folder in folders}
    for source in (Path(__file__).parent / "inside").glob("*.py"):
        files[f"rewards/services/sandbox/inside/{source.name}"] = base64.b64encode(source.read_bytes()).decode()
    return files
