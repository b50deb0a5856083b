"""How a vLLM engine is created: environment variables, arguments, and what it needs after a weight update."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlkit.cluster.placement import BUNDLES
from rlkit.config.engine import other_precision
from rlkit.config.plan import WeightRoute, element_bytes
from rlkit.config.schema import RolloutConfig, RunConfig
from rlkit.experience import UserError
from rlkit.weights.publication import CANARY_PROMPTS, Loaded

CANARY_TOLERANCE_FP32 = 1e-3
CANARY_TOLERANCE_HALF = 0.5
"""Rounding alone gives 0.16 on the rarest of 240 tokens (measured: fp32 learner, bfloat16 engine). Smaller errors are
left to the other proofs."""
CANARY_TOLERANCE_COARSE = 1.0
"""8-bit weights give 0.3 on the rarest of 300 tokens, 8-bit keys and values 0.2 (measured: fp32 learner, a tiny random
model)."""


def cpu_environment(threads: int) -> dict[str, str]:
    # Passive waiting: actors share the cores, and one actor's spinning OpenMP threads slow the others several-fold.
    # No compilation: the sampler's takes 13 s on first use and gains nothing measurable on CPU.
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_COMPILE_DISABLE": "1",
    }


def engine_environment(device: str, threads: int) -> dict[str, str]:
    """Return the environment variables to set before vLLM is imported."""
    shared = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
    return {**shared, **(cpu_environment(threads) if device == "cpu" else {})}


def shared_gpus_environment(share: float) -> dict[str, str]:
    """Return variables that let vLLM place an engine's workers as Ray actors with `share` of a GPU each."""
    return {"VLLM_RAY_PER_WORKER_GPUS": f"{share:g}", "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}


def executor(gpus: int) -> Literal["uni", "mp", "ray"]:
    """Return who runs an engine's workers: this process, its children (own GPUs), or Ray (GPUs shared with ranks)."""
    if gpus == 1:
        return "uni"
    return "ray" if os.environ.get(BUNDLES) else "mp"


def stop_token_ids(model_path: str, tokenizer: Any) -> list[int]:
    """Return the stop tokens of the generation config and the tokenizer. Raises ValueError if there are none."""
    from transformers import GenerationConfig

    stops: set[int] = set()
    try:
        named = GenerationConfig.from_pretrained(model_path).eos_token_id
        stops.update([named] if isinstance(named, int) else named or [])
    except OSError:
        pass  # a folder without generation_config.json: the tokenizer decides
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ValueError(f"{model_path}: neither generation_config.json nor the tokenizer names an eos token")
    return sorted(stops)


def engine_arguments(
    model_path: str,
    config: RolloutConfig,
    *,
    device: str,
    seed: int,
    trust_remote_code: bool,
    route: WeightRoute,
    sleeps: bool,
) -> dict[str, Any]:
    """Return arguments by the names of vLLM's EngineArgs, without those of `rollout.engine`."""
    from rlkit.rollout.receiver import BACKENDS, EXTENSION

    max_model_len = config.max_prompt_tokens + config.max_response_tokens
    on_cpu = device == "cpu"
    memory: dict[str, Any] = (
        {"kv_cache_memory_bytes": int(config.memory_gib * 2**30), "block_size": 32}
        if on_cpu
        else {"gpu_memory_utilization": config.gpu_memory_utilization}
    )
    # A seeded request whose prompt is prefilled in chunks crashes vLLM 0.32 on CPU ("CPU Generator does not use
    # offset"), so prompts are prefilled whole there; the token budget must then hold the longest sequence.
    scheduling: dict[str, Any] = (
        {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)} if on_cpu else {}
    )
    transfer: dict[str, Any] = {"worker_extension_cls": EXTENSION}
    if route != "object_store":
        transfer["weight_transfer_config"] = {"backend": BACKENDS[route]}
    if config.structured is not None and config.structured.column is not None:
        # vLLM chooses the library by the first grammar, and gives it all others even if it does not support them.
        transfer["structured_outputs_config"] = {"backend": "xgrammar"}
    return {
        "model": model_path,
        "skip_tokenizer_init": not config.stop_texts and config.structured is None,
        "trust_remote_code": trust_remote_code,
        "dtype": ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_concurrent_samples + CANARY_PROMPTS,
        "max_num_active_seqs": config.max_concurrent_samples,  # except while the canary is computed
        "enforce_eager": True if on_cpu else config.enforce_eager,
        "enable_prefix_caching": config.prefix_caching,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": executor(config.tensor_parallel_size),
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, at its temperature
        "disable_log_stats": True,
        "generation_config": "vllm",
        "seed": seed % 2**31,
        "enable_sleep_mode": sleeps,
        **memory,
        **scheduling,
        **transfer,
    }


def make_engine(arguments: Mapping[str, Any], further: Mapping[str, Any]) -> Any:
    """Start an engine. `further`: the user's arguments (`rollout.engine`); raises UserError if vLLM fails with them."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # Linux lets a process use AMX once it has asked. vLLM 0.32 does not ask, and in bfloat16 dies of a SIGILL.
    torch.cpu._init_amx()
    try:
        return LLMEngine.from_engine_args(EngineArgs(**{**arguments, **further}))
    except Exception as error:
        if not further:
            raise
        raise UserError(f"rollout.engine: vLLM does not start with {dict(further)}: {error}") from error


def repack_head(model: Any) -> None:
    # vLLM 0.32 on CPU reloads a tied embedding, but not the head's packed copy, from which it would keep sampling.
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def joined(reports: Sequence[Loaded]) -> Loaded:
    return Loaded(
        unwritten=tuple(dict.fromkeys(name for report in reports for name in report.unwritten)),
        arrived=sum(report.arrived for report in reports),
        held=sum(report.held for report in reports),
    )


def the_same(checksums: Sequence[str]) -> str:
    """Return the checksum of what all GPUs of an engine received. Raises RuntimeError if they differ."""
    different = sorted(set(checksums))
    if len(different) > 1:
        raise RuntimeError(f"the GPUs of one engine received different weights: {', '.join(different)}")
    return different[0]


def draws_all_at_once(engine: Any) -> bool:
    """Return whether vLLM uses runner V2, which computes noise from seed, position and token, and gives a seed to
    requests without one; the older runner draws separately for each request with a seed."""
    return bool(engine.vllm_config.use_v2_model_runner)


def canary_tolerance(config: RunConfig) -> float:
    """Return the largest log-prob difference allowed between an engine and the learner (`rollout.canary_tolerance`)."""
    rollout = config.rollout
    if rollout.canary_tolerance is not None:
        return rollout.canary_tolerance
    if other_precision(rollout):
        return CANARY_TOLERANCE_COARSE
    fp32 = element_bytes(rollout.dtype, config.cluster.device == "cuda") == 4
    return CANARY_TOLERANCE_FP32 if fp32 else CANARY_TOLERANCE_HALF
