"""Models that only run forward: moving them between devices, and a reference that moves towards the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**26
LOW_BITS = 16
"""Low bits of a float32 that bfloat16 drops."""


def move_frozen(frozen: Any, device: str) -> None:
    """Move the model to the host, where it cannot run, or back; for a ZeRO-3 engine, this rank's shares."""
    for parameter in frozen.parameters():
        parameter.data = parameter.data.to(device)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(device)
    for buffer in frozen.buffers():
        buffer.data = buffer.data.to(device)


@torch.no_grad()
def move_towards(frozen: Any, policy: Any, share: float, seed: int) -> None:
    """Move the model `share` of the way towards the policy; with ZeRO 3 each rank moves its shares, which match. All
    ranks call it with the same `seed`."""
    partitioned = False
    for mine, its in zip(frozen.parameters(), policy.parameters(), strict=True):
        if hasattr(mine, "ds_tensor"):
            partitioned, mine, its = True, mine.ds_tensor, its.ds_tensor
        blend(mine.data, its.data, share, torch.Generator(mine.device).manual_seed(seed))
    whole = frozen.optimizer.persistent_parameters if partitioned else []
    if whole:  # small parameters, which every rank keeps besides its share
        whole[0].partition(whole)
        whole[0].all_gather(whole)


def blend(mine: Tensor, its: Tensor, share: float, generator: torch.Generator) -> None:
    """Move `mine` in place by `share` of the way to `its`.

    bfloat16 is rounded stochastically, so that it is unbiased: with rounding to nearest, small steps would have no
    effect.
    """
    if share == 1 or mine.dtype != torch.bfloat16:
        mine.lerp_(its, share)
        return
    for one, other in zip(mine.view(-1).split(ELEMENTS_AT_ONCE), its.view(-1).split(ELEMENTS_AT_ONCE), strict=True):
        exact = one.float().lerp_(other.float(), share)
        bits = exact.view(torch.int32)
        bits += torch.randint(2**LOW_BITS, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
        bits &= -(2**LOW_BITS)
        one.copy_(exact)
