"""Without what trains, commands that need none of it work, and the others say what to install."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from rlkit.experience.extras import NotInstalledError, lacking_for_training, named_extra, refuse_without

HIDDEN = """
import json, os, sys
os.chdir(sys.argv[1])
absent = ["torch", "transformers", "deepspeed", "ray", "vllm", "accelerate", "datasets", "requests", "tensorboard"]
sys.modules.update(dict.fromkeys(absent))  # as if they were not installed
from rlkit.cli import main
codes = [main(words.split()) for words in json.loads(sys.argv[2])]
print(json.dumps(codes))
"""


def test_all_that_is_missing_is_named_at_once() -> None:
    assert lacking_for_training("json", "sys") == []
    (message,) = lacking_for_training("json", "no_such_a", "no_such_b")
    assert message.startswith("no_such_a, no_such_b are not installed; ")
    with pytest.raises(NotInstalledError, match=r"^no_such_a is not installed; .*: rlkit doctor prints the command"):
        refuse_without("json", "no_such_a")


def test_only_imports_of_what_an_extra_brings_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    said = named_extra(ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed.runtime"))
    assert said is not None
    assert said.startswith("deepspeed is not installed")
    assert named_extra(ModuleNotFoundError("No module named 'my_rewards'", name="my_rewards")) is None
    assert named_extra(ModuleNotFoundError("No module named 'json.x'", name="json.x")) is None
    assert named_extra(ValueError("no import")) is None


def test_commands_without_what_trains(tmp_path: Path) -> None:
    words = ["train dry_run=true environment=guess_number", "train", "train data=hf data.path=a/b dry_run=true"]
    words += ["submit list cluster.address=http://127.0.0.1:1"]
    command = [sys.executable, "-c", HIDDEN, str(tmp_path), json.dumps(words)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 1, 2, 1], done.stderr
    assert "chat template: torch, transformers, ray are not installed" in done.stderr
    assert "rlkit: torch, transformers, ray, deepspeed, vllm, tensorboard are not installed; " in done.stderr
    assert "data.path=a/b: the package datasets is not installed: pip install 'rlkit[hf]'" in done.stderr
    assert "rlkit: the package ray is not installed: pip install 'rlkit[ray]'" in done.stderr
