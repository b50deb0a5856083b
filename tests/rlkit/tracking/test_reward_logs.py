"""What a reward prints, logs and writes past Python goes to a file of the run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REWARD = """
import logging
import os

from rewards.base import Reward


class Talkative(Reward):
    def start(self):
        print("printed")
        logging.getLogger("some.library").warning("logged")
        os.write(2, b"written past Python\\n")

    def score(self, groups):
        return []
"""


def test_a_reward_worker_writes_to_its_log(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD)
    log = tmp_path / "logs" / "reward-0.log"
    code = (
        f"import sys; sys.path[:0] = [{str(repository)!r}, {str(tmp_path)!r}]\n"
        "from rewards.base import RewardContext\n"
        "from rlkit.serving.worker import RewardWorker\n"
        f"RewardWorker('my_rewards.Talkative', {{}}, RewardContext(), {str(log)!r}).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    for text in ("printed", "logged", "written past Python"):
        assert text in log.read_text()
