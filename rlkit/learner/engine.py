"""The DeepSpeed engine of a learner rank: precision, ZeRO stage, clipping, schedule and the guard against NaN."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlkit.config.schema import LearnerConfig


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The dtype a config value names; `auto` is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves parameters and moments alone when any rank's gradient is not finite.

    DeepSpeed clips before it calls `step`; clipping by a non-finite norm makes every gradient non-finite, so the
    check sees a bad value wherever it arose, whatever the ZeRO stage.
    """

    skipped: bool = False
    """Whether the last step was skipped."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step, or none (see the class)."""
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
    """Learning rate of the 0-based optimizer step: linear warm-up, then the schedule down to its minimum."""
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
    """Join the learner's ranks. DeepSpeed wants a process group even for one rank.

    A collective operation that takes longer than `seconds` (null: DeepSpeed's default) fails; NCCL ends the process.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed would compile its shared-memory collectives on first use: over a minute on two cores. Gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        **({} if seconds is None else {"timeout": timedelta(seconds=seconds)}),
    )


def build_engine(module: nn.Module, config: LearnerConfig, device: str) -> Any:
    """A DeepSpeed engine around `module`. The caller owns accumulation: see `PolicyLearner.update`.

    Raises ValueError for precisions that the ZeRO stage cannot train.
    """
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
    """What one optimizer step did."""

    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """A gradient was not finite: nothing was changed."""


def optimizer_step(engine: Any, losses: Sequence[Callable[[], Tensor]], rate: float) -> OptimizerStep:
    """One optimizer step over micro-batches: each of `losses` computes one micro-batch's share of a global sum.

    All ranks call it with equally many micro-batches.
    """
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
    """The GuardedAdamW inside DeepSpeed's wrappers."""
    while not isinstance(optimizer, GuardedAdamW):
        optimizer = optimizer.optimizer
    return optimizer
