"""Saves everything a run needs to go on, and brings it back: models, optimizers, data position, buffer, versions.

Prompts, samples, scores and groups as JSON and back, to the last bit; without pickle.

An array becomes its dtype, shape and bytes in base64; a record becomes its class's name and fields.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from rlkit.checkpoint.folder import RUN_STATE, Sealed, prune, remove_partial, seal, set_aside_after, stage
from rlkit.config.schema import RunConfig
from rlkit.experience.types import (
    Group,
    GroupScores,
    Message,
    PreferencePair,
    Prompt,
    Sample,
    Score,
    Span,
    SpanReward,
)
from rlkit.tracking.run_folder import RunFolder

REWARD_STATE = "reward_state.pt"


class SavedRun(Protocol):
    """The parts of a run that have a state; the trainer holds them."""

    producer: Any
    buffer: Any
    learner: Any
    reward: Any

    def state_dict(self) -> dict[str, Any]:
        """The driver's own state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of state_dict."""


@dataclass
class Checkpointer:
    """Used between two steps, when nothing of the next one has begun (or, with staleness, may be asked for again)."""

    config: RunConfig
    folder: RunFolder

    async def save(self, step: int, run: SavedRun, metrics: Mapping[str, float]) -> Sealed:
        """Write, seal and rename `checkpoints/step_NNNNNN`, then remove old ones. `metrics`: the latest known.

        `policy/` in it is a plain Hugging Face folder, and so is `reward/` where the reward learns.
        """
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
        """Bring all parts, freshly started, to where they were. Raises DataError if the data are others."""
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


RECORDS = {
    kind.__name__: kind
    for kind in (Group, GroupScores, Message, PreferencePair, Prompt, Sample, Score, Span, SpanReward)
}
RECORD, ARRAY, TUPLE = "__record__", "__array__", "__tuple__"


def to_json(value: Any) -> Any:
    """What `json.dumps` takes. Raises TypeError for anything that `from_json` could not bring back."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        raw = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
        return {ARRAY: value.dtype.str, "shape": list(value.shape), "data": raw}
    if isinstance(value, tuple):
        return {TUPLE: [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str) or key in (RECORD, ARRAY, TUPLE)]
        if strange:
            raise TypeError(f"a mapping with the key {strange[0]!r} cannot be saved in a checkpoint")
        return {key: to_json(item) for key, item in value.items()}
    if type(value).__name__ in RECORDS and isinstance(value, RECORDS[type(value).__name__]):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {RECORD: type(value).__name__, **fields}
    raise TypeError(f"{type(value).__name__} cannot be saved in a checkpoint: {value!r:.80}")


def from_json(value: Any) -> Any:
    """The reverse of `to_json`. Raises KeyError or TypeError for what it did not write."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if ARRAY in value:
        raw = np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value[ARRAY]))
        return raw.reshape(value["shape"]).copy()
    if TUPLE in value:
        return tuple(from_json(item) for item in value[TUPLE])
    plain = {key: from_json(item) for key, item in value.items() if key != RECORD}
    return RECORDS[value[RECORD]](**plain) if RECORD in value else plain
