"""A Ray cluster of the test's own, with a token and a job server on the loopback interface, and the submit command."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "RLKIT_TEST_CLUSTER"


class RayCluster:
    """`ray start --head --block` in a process of its own. Nothing else on the machine is touched when it ends."""

    def __init__(self, token: bool = True) -> None:
        self.mark = uuid.uuid4().hex
        self.token = secrets.token_hex(16) if token else None
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.folder = tempfile.mkdtemp(prefix="rlkit-", dir="/tmp")  # short: Ray's socket names go below it
        self.log = Path(self.folder) / "ray.log"
        self.process = self._start()

    def environment(self) -> dict[str, str]:
        """For processes that talk to this cluster."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        authentication = {"RAY_AUTH_TOKEN": self.token} if self.token else {}
        return {**others, **authentication, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "HOME": self.folder}

    def _start(self) -> subprocess.Popen[bytes]:
        ports = {"dashboard-port": self.port, "ray-client-server-port": free_port(), "port": 0}
        ports |= {"min-worker-port": 0, "max-worker-port": 0, "dashboard-agent-listen-port": 0}
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=150000000", f"--temp-dir={self.folder}/ray"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--{name}={number}" for name, number in ports.items()]
        environment = {
            **self.environment(),
            "RAY_AUTH_MODE": "token" if self.token else "disabled",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # as in an activated environment
            MARK: self.mark,
        }
        environment.pop("PYTHONPATH")  # the job's code is what was uploaded
        with self.log.open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self, seconds: float = 120) -> None:
        """Until the job server answers and a node is there."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(f"{self.address}/api/v0/nodes", headers=headers)
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(request, timeout=5) as response:
                    if b'"ALIVE"' in response.read():
                        return
            except OSError:
                pass
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that belongs to this cluster."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def end(self) -> None:
        """Stop exactly what this cluster started (`ray stop` would stop every Ray of the machine)."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self) -> Any:
        """Ray's job client, for jobs that are not runs; in this process, so that it costs no start of Python."""
        return HttpJobs(self)


class HttpJobs:
    """The two requests that tests need, without importing Ray, which reads the token when it is imported."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster

    def submit(self, entrypoint: str, name: str, **environment: str) -> str:
        """Start a command as a job of the run `name`."""
        import requests

        body = {
            "entrypoint": entrypoint,
            "submission_id": f"{name}-{uuid.uuid4().hex[:6]}",
            "metadata": {"rlkit_run": name, "rlkit_run_dir": f"/tmp/{name}"},
            "runtime_env": {"env_vars": environment} if environment else {},
        }
        headers = {"Authorization": f"Bearer {self.cluster.token}"} if self.cluster.token else {}
        response = requests.post(f"{self.cluster.address}/api/jobs/", json=body, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        return str(response.json()["submission_id"])


def submit_command(cluster: RayCluster, *arguments: str, cwd: Path = ROOT, address: str = "") -> subprocess.Popen[str]:
    """`python -m rlkit.submit ...` in the background."""
    command = [sys.executable, "-m", "rlkit.submit", *arguments, f"cluster.address={address or cluster.address}"]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**cluster.environment(), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Wire:
    """A TCP connection to the job server that can be cut and mended."""

    def __init__(self, to_port: int) -> None:
        self.to_port, self.port = to_port, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.accepted = 0
        self.mend()

    def mend(self) -> None:
        """Accept connections (again)."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection at once, without a word, and refuse new ones."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            far = socket.create_connection(("127.0.0.1", self.to_port))
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
