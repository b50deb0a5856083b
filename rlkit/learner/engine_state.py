"""Weights and Adam's moments of a DeepSpeed engine as full fp32 tensors: in and out, whatever ranks and ZeRO stage.

What one world size or stage has saved, another can load. Every function is called on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.learner.engine import guarded_adamw

WEIGHT, MOMENTS, STEP = "weight", ("exp_avg", "exp_avg_sq"), "optimizer_step"


def full_state(engine: Any) -> dict[str, Tensor]:
    """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` for every trained parameter, and `optimizer_step`; on the CPU.

    Before the first optimizer step there are no moments.
    """
    found: dict[str, Tensor] = {STEP: torch.tensor(_steps(engine), dtype=torch.int64)}
    if found[STEP] > 0:
        _link_moments(engine)
    for name, parameter in _trained(engine):
        found[f"{WEIGHT}/{name}"] = _get(engine, parameter, None)
        if found[STEP] > 0:
            for key in MOMENTS:
                found[f"{key}/{name}"] = _get(engine, parameter, key)
    return found


def load_full_state(engine: Any, state: Mapping[str, Tensor]) -> None:
    """The reverse of `full_state`. Raises ValueError, naming a tensor, if the state is of another model."""
    import deepspeed

    _check(engine, state)
    steps = int(state[STEP])
    if steps:
        _make_moments(engine, steps)
    for name, parameter in _trained(engine):
        value = state[f"{WEIGHT}/{name}"].to(parameter.device)
        _set(engine, parameter, None, value)
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=_stage(engine) == 3),
        ):
            parameter.data.copy_(value)  # the copy that computes; ZeRO keeps the fp32 masters apart from it
        for key in MOMENTS if steps else ():
            _set(engine, parameter, key, state[f"{key}/{name}"].to(parameter.device))


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    module: nn.Module = engine.module
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _steps(engine: Any) -> int:
    """Optimizer steps behind the moments; 0 before the first."""
    states = list(guarded_adamw(engine.optimizer).state.values())
    return int(states[0]["step"]) if states else 0


def _check(engine: Any, state: Mapping[str, Tensor]) -> None:
    shapes = {
        f"{WEIGHT}/{name}": tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in _trained(engine)
    }
    for name, shape in shapes.items():
        if name not in state or tuple(state[name].shape) != shape:
            raise ValueError(f"the checkpoint has no {name} of shape {shape}: it is of another model")


def _get(engine: Any, parameter: nn.Parameter, moment: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _stage(engine) == 0:
        value = parameter if moment is None else guarded_adamw(engine.optimizer).state[parameter][moment]
    elif moment is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, moment)
    return value.detach().float().cpu().clone().contiguous()


def _set(engine: Any, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if _stage(engine) == 0:
        if moment is not None:
            guarded_adamw(engine.optimizer).state[parameter][moment].copy_(value)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _make_moments(engine: Any, steps: int) -> None:
    """Adam's state as it is after `steps` steps, moments at zero: it is made at the first step otherwise."""
    optimizer, zero, stage = guarded_adamw(engine.optimizer), engine.optimizer, _stage(engine)
    if stage == 0:
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    else:
        stepped = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for parameter in stepped:
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of each parameter.

    DeepSpeed 0.19 links them once, after the first step of the first parameter group: those of the others are missing.
    """
    if _stage(engine) not in (1, 2):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero, state = engine.optimizer, guarded_adamw(engine.optimizer).state
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, state)
