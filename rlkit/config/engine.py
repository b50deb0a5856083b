"""Checks of `rollout.engine`: vLLM arguments that rlkit has no option for, and the correction that they need."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from algorithms.base import Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.schema import ClusterConfig, RolloutConfig
from rlkit.experience.names import nearest

OWNED: Mapping[str, str] = {
    "model": "model.path, or rollout.source_path",
    "dtype": "rollout.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "max_model_len": "rollout.max_prompt_tokens and rollout.max_response_tokens",
    "max_num_seqs": "rollout.max_concurrent_samples",
    "max_num_active_seqs": "rollout.max_concurrent_samples",
    "enforce_eager": "rollout.enforce_eager",
    "enable_prefix_caching": "rollout.prefix_caching",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.memory_gib (on GPUs rollout.gpu_memory_utilization)",
    "enable_sleep_mode": "rollout.sleep",
    "structured_outputs_config": "rollout.structured",
    "weight_transfer_config": "cluster.weight_transfer",
    "seed": "seed",
}
"""Argument of vLLM's engine -> rlkit's option that sets it."""
FIXED = (
    *("skip_tokenizer_init", "distributed_executor_backend", "logprobs_mode", "disable_log_stats", "generation_config"),
    *("worker_extension_cls", "tokenizer", "runner", "enable_lora"),
    *("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size"),
)
"""Arguments that rlkit's use of the engine depends on."""
FIXED_ON_CPU = ("block_size", "enable_chunked_prefill", "max_num_batched_tokens", "async_scheduling")
EXACT_CACHES = ("auto", "bfloat16", "float16", "float32")
"""Types of the key-value cache that do not lower the sampler's precision."""


def other_precision(rollout: RolloutConfig) -> tuple[str, ...]:
    """Return the arguments that make the sampler compute at a lower precision than that of the weights it gets."""
    engine = rollout.engine
    coarse = {
        "quantization": engine.get("quantization") is not None,
        "kv_cache_dtype": engine.get("kv_cache_dtype", "auto") not in EXACT_CACHES,
    }
    return tuple(f"rollout.engine.{name}={engine[name]}" for name, is_coarse in coarse.items() if is_coarse)


@cache
def engine_arguments() -> frozenset[str]:
    """Return the names of vLLM's EngineArgs, read from its source, as importing takes seconds. Empty without vLLM."""
    spec = importlib.util.find_spec("vllm")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    sources = [path for root in roots if (path := Path(root) / "engine" / "arg_utils.py").is_file()]
    if not sources:
        return frozenset()
    classes = (node for node in ast.parse(sources[0].read_text()).body if isinstance(node, ast.ClassDef))
    body = next((node.body for node in classes if node.name == "EngineArgs"), [])
    fields = (node.target for node in body if isinstance(node, ast.AnnAssign))
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))


def engine_takes_its_arguments(rollout: RolloutConfig, cluster: ClusterConfig) -> Issues:
    known = engine_arguments()
    fixed = (*FIXED, *FIXED_ON_CPU) if cluster.device == "cpu" else FIXED
    for name in rollout.engine:
        key = f"rollout.engine.{name}"
        if name in OWNED:
            yield ConfigIssue(key, f"is set by {OWNED[name]}; use that")
        elif name in fixed:
            where = " with cluster.device=cpu" if name in FIXED_ON_CPU else ""
            yield ConfigIssue(key, f"cannot be changed{where}: rlkit depends on its own value; leave it out")
        elif known and name not in known:
            guess = nearest(name, known - OWNED.keys() - set(fixed))
            meant = f"did you mean rollout.engine.{guess}?" if guess else "the names are those of its EngineArgs"
            yield ConfigIssue(key, f"vLLM's engine has no such argument; {meant}")
    drafts = rollout.engine.get("speculative_config")
    yield from _drafts(drafts, cluster.device)
    if drafts is not None and rollout.min_p:
        yield ConfigIssue("rollout.min_p", "is ignored by vLLM's older runner with speculative_config; leave one out")


def _drafts(speculative: Any, device: str) -> Iterator[ConfigIssue]:
    key = "rollout.engine.speculative_config"
    if speculative is None:
        return
    if device == "cpu":  # its replacement of the kernel that sets each draft's temperature writes into a copy
        yield ConfigIssue(
            key, "is for GPUs: vLLM 0.32 samples drafts at undefined temperatures with cluster.device=cpu"
        )
    if not isinstance(speculative, Mapping):
        example = "{method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}"
        yield ConfigIssue(key, f"must be a mapping of vLLM's own keys, like '{key}={example}'")
    elif speculative.get("rejection_sample_method", "standard") != "standard":
        yield ConfigIssue(
            key,
            "rejection_sample_method must stay standard: with any other, drafts change the distribution and its "
            "log-probs",
        )


def other_precision_is_corrected(algorithm: Algorithm, rollout: RolloutConfig) -> Issues:
    """With a lower precision the sampler's distribution differs from the learner's in every token."""
    names = ", ".join(other_precision(rollout))
    if not names or rollout.source != "policy":
        return
    if not algorithm.needs().corrects_staleness:
        yield ConfigIssue(
            "rollout.engine",
            f"with {names} the sampler's probabilities differ from the learner's, and the loss of "
            f"{type(algorithm).__name__} cannot weight tokens to correct that (needs().corrects_staleness); leave it "
            "out",
        )
    elif not getattr(algorithm.config, "corrects", True):
        yield ConfigIssue(
            "algorithm.rollout_correction",
            f"none ignores that with {names} the sampler's probabilities differ from the learner's; leave it out to "
            "get truncated importance weights",
        )


ENGINE = (engine_takes_its_arguments, other_precision_is_corrected)
