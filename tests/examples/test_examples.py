"""The examples run: own reward, algorithm and data in one run; GSM8K and PRIME as their pages spell them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from paths import ROOT, SHARED
from run_fixture import Run

EXAMPLES = ROOT / "examples"
OWN = {
    "reward": "examples.own_reward.reward.BriefAndRight",
    "algorithm": "examples.own_algorithm.algorithm.BestOfGroup",
    "data": "examples.own_data.data.Sums",
}


@pytest.mark.slow
def test_own_parts_train_together(tmp_path: Path) -> None:
    parts = [f"{kind}._target_={path}" for kind, path in OWN.items()]
    run = Run(tmp_path, *parts, "trainer.total_steps=2", "data.problems=64", "reward.price_per_token=0.001")
    try:
        assert run.end() == 0, run.text
        steps = [record for record in run.records() if record["kind"] == "step"]
        assert len(steps) == 2
        assert {"reward/component/right", "reward/component/price", "advantage/zero_share"} <= steps[0].keys()
        assert json.loads((run.folder / "summary.json").read_text())["reward_failed"] == 0
    finally:
        run.clean_up()


@pytest.mark.slow
@pytest.mark.parametrize("example", ["gsm8k", "prime"])
def test_the_command_of_the_page(example: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\npython -m rlkit\.train (.*?)\n```", (EXAMPLES / example / "README.md").read_text())
    arguments = [word.replace("train.jsonl", str(SHARED / "data/gsm8k/train.jsonl")) for word in block.split()]
    run = Run(tmp_path, *arguments, "trainer.total_steps=2", "rollout.max_response_tokens=128")
    try:
        assert run.end() == 0, run.text
        assert sum(record["kind"] == "step" for record in run.records()) == 2
    finally:
        run.clean_up()


@pytest.mark.parametrize("path", OWN.values())
def test_an_example_is_short(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).__doc__
    assert len((ROOT / (module.replace(".", "/") + ".py")).read_text().splitlines()) <= 50


def test_every_example_has_a_short_page() -> None:
    folders = [
        folder for folder in EXAMPLES.iterdir() if folder.is_dir() and folder.name not in ("__pycache__", "kuberay")
    ]
    assert len(folders) >= 7
    for folder in folders:
        assert len((folder / "README.md").read_text().splitlines()) <= 30, folder
