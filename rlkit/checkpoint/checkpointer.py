"""Saves and restores everything a run needs to resume: models, optimizers, data position, buffer, versions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlkit.checkpoint.folder import (
    RUN_CONFIG,
    RUN_STATE,
    Sealed,
    disk_full,
    is_disk_full,
    prune,
    remove_partial,
    seal,
    set_aside_after,
    stage,
)
from rlkit.config.parts import config_text
from rlkit.config.schema import RunConfig
from rlkit.experience import Group
from rlkit.experience.records import from_json, to_json
from rlkit.experience.waiting_buffer import WaitingBuffer
from rlkit.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from rlkit.weights.tensor_file import WrittenFile

REWARD_STATE = "reward_state.pt"


class SavedRun(Protocol):
    producer: Any
    buffer: WaitingBuffer
    learner: Any
    reward: Any

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Checkpointer:
    """For use between two steps, when no work for the next has begun (or, with staleness, only work that can be
    requested again)."""

    config: RunConfig
    folder: RunFolder
    _sealing: asyncio.Task[None] | None = None

    async def save(self, step: int, run: SavedRun, best: float | None) -> None:
        """Write what `checkpoints/step_NNNNNN` holds; sync, seal, rename and prune in the background.

        `best`: latest value of the metric by which checkpoints are compared. Raises DiskFullError, and any error from
        sealing the previous checkpoint.
        """
        await self.finish()
        needed = await run.learner.checkpoint_bytes()
        staged = await asyncio.to_thread(stage, self.folder.checkpoints, step, needed)
        try:
            required, written = await self._write(staged, run)
        except Exception as error:
            await self._give_up(step, needed, error)
            raise
        about = {
            "step": step,
            "created": time.time(),
            "best": best,
            "config": self.config.model_dump(mode="json"),
        }
        self._sealing = asyncio.create_task(self._seal(step, needed, staged, about, required, written))

    def check(self) -> None:
        """Raise any error from the background task."""
        if self._sealing is not None and self._sealing.done():
            sealing, self._sealing = self._sealing, None
            sealing.result()

    async def finish(self) -> None:
        """Wait until the last saved checkpoint is sealed; raise any error."""
        if self._sealing is not None:
            await asyncio.wait([self._sealing])
        self.check()

    async def _write(self, staged: Path, run: SavedRun) -> tuple[list[str], list[WrittenFile]]:
        """Return the names of the required files, and the files that were hashed while they were written."""
        producer, buffer = run.producer.state_dict(), run.buffer.state_dict()
        ready = {group.id for group in buffer["ready"]}
        producer["open"] = [entry for entry in producer["open"] if entry["id"] not in ready]
        # Data columns may hold anything; they are restored from the data.
        buffer["ready"] = [replace(group, prompt=replace(group.prompt, columns={})) for group in buffer["ready"]]
        weights = await run.learner.policy.save(staged / "policy")
        counters, states = await run.learner.save_state(staged)
        await run.reward.save(staged / "reward")
        await run.reward.save_state(staged / REWARD_STATE)
        state = {
            **run.state_dict(),
            "learner": counters,
            "producer": producer,
            "buffer": buffer,
            "files": await asyncio.to_thread(self.folder.sizes),
        }
        (staged / RUN_STATE).write_text(json.dumps(to_json(state)), encoding="utf-8")
        (staged / RUN_CONFIG).write_text(config_text(self.config), encoding="utf-8")
        tensors = [f"{name}.safetensors" for name in counters]
        return [RUN_STATE, RUN_CONFIG, "policy/config.json", *tensors], [*weights, *states]

    async def _seal(
        self,
        step: int,
        needed: int,
        staged: Path,
        about: Mapping[str, Any],
        required: Sequence[str],
        written: Sequence[WrittenFile],
    ) -> None:
        try:
            await asyncio.to_thread(seal, staged, about, required, written)
            await asyncio.to_thread(prune, self.folder.checkpoints, self.config.trainer.keep_checkpoints)
        except Exception as error:
            await self._give_up(step, needed, error)
            raise

    async def _give_up(self, step: int, needed: int, error: Exception) -> None:
        """Remove what was written. Raises DiskFullError if a full disk was the reason."""
        full = disk_full(self.folder.checkpoints, step, needed) if is_disk_full(error) else None
        await asyncio.to_thread(remove_partial, self.folder.checkpoints)
        if full is not None:
            raise full from error

    def _too_old(self, group: Group) -> bool:
        """Whether the group is too stale for the step it was sampled for, because `trainer.max_staleness` was larger
        then."""
        oldest = min(sample.policy_versions[0] for sample in group.samples)
        return self.config.rollout.source == "policy" and group.step - 1 - oldest > self.config.trainer.max_staleness

    async def restore(self, checkpoint: Sealed, run: SavedRun) -> None:
        """Restore all freshly started parts. Raises DataError if the data differ from the checkpoint's."""
        await asyncio.to_thread(remove_partial, self.folder.checkpoints)
        state: dict[str, Any] = from_json(checkpoint.run_state)
        prompts = run.producer.order.named({group.prompt.id for group in state["buffer"]["ready"]})
        run.load_state_dict(state)
        run.producer.load_state_dict(state["producer"])
        ready = [replace(group, prompt=prompts[group.prompt.id]) for group in state["buffer"]["ready"]]
        old = [group for group in ready if self._too_old(group)]
        state["buffer"]["ready"] = [group for group in ready if not self._too_old(group)]
        run.buffer.load_state_dict(state["buffer"])
        run.producer.ask_again([(group.id, group.prompt.id) for group in old], checkpoint.step + 1)
        await run.learner.load_state(checkpoint.path, state["learner"])
        await run.reward.load_state(checkpoint.path / REWARD_STATE)
        # The folder is only changed now, when nothing can fail any more.
        if checkpoint.path.parent == self.folder.checkpoints:
            self.folder.keep_only(state["files"], checkpoint.step)
            await asyncio.to_thread(set_aside_after, self.folder.checkpoints, checkpoint.step)
        else:
            self.folder.keep_only({})
