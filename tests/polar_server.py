"""Servers that run a discriminator: a real vLLM process, and small ones that answer as SGLang and LMDeploy do, with the
scores of a real model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlkit.models.folder import model_folder

START_SECONDS = 240
Scorer = Callable[[Sequence[Sequence[int]]], list[float]]


def sglang_answer(scores: Sequence[float], _: Any) -> Any:
    """A list, one object per input."""
    return [{"embedding": [score], "meta_info": {"id": f"{i}", "prompt_tokens": 3}} for i, score in enumerate(scores)]


def lmdeploy_answer(scores: Sequence[float], body: Any) -> Any:
    """An OpenAI-like list; here in another order than the inputs, which the index puts right."""
    data = [{"index": i, "object": "pooling", "data": score} for i, score in enumerate(scores)]
    return {"id": "x", "object": "list", "created": 1, "model": body.get("model", ""), "data": data[::-1], "usage": {}}


FORMATS: dict[str, tuple[str, str, Callable[[Sequence[float], Any], Any]]] = {
    "http_sglang": ("/classify", "input_ids", sglang_answer),
    "http_lmdeploy": ("/pooling", "input", lmdeploy_answer),
}
"""Backend -> path, key of the inputs, answer."""


class FakeServer:
    """What it was asked, and how it misbehaves."""

    def __init__(self, kind: str, scorer: Scorer) -> None:
        self.path, self.key, self.answer = FORMATS[kind]
        self.scorer = scorer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]] = []
        """Each is tried on a request, first to last; the first that returns True has answered it and is removed."""
        self.always: Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool] | None = None
        self.open, self.most_open = 0, 0
        self.lock = threading.Lock()
        self.url = ""

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            fault = self.faults.pop(0) if self.faults else None
        try:
            if handler.path != self.path:
                reply(handler, 404, {"detail": "Not Found"})
            elif not ((fault and fault(handler, body)) or (self.always and self.always(handler, body))):
                reply(handler, 200, self.answer(self.scorer(body[self.key]), body))
        finally:
            with self.lock:
                self.open -= 1


def reply(handler: BaseHTTPRequestHandler, status: int, answer: Any) -> None:
    """Send a JSON answer (or the text or the bytes themselves)."""
    text = answer if isinstance(answer, str | bytes) else json.dumps(answer)
    content = text if isinstance(text, bytes) else text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def status(code: int, text: Any = "busy") -> Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]:
    """A fault: this status."""

    def fault(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> bool:
        reply(handler, code, text)
        return True

    return fault


def hang_up(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> bool:
    """A fault: close the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    handler.close_connection = True
    return True


def no_gzip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> bool:
    """A fault: a body that is not compressed as its header says."""
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", "7")
    handler.end_headers()
    handler.wfile.write(b"no gzip")
    return True


def trickle(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> bool:
    """A fault: a byte now and then, for ever (until the client leaves)."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        for _i in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass
    handler.close_connection = True
    return True


@contextmanager
def fake_server(kind: str, scorer: Scorer, port: int = 0) -> Iterator[FakeServer]:
    """A server on loopback for the length of the block."""
    fake = FakeServer(kind, scorer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fake.take(self)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def vllm_server(log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of a vLLM server for the embedded discriminator, started as docs/rewards/polar.md says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model_folder("embedded:polar")),
    ]
    command += ["--runner", "pooling", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        _end_group(process.pid)  # its engine outlives a server that was killed


def _end_group(group: int) -> None:
    """Of a leader that has ended; what ignores SIGTERM is killed."""
    end = time.monotonic() + 20
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.2)
        os.killpg(group, signal.SIGKILL)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no server within {START_SECONDS} s: {log.read_text()[-2000:]}")
