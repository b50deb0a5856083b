"""POLAR against a real vLLM server process that serves the embedded discriminator."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from polar_server import vllm_server
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.polar.reward import PolarReward
from rewards.polar.servers import ServerError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of the server."""
    with vllm_server(tmp_path_factory.mktemp("vllm") / "server.log") as started:
        yield started


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
