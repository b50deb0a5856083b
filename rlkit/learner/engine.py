"""DeepSpeed engines: building one, an optimizer step, full fp32 state for checkpoints, offloading to the host.

Full state means that another number of ranks or ZeRO stage can resume.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlkit.config.schema import LearnerConfig
from rlkit.models.policy import resolve_dtype


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that skips its step when any rank's gradient is not finite.

    DeepSpeed clips first; clipping by a non-finite norm makes every gradient non-finite, so this works at every ZeRO
    stage.
    """

    skipped: bool = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        device = gradients[0].device if gradients else torch.device("cpu")
        bad = torch.zeros(1, device=device)
        for gradient in gradients:
            bad += (~torch.isfinite(gradient)).any()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(bad)
        self.skipped = bool(bad.item() > 0)
        return None if self.skipped else super().step(closure)


def learning_rate(config: LearnerConfig, optimizer_step: int, total_steps: int) -> float:
    """Of the 0-based optimizer step: linear warm-up, then the schedule down to its minimum."""
    if optimizer_step < config.warmup_steps:
        return config.learning_rate * (optimizer_step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (optimizer_step - config.warmup_steps) / span)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * share)


def init_process_group(
    rank: int, world_size: int, address: str, port: int, device: str, seconds: float | None = None
) -> None:
    """Join the ranks (DeepSpeed needs a process group even for one).

    Collective operations fail after `seconds` (None: DeepSpeed's default); NCCL ends the process.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed would compile its shared-memory collectives on first use: over a minute on two cores. Gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device == "cuda" else "gloo"
    timeout = deepspeed.constants.default_pg_timeout if seconds is None else timedelta(seconds=seconds)
    # The store of a group that DeepSpeed or torch makes listens on every interface, without any authentication.
    store: dict[str, Any] = {}
    if rank == 0:
        listening = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        store = {"is_master": True, "master_listen_fd": listening.detach()}
    dist.init_process_group(
        backend,
        store=dist.TCPStore(address, port, world_size, timeout=timeout, **store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    deepspeed.init_distributed(dist_backend=backend, rank=rank, world_size=world_size, timeout=timeout)


def build_engine(module: nn.Module, config: LearnerConfig, device: str) -> Any:
    """Build a DeepSpeed engine; the caller owns gradient accumulation. Raises ValueError for bf16 without ZeRO."""
    import deepspeed

    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16 and config.zero_stage == 0:
        raise ValueError("learner.dtype=bfloat16 needs learner.zero_stage >= 1 (fp32 master weights live there)")
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    no_decay = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = GuardedAdamW(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
    )
    world_size = dist.get_world_size()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_batch_size": world_size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": config.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        },
    )
    return engine


@dataclass(frozen=True)
class OptimizerStep:
    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """A gradient was not finite: nothing was changed."""


def optimizer_step(engine: Any, losses: Sequence[Callable[[], Tensor]], rate: float) -> OptimizerStep:
    """Run one optimizer step; each of `losses` computes one micro-batch's share of a global sum, equally many on all
    ranks."""
    world_size = dist.get_world_size()
    optimizer = guarded_adamw(engine.optimizer)
    for group in [*optimizer.param_groups, *getattr(engine.optimizer, "param_groups", ())]:
        group["lr"] = rate
    for i, loss in enumerate(losses):
        engine.set_gradient_accumulation_boundary(i == len(losses) - 1)
        # DeepSpeed averages gradients over ranks; ours are shares of one sum.
        engine.backward(loss() * world_size, scale_wrt_gas=False)
    norm = None
    if not engine.zero_optimization():  # DeepSpeed reports the norm only with ZeRO
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None]))
    optimizer.skipped, skipped_by_zero = False, engine.skipped_steps
    engine.step()
    # ZeRO looks for non-finite gradients itself and then does not call the optimizer at all.
    skipped = optimizer.skipped or engine.skipped_steps > skipped_by_zero
    return OptimizerStep(float(engine.get_global_grad_norm()) if norm is None else norm, skipped)


def guarded_adamw(optimizer: Any) -> GuardedAdamW:
    while not isinstance(optimizer, GuardedAdamW):
        optimizer = optimizer.optimizer
    return optimizer


WEIGHT, MOMENTS, STEP = "weight", ("exp_avg", "exp_avg_sq"), "optimizer_step"


def full_state(engine: Any) -> dict[str, Tensor]:
    """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` of every trained parameter and `optimizer_step`, on the CPU.

    There are no moments before the first optimizer step.
    """
    state: dict[str, Tensor] = {STEP: torch.tensor(_steps(engine), dtype=torch.int64)}
    if state[STEP] > 0:
        _link_moments(engine)
    for name, parameter in _trained_parameters(engine):
        state[f"{WEIGHT}/{name}"] = _get(engine, parameter, None)
        if state[STEP] > 0:
            for key in MOMENTS:
                state[f"{key}/{name}"] = _get(engine, parameter, key)
    return state


def load_full_state(engine: Any, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming a tensor, if the state belongs to another model."""
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
            parameter.data.copy_(value)  # the copy that computes; ZeRO keeps the fp32 masters apart from it
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
    shapes = {
        f"{WEIGHT}/{name}": tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in _trained_parameters(engine)
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
    """Create Adam's state with zero moments, as after `steps` steps."""
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
    """Let ZeRO 1 and 2 find the moments: DeepSpeed 0.19 links only those of the first parameter group."""
    if _stage(engine) not in (1, 2):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero, state = engine.optimizer, guarded_adamw(engine.optimizer).state
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, state)


def offload(engine: Any) -> None:
    """Move optimizer states, fp32 weights, gradients and (ZeRO 1 and 2) parameters to the host.

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
