"""Checkpoints are sealed beside the next step; what fails there, and a full disk, ends the run with one message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlkit.checkpoint.checkpointer import Checkpointer
from rlkit.checkpoint.folder import BadCheckpointError, DiskFullError, open_checkpoint
from rlkit.config.loading import load_config
from rlkit.config.parts import config_text
from rlkit.tracking.run_folder import RunFolder
from rlkit.weights.bundle import TensorMeta
from rlkit.weights.tensor_file import WrittenFile, write_tensors

Work = Callable[[Path], Awaitable[None]]


async def nothing(path: Path) -> None: ...


def write(path: Path) -> WrittenFile:
    path.parent.mkdir(exist_ok=True)
    tensor = torch.ones(1000)
    return write_tensors(path, [TensorMeta("w", tensor.dtype, tuple(tensor.shape))], [("w", tensor)])


class Parts:
    """A run whose learner writes one tensor and whose reward does as the test says."""

    def __init__(self, size: int = 0, reward: Work = nothing) -> None:
        self.producer = self.learner = self.policy = self.reward = self
        self.buffer: Any = SimpleNamespace(state_dict=lambda: {"ready": []})
        self.size, self.work = size, reward

    def state_dict(self) -> dict[str, Any]:
        return {"open": [], "order": {}, "version": 2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    async def checkpoint_bytes(self) -> int:
        return self.size

    async def save(self, folder: Path) -> list[WrittenFile]:
        if folder.name != "policy":
            await self.work(folder)
            return []
        written = write(folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        return [written]

    async def save_state(self, path: Path) -> Any:
        return {"learner": {"version": 2}}, [write(path / "learner.safetensors")] if path.is_dir() else None


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    config = load_config(["reward=rule", f"run_dir={tmp_path / 'run'}"]).config
    return Checkpointer(config, RunFolder(config.run_dir, resume=False))


def partial(checkpointer: Checkpointer) -> list[Path]:
    return list(checkpointer.folder.checkpoints.glob(".*"))


def test_it_is_sealed_in_the_background_and_holds_the_hashes(checkpointer: Checkpointer) -> None:
    async def steps() -> None:
        await checkpointer.save(2, Parts(), None)
        assert not (checkpointer.folder.checkpoints / "step_000002").exists()  # the loop has not turned yet
        await checkpointer.save(3, Parts(), None)  # waits for the one before
        assert (checkpointer.folder.checkpoints / "step_000002").exists()
        await checkpointer.finish()
        await checkpointer.finish()  # there is nothing left to wait for

    asyncio.run(steps())
    manifest = open_checkpoint(checkpointer.folder.checkpoints / "step_000003").manifest
    assert set(manifest["files"]) == {
        "learner.safetensors",
        "policy/config.json",
        "policy/model.safetensors",
        "run.json",
        "run.yaml",
    }
    typed = [f"run_dir={checkpointer.config.run_dir}", "resume=auto"]
    again = load_config(typed, checkpointer.folder.checkpoints / "step_000003/run.yaml").config
    assert config_text(again.model_copy(update={"resume": "never"})) == config_text(checkpointer.config)
    assert partial(checkpointer) == []


def test_what_fails_in_the_background_is_raised_at_the_next_step(checkpointer: Checkpointer) -> None:
    async def lose(folder: Path) -> None:
        (folder.parent / "policy" / "model.safetensors").write_bytes(b"short")

    async def steps() -> None:
        await checkpointer.save(2, Parts(reward=lose), {})
        checkpointer.check()  # not known yet
        while checkpointer._sealing is not None and not checkpointer._sealing.done():
            await asyncio.sleep(0.01)
        with pytest.raises(BadCheckpointError, match=r"has 5 bytes; .* were written"):
            checkpointer.check()
        await checkpointer.finish()  # raised once

    asyncio.run(steps())
    assert partial(checkpointer) == []


def test_a_checkpoint_that_has_no_room_is_not_begun(checkpointer: Checkpointer) -> None:
    with pytest.raises(DiskFullError) as raised:
        asyncio.run(checkpointer.save(7, Parts(size=2**60), {}))
    message = str(raised.value)
    assert f"step 7 in {checkpointer.folder.checkpoints}" in message and f"({2**60} bytes)" in message
    assert "trainer.keep_checkpoints" in message and "resume=auto" in message
    assert partial(checkpointer) == []


async def full_disk(folder: Path) -> None:
    folder.mkdir()
    (folder / "state").symlink_to("/dev/full")
    write(folder / "state")


async def full_disk_by_torch(folder: Path) -> None:
    torch.save({"w": torch.ones(100_000)}, "/dev/full")


@pytest.mark.parametrize("work", [full_disk, full_disk_by_torch])
def test_a_disk_that_fills_up_leaves_no_partial_folder(checkpointer: Checkpointer, work: Work) -> None:
    with pytest.raises(DiskFullError, match="no room for the checkpoint of step 7"):
        asyncio.run(checkpointer.save(7, Parts(reward=work), {}))
    assert partial(checkpointer) == []


def test_another_error_is_raised_as_it_is(checkpointer: Checkpointer) -> None:
    async def broken(folder: Path) -> None:
        json.loads("{")

    with pytest.raises(json.JSONDecodeError):
        asyncio.run(checkpointer.save(7, Parts(reward=broken), {}))
    assert partial(checkpointer) == []
