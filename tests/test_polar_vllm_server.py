"""POLAR against a real vLLM server process that serves the embedded discriminator."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.polar.reward import PolarReward
from rewards.polar.servers import ServerError
from rlkit.embedded import model_folder

pytestmark = pytest.mark.slow
START_SECONDS = 240


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of the server, started as docs/rewards.md says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
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
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
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


def test_a_vllm_server_scores_as_the_model_in_process_does_until_it_dies(
    server: tuple[str, subprocess.Popen[bytes]],
) -> None:
    url, process = server
    remote = PolarReward(
        PolarReward.Config(
            backend="http_vllm",
            urls=(url,),
            dtype="float32",
            tokens_per_request=256,
            max_references=2,
            timeout_seconds=5,
            request_timeout_seconds=4,
        ),
        RewardContext(),
    )  # type: ignore[call-arg]
    local = PolarReward(PolarReward.Config(max_references=2), RewardContext(threads=1))  # type: ignore[call-arg]
    remote.start()  # compares two canned inputs
    local.start()
    question = "A bus has 3 riders. 2 get off. How many?"
    groups = [
        make_group("a", ["3-2=1\n#### 1", "3+2=5\n#### 5", "", "#### 1"], question=question, references=("#### 1",)),
        make_group("b", ["six", "x" * 600], references=("6", "six " * 300)),
    ]
    for _ in range(2):  # the second time from the server's prefix cache
        for found, expected in zip(remote.score(groups), local.score(groups), strict=True):
            for one, other in zip(found.samples, expected.samples, strict=True):
                assert one.value == pytest.approx(other.value, abs=1e-3)
    values = [score.value for score in local.score(groups)[0].samples]
    assert max(values) - min(values) > 1, "scores that hardly differ would prove little"
    process.kill()
    process.wait(20)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"no scores for \d+ inputs within 4\.5 s"):
        remote.score(groups)
    assert time.monotonic() - started < 10
