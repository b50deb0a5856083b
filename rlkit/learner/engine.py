"""DeepSpeed engines: building them, running an optimizer step, offloading to the host."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.modeling_layers import GradientCheckpointingLayer

from rlkit.config.schema import LearnerConfig
from rlkit.models.forward import PackedModel
from rlkit.models.policy import resolve_dtype
from rlkit.models.sequence import SequenceRanks

REDUCE_BUCKET_ELEMENTS = 2**27
"""Gradient elements that ranks reduce at a time. DeepSpeed's 5e8 would hold 1 GB in bf16, permanently with ZeRO 3."""
READ_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""If set, transformers reads each tensor only when it is needed."""
T = TypeVar("T", bound=PackedModel)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that skips its step if any rank's gradient is not finite.

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
            # The maximum is inf or NaN if any element is; torch.isfinite would briefly take 6 bytes per element.
            bad += ~torch.isfinite(torch.linalg.vector_norm(gradient, ord=math.inf))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(bad)
        self.skipped = bool(bad.item() > 0)
        return None if self.skipped else super().step(closure)


def learning_rate(config: LearnerConfig, optimizer_step: int, total_steps: int) -> float:
    """Return the rate of the 0-based optimizer step: linear warm-up, then the schedule down to its minimum."""
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

    Collective operations fail after `seconds` (None: DeepSpeed's default), also in the groups that DeepSpeed creates
    itself; NCCL ends the process.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # On first use DeepSpeed would compile its shared-memory collectives, which takes over a minute on two cores. Gloo
    # is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device == "cuda" else "gloo"
    timeout = deepspeed.constants.default_pg_timeout if seconds is None else timedelta(seconds=seconds)
    if dist.is_initialized():  # one process group per process: tests build several learners in one
        return
    if world_size > 1:  # otherwise DeepSpeed would give its own groups torch's timeout
        dist.new_group = partial(dist.new_group, timeout=timeout)
    # The store of a group that DeepSpeed or torch creates listens on every interface, without any authentication.
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


@cache
def sequence_ranks(count: int) -> SequenceRanks | None:
    """Return this rank's place among the `count` neighbours that compute each batch together; None if it is alone. All
    ranks call it."""
    if count == 1:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    timeout = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    groups = [dist.new_group(range(first, first + count), timeout=timeout) for first in range(0, world_size, count)]
    return SequenceRanks(groups[rank // count], rank % count, count)


def build_engine(module: nn.Module, config: LearnerConfig, device: str) -> Any:
    """Build a DeepSpeed engine; the caller owns gradient accumulation. Raises ValueError for bf16 without ZeRO.

    The module should be in the compute dtype, else it is cast to it: DeepSpeed makes its fp32 masters from the compute
    weights, so in bf16 they start from the rounded checkpoint. The module stays in evaluation mode: dropout is never
    active.
    """
    import deepspeed

    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16 and config.zero_stage == 0:
        raise ValueError("learner.dtype=bfloat16 needs learner.zero_stage >= 1 (fp32 master weights live there)")
    trained = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in trained if len(full_shape(p)) >= 2]
    no_decay = [p for p in trained if len(full_shape(p)) < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = GuardedAdamW(
        [group for group in groups if group["params"]],  # an adapter has only matrices
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # torch's default needs temporaries of 8 bytes per parameter on CUDA, and four times as long on CPU
    )
    _evaluate_always(module)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=_deepspeed_config(config, device))
    _move_buffers(engine)
    return engine


def load_to_train(
    load: Callable[..., T], path: str | Path, config: LearnerConfig, device: str, *, trust_remote_code: bool = False
) -> T:
    """Return a module from `load(path, dtype, ...)`, ready for `build_engine`: in the compute dtype, partitioned with
    ZeRO 3.

    Gradient checkpointing is on if configured. Raises ModelLoadError with the remedy.
    """
    with partitioned_loading(config, device):
        module = load(path, resolve_dtype(config.dtype, device), trust_remote_code=trust_remote_code)
    module.share_sequences(sequence_ranks(config.sequence_parallel))
    module.offloads = config.offload_activations
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    return module


def load_frozen(
    load: Callable[..., PackedModel],
    path: str | Path,
    config: LearnerConfig,
    device: str,
    trust_remote_code: bool = False,
) -> Any:
    """Return a module that only runs forward, whole on every rank; with ZeRO 3 an engine that gathers it layer by
    layer.

    With ZeRO 3 all ranks must run the same number of passes. Raises ModelLoadError with the remedy.
    """
    with partitioned_loading(config, device):
        module = load(path, resolve_dtype(config.dtype, device), trust_remote_code=trust_remote_code)
    module.share_sequences(sequence_ranks(config.sequence_parallel))
    module.requires_grad_(False).eval()
    if config.zero_stage != 3:
        return module.to(device)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, config=_deepspeed_config(config, device))
    _move_buffers(engine)
    return engine


@contextmanager
def partitioned_loading(config: LearnerConfig, device: str) -> Iterator[None]:
    """With ZeRO 3, partition the parameters that transformers loads inside the context over the ranks, one by one.

    `from_pretrained` creates the model without memory and sets each parameter when it is read, which is when it is
    partitioned here. All ranks must load the same model.
    """
    if config.zero_stage != 3:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.utils import is_zero_param

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=_deepspeed_config(config, device))

    def partition(module: nn.Module, name: str, parameter: Any) -> None:
        # Parameters read from the file are flagged. The others are initialised later, whole, and DeepSpeed partitions
        # them then.
        was_read = getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta
        awaited = module._parameters.get(name)
        if was_read and awaited is not None and awaited.is_meta and not is_zero_param(parameter):
            parameter.data = parameter.data.clone()  # DeepSpeed writes to it, but it is memory-mapped from the file
            init._convert_to_zero_parameters([parameter])

    handle = register_module_parameter_registration_hook(partition)
    asynchronous = os.environ.pop(READ_ONE_BY_ONE, None)
    os.environ[READ_ONE_BY_ONE] = "1"  # otherwise transformers would read ahead, up to the whole model
    try:
        yield
    finally:
        handle.remove()
        del os.environ[READ_ONE_BY_ONE]
        if asynchronous is not None:
            os.environ[READ_ONE_BY_ONE] = asynchronous


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The full shape, even if ZeRO 3 has partitioned the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _deepspeed_config(config: LearnerConfig, device: str) -> dict[str, Any]:
    half = resolve_dtype(config.dtype, device) == torch.bfloat16
    return {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            # Stage 1 with fp32 accumulation would use an optimizer that keeps all fp32 gradients on every rank
            # permanently and cannot be offloaded. Stage 2 keeps each rank's share of them.
            "stage": 2 if half and config.zero_stage == 1 else config.zero_stage,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": half},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if half else {}),
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _evaluate_always(module: nn.Module) -> None:
    """Turn dropout off permanently, and keep gradient checkpointing on if it was enabled.

    transformers checkpoints only layers in training mode: these are in training mode when called, but not inside the
    call.
    """
    module.eval()
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
            layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", False))
            layer.register_forward_hook(lambda layer, *_: setattr(layer, "training", True), always_call=True)


def _move_buffers(engine: Any) -> None:
    """Move the buffers to the device: DeepSpeed leaves them where they are if the parameters were partitioned on
    loading."""
    for buffer in engine.module.buffers():
        buffer.data = buffer.data.to(engine.device)


@dataclass(frozen=True)
class OptimizerStep:
    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """A gradient was not finite, and nothing was changed."""


def optimizer_step(engine: Any, losses: Sequence[Callable[[], Tensor]], rate: float) -> OptimizerStep:
    """Run one optimizer step; each of `losses` computes one micro-batch's share of a global sum. All ranks must have
    the same number."""
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
    # ZeRO checks for non-finite gradients itself and then does not call the optimizer at all.
    skipped = optimizer.skipped or engine.skipped_steps > skipped_by_zero
    return OptimizerStep(float(engine.get_global_grad_norm()) if norm is None else norm, skipped)


MOMENTS = ("exp_avg", "exp_avg_sq")


def guarded_adamw(optimizer: Any) -> GuardedAdamW:
    while not isinstance(optimizer, GuardedAdamW):
        optimizer = optimizer.optimizer
    return optimizer


def offload(engine: Any) -> None:
    """Move optimizer states, fp32 weights, gradients and (ZeRO 1 and 2) parameters to the host.

    Until `reload`, the engine cannot run, but its parameters can be read. Raises ValueError for ZeRO 0.
    """
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States

    stage, pinned = engine.zero_optimization_stage(), torch.cuda.is_available()
    if stage == 0:
        raise ValueError("DeepSpeed offloads only with ZeRO")
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
        if not guarded_adamw(engine.optimizer).defaults["fused"]:
            state["step"] = state["step"].cpu()  # DeepSpeed moves it to the GPU, where reading it would make AdamW wait


def _optimizer_tensors(engine: Any) -> Iterator[Tensor]:
    yield from engine.optimizer.fp32_partitioned_groups_flat
    for state in guarded_adamw(engine.optimizer).state.values():
        yield from (state[key] for key in MOMENTS)
