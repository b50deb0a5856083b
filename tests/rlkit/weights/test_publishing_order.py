"""In which order one publication reaches those who take its weights: no Ray, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlkit.config.loading import load_config
from rlkit.weight_sync import WeightSync
from rlkit.weights.publication import Agreement


def test_a_reward_that_follows_the_policy_has_its_turn_before_what_the_new_weights_sample(tmp_path: Path) -> None:
    """Engines sample as soon as they have weights, and the learner's canary may take longer."""
    order: list[str] = []

    async def proof() -> tuple[int, np.ndarray]:
        await asyncio.sleep(0.01)
        order.append("canary")
        return 1, np.zeros(1)

    def publishable(canary: Any) -> tuple[str, Coroutine[Any, Any, tuple[int, np.ndarray]]]:
        return "bundle", proof()

    async def follow(bundle: Any) -> None:
        order.append("reward")

    async def confirm(received: Any) -> Agreement:
        return Agreement(0.0)

    async def offload() -> None: ...

    def load(bundle: Any, canary: Any) -> None:
        asyncio.get_running_loop().call_soon(order.append, "groups")  # as soon as they can come

    rollout = SimpleNamespace(load=load, announce=lambda published: None, confirm=confirm, times=dict)
    learner = SimpleNamespace(policy=SimpleNamespace(publishable=publishable), offload=offload)
    reward = SimpleNamespace(follows_policy=True, follow=follow)
    config = load_config(["reward=rule", f"run_dir={tmp_path}"]).config
    sync: Any = WeightSync(config, rollout, learner, reward, ((1, 2),))  # type: ignore[arg-type]
    assert asyncio.run(sync.publish(1)) == {"weights/canary_difference": 0.0}
    assert order == ["reward", "groups", "canary"]
