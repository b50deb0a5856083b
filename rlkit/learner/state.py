"""Full fp32 state of a DeepSpeed engine, tensor by tensor: a run with other ranks or another ZeRO stage can resume from
it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.learner.engine import MOMENTS, full_shape, guarded_adamw
from rlkit.weights.bundle import TensorMeta
from rlkit.weights.tensor_file import TensorFile, WrittenFile, write_tensors

WEIGHT, STEP = "weight", "optimizer_step"


def state_metas(engine: Any) -> list[TensorMeta]:
    """Metadata of what `state_tensors` yields: `optimizer_step`, then `weight/NAME`, `exp_avg/NAME` and
    `exp_avg_sq/NAME` of every trained parameter. There are no moments before the first optimizer step."""
    keys = (WEIGHT, *MOMENTS) if _steps(engine) else (WEIGHT,)
    return [
        TensorMeta(STEP, torch.int64, ()),
        *(
            TensorMeta(f"{key}/{name}", torch.float32, full_shape(parameter))
            for name, parameter in _trained_parameters(engine)
            for key in keys
        ),
    ]


def state_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors, one in memory at a time, on the engine's device. All ranks iterate: ZeRO gathers."""
    steps = _steps(engine)
    if steps:
        _link_moments(engine)
    yield STEP, torch.tensor(steps, dtype=torch.int64)
    for name, parameter in _trained_parameters(engine):
        yield f"{WEIGHT}/{name}", _get(engine, parameter, None)
        for key in MOMENTS if steps else ():
            yield f"{key}/{name}", _get(engine, parameter, key)


def full_state(engine: Any) -> dict[str, Tensor]:
    """Return `state_tensors`, copied to the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state_tensors(engine)}


def save_full_state(engine: Any, file: Path, *, write: bool) -> WrittenFile | None:
    """Write the state on ranks with `write`; all ranks call it, because ZeRO gathers on all."""
    if write:
        return write_tensors(file, state_metas(engine), state_tensors(engine))
    for _ in state_tensors(engine):
        pass
    return None


def load_full_state(engine: Any, state: Mapping[str, Tensor] | TensorFile) -> None:
    """Restore the state. All ranks call it. Raises ValueError, naming a tensor, if it belongs to another model."""
    import deepspeed

    _check(engine, state)
    steps = int(state[STEP])
    if steps:
        _make_moments(engine, steps)
    for name, parameter in _trained_parameters(engine):
        value = state[f"{WEIGHT}/{name}"].to(parameter.device)
        _set(engine, parameter, None, value)
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=_stage(engine) == 3),
        ):
            parameter.data.copy_(value)  # the copy used in computation; ZeRO keeps the fp32 masters separately
        for key in MOMENTS if steps else ():
            _set(engine, parameter, key, state[f"{key}/{name}"].to(parameter.device))


def _trained_parameters(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    module: nn.Module = engine.module
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def _steps(engine: Any) -> int:
    states = list(guarded_adamw(engine.optimizer).state.values())
    return int(states[0]["step"]) if states else 0


def _check(engine: Any, state: Mapping[str, Tensor]) -> None:
    for parameter_name, parameter in _trained_parameters(engine):
        name, shape = f"{WEIGHT}/{parameter_name}", full_shape(parameter)
        if name not in state or tuple(state[name].shape) != shape:
            raise ValueError(f"the checkpoint has no {name} of shape {shape}: it belongs to another model")


def _get(engine: Any, parameter: nn.Parameter, moment: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _stage(engine) == 0:
        value = parameter if moment is None else guarded_adamw(engine.optimizer).state[parameter][moment]
    elif moment is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, moment)
    return value.detach().float()


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
    """Create Adam's state with zero moments, as after `steps` steps."""
    optimizer, zero, stage = guarded_adamw(engine.optimizer), engine.optimizer, _stage(engine)
    if stage == 0:
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    else:
        stepped = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for parameter in stepped:
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        step = torch.tensor(float(steps), device=parameter.device if optimizer.defaults["fused"] else "cpu")
        optimizer.state[parameter] = {"step": step, **moments}
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Make the moments visible to ZeRO 1 and 2: DeepSpeed 0.19 links only those of the first parameter group."""
    if _stage(engine) not in (1, 2):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero, state = engine.optimizer, guarded_adamw(engine.optimizer).state
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, state)
