"""`reward=judge` against a real vLLM server process, whose guided decoding makes even the embedded policy a judge."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.judge.base import JudgeError
from rewards.judge.reward import JudgeReward
from rlkit.models.folder import EMBEDDED

pytestmark = pytest.mark.slow

START_SECONDS = 400
OPTIONS = {"model": "policy", "reasons": False, "max_answer_tokens": 48, "max_reasks": 0, "principle": "Is it right?"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(EMBEDDED / "policy")]
    command += ["--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    # Where JSON may hold white space, so small a model writes line breaks until its answer is full.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings, "TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for survivor in left:  # an engine outlives a server that was killed
            survivor.kill()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE:
            pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"no server within {START_SECONDS} s: {log.read_text()[-2000:]}")


@pytest.mark.parametrize("mode", ["pointwise", "pairwise", "listwise"])
def test_a_vllm_server_judges(url: str, mode: str) -> None:
    reward = JudgeReward(JudgeReward.Config(base_url=url, mode=mode, probe="off", **OPTIONS), RewardContext())
    reward.start()
    try:
        (scores,) = reward.score([make_group("g", ["#### 42", "#### 41", ":"], references=["42"])])
        values = [sample.value for sample in scores.samples]
        assert all(value is not None and 0 <= value <= 1 for value in values), scores
        assert values[2] == 0.0
        assert reward.score([make_group("g", ["#### 42", "#### 41", ":"], references=["42"])]) == [scores]
    finally:
        reward.close()


def test_a_prompt_that_does_not_fit_is_refused_by_the_server_and_invalid(url: str) -> None:
    reward = JudgeReward(JudgeReward.Config(base_url=url, probe="off", **OPTIONS), RewardContext())
    reward.start()
    try:
        (scores,) = reward.score([make_group("g", ["#### 42 " * 500])])
        assert scores.samples[0].reason.startswith("refused: the judge answered 400")
    finally:
        reward.close()


def test_the_probe_refuses_a_judge_that_knows_nothing(url: str) -> None:
    reward = JudgeReward(JudgeReward.Config(base_url=url, **OPTIONS), RewardContext())
    with pytest.raises(JudgeError, match="failed the probe"):
        reward.start()
    reward.close()
