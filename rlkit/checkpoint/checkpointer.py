"""Saves and restores everything a run needs to resume: models, optimizers, data position, buffer, versions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlkit.checkpoint.folder import RUN_STATE, Sealed, prune, remove_partial, seal, set_aside_after, stage
from rlkit.config.schema import RunConfig
from rlkit.experience.records import from_json, to_json
from rlkit.tracking.run_folder import RunFolder

REWARD_STATE = "reward_state.pt"


class SavedRun(Protocol):
    producer: Any
    buffer: Any
    learner: Any
    reward: Any

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Checkpointer:
    """For use between two steps, when nothing of the next has begun (or, with staleness, may be asked for again)."""

    config: RunConfig
    folder: RunFolder

    async def save(self, step: int, run: SavedRun, metrics: Mapping[str, float]) -> Sealed:
        """Write, seal and rename `checkpoints/step_NNNNNN`, then remove old ones. `metrics`: the latest known."""
        staged = await asyncio.to_thread(stage, self.folder.checkpoints, step)
        producer, buffer = run.producer.state_dict(), await run.buffer.state_dict.remote()
        ready = {group.id for group in buffer["ready"]}
        producer["open"] = [entry for entry in producer["open"] if entry["id"] not in ready]
        # Data columns may be anything; they come back from the data.
        buffer["ready"] = [replace(group, prompt=replace(group.prompt, columns={})) for group in buffer["ready"]]
        await run.learner.policy.save(staged / "policy")
        counters = await run.learner.save_state(staged)
        await run.reward.save(staged / "reward")
        await run.reward.save_state(staged / REWARD_STATE)
        state = {
            **run.state_dict(),
            "learner": counters,
            "producer": producer,
            "buffer": buffer,
            "files": self.folder.sizes(),
        }
        (staged / RUN_STATE).write_text(json.dumps(to_json(state)), encoding="utf-8")
        about = {
            "step": step,
            "created": time.time(),
            "best": metrics.get(self.config.trainer.best_metric),
            "config": self.config.model_dump(mode="json"),
        }
        required = [RUN_STATE, "policy/config.json", *(f"{name}.safetensors" for name in counters)]
        sealed = await asyncio.to_thread(seal, staged, about, required)
        await asyncio.to_thread(prune, self.folder.checkpoints, self.config.trainer.keep_checkpoints)
        return sealed

    async def restore(self, checkpoint: Sealed, run: SavedRun) -> None:
        """Restore all freshly started parts. Raises DataError if the data are not the checkpoint's."""
        await asyncio.to_thread(remove_partial, self.folder.checkpoints)
        state: dict[str, Any] = from_json(checkpoint.run_state)
        prompts = run.producer.order.by_id()
        run.load_state_dict(state)
        run.producer.load_state_dict(state["producer"])
        ready = [replace(group, prompt=prompts[group.prompt.id]) for group in state["buffer"]["ready"]]
        state["buffer"]["ready"] = ready
        await run.buffer.load_state_dict.remote(state["buffer"])
        await run.learner.load_state(checkpoint.path, state["learner"])
        await run.reward.load_state(checkpoint.path / REWARD_STATE)
        # Only now, when nothing can refuse any more, is anything of the folder changed.
        if checkpoint.path.parent == self.folder.checkpoints:
            self.folder.keep_only(state["files"])
            await asyncio.to_thread(set_aside_after, self.folder.checkpoints, checkpoint.step)
        else:
            self.folder.keep_only({})
