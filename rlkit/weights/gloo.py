"""A gloo group of the first learner rank and the engines, next to the groups that their processes already have."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

SECONDS = 600.0
"""Time limit of an operation; the run's own deadlines are shorter."""


def join(address: str, port: int, rank: int, world_size: int) -> Any:
    """Join the group; return it when all have joined."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, backend="gloo", timeout=timedelta(seconds=SECONDS)
    )


def broadcast(group: Any, buffer: Tensor) -> None:
    """Broadcast from rank 0. (`torch.distributed.broadcast` supports only its own groups.)"""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([buffer], options).wait()


def leave(group: Any) -> None:
    """Leave the group; the others' operations fail from now on."""
    group.shutdown()
