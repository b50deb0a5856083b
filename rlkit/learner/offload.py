"""A trained model out of its GPU's memory while the engines sample, and back. All ranks call both alike.

DeepSpeed 0.19 moves everything with ZeRO 1 and 2. With ZeRO 3 it moves master weights and moments of its own FusedAdam
only, so ours are moved here; the ranks' shards of the parameters stay on the GPU, from where they can be gathered for
an engine that is replaced meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlkit.learner.engine import guarded_adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


def offload(engine: Any) -> None:
    """Optimizer states, fp32 weights, gradients and (ZeRO 1 and 2) parameters to the host.

    Until `reload` the engine cannot run; its parameters can be read. Raises ValueError for ZeRO 0.
    """
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States

    stage, pinned = engine.zero_optimization_stage(), torch.cuda.is_available()
    if stage == 0:
        raise ValueError("DeepSpeed offloads with ZeRO only")
    if stage == 3:
        for tensor in _optimizer_tensors(engine):
            tensor.data = torch.empty_like(tensor.data, device="cpu", pin_memory=pinned).copy_(tensor.data)
        engine.offload_states(include=[States.lp_grads, States.contiguous_grad_buffer], pin_memory=pinned)
    else:
        engine.offload_states(pin_memory=pinned)


def reload(engine: Any) -> None:
    """The reverse of offload."""
    engine.reload_states()
    if engine.zero_optimization_stage() == 3:
        for tensor in _optimizer_tensors(engine):
            tensor.data = tensor.data.to(engine.device)
    for state in guarded_adamw(engine.optimizer).state.values():
        state["step"] = state["step"].cpu()  # DeepSpeed takes it to the GPU, where AdamW would wait for it


def _optimizer_tensors(engine: Any) -> Iterator[Tensor]:
    yield from engine.optimizer.fp32_partitioned_groups_flat
    for state in guarded_adamw(engine.optimizer).state.values():
        yield from (state[key] for key in MOMENTS)
