"""A vLLM engine in this process: token ids in, token ids with log-probs out. No Ray here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlkit.cluster.placement import BUNDLES
from rlkit.config.lora import LoraConfig
from rlkit.config.plan import WeightRoute
from rlkit.config.schema import RolloutConfig
from rlkit.config.structured import Grammar
from rlkit.experience import UserError
from rlkit.experience.types import FinishReason
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Loaded

FIRST_LOGPROB = 1  # vLLM reports None for the first prompt token


def cpu_environment(threads: int) -> dict[str, str]:
    # Passive waiting: actors share the cores, and spinning OpenMP threads of one slow the others several-fold.
    # No compilation: the sampler's costs 13 s on first use and gains nothing measurable on CPU.
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_COMPILE_DISABLE": "1",
    }


def engine_environment(device: str, threads: int) -> dict[str, str]:
    """Environment variables to set before vLLM is imported."""
    shared = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
    return {**shared, **(cpu_environment(threads) if device == "cpu" else {})}


def shared_gpus_environment(share: float) -> dict[str, str]:
    """Variables that let vLLM place an engine's workers as Ray actors with `share` of a GPU each."""
    return {"VLLM_RAY_PER_WORKER_GPUS": f"{share:g}", "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}


def executor(gpus: int) -> Literal["uni", "mp", "ray"]:
    """Who runs an engine's workers: this process, its children (own GPUs), or Ray (GPUs shared with ranks)."""
    if gpus == 1:
        return "uni"
    return "ray" if os.environ.get(BUNDLES) else "mp"


@dataclass(frozen=True)
class Request:
    id: str
    prompt: Sequence[int]
    seed: int | None
    """None: the engine's own randomness."""
    max_tokens: int
    temperature: float
    grammar: Grammar | None = None
    """What the response must match."""


@dataclass(frozen=True)
class Response:
    id: str
    token_ids: np.ndarray
    """[T] int32: whole tokens as sampled, with the stop token, or the token that completes a stop text."""
    logprobs: np.ndarray
    """[T] float32, of the distribution that was sampled from: after temperature, penalty, grammar and truncation."""
    finish_reason: FinishReason
    cached_prompt_tokens: int
    """Prompt tokens served by the prefix cache."""
    versions: np.ndarray
    """[T] int32: the version of the weights that gave each token."""


def stop_token_ids(model_path: str, tokenizer: Any) -> list[int]:
    """Tokens that end a response, from the generation config and the tokenizer. Raises ValueError if there are none."""
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


class Sampler:
    """Add requests, call `step` until not `busy`; load new weights between steps."""

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        device: str,
        seed: int,
        stop_token_ids: Sequence[int],
        trust_remote_code: bool = False,
        route: WeightRoute = "object_store",
        sleeps: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        """`sleeps` (CUDA): allocate memory so that `sleep` can free it. `lora`: what is loaded later are adapters."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

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
        from rlkit.rollout.adapter import EngineAdapter
        from rlkit.rollout.receiver import BACKENDS, EXTENSION

        transfer: dict[str, Any] = {"worker_extension_cls": EXTENSION}
        if route != "object_store":
            transfer["weight_transfer_config"] = {"backend": BACKENDS[route]}
        if config.structured is not None and config.structured.column is not None:
            # vLLM chooses the library by the first grammar, and gives it the others whatever it lacks for them.
            transfer["structured_outputs_config"] = {"backend": "xgrammar"}
        self.config, self.device = config, device
        self.adapter = None if lora is None else EngineAdapter(lora)
        self._finished: list[Response] = []
        """While the canary was computed, or the engine settled."""
        self._loads = 0
        self.stop_token_ids = list(stop_token_ids)
        self.asleep: set[str] = set()
        arguments: dict[str, Any] = {
            "model": model_path,
            "skip_tokenizer_init": not config.stop_texts and config.structured is None,
            "trust_remote_code": trust_remote_code,
            "dtype": ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": config.max_concurrent_samples,
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
            **({} if self.adapter is None else self.adapter.options(model_path)),
        }
        try:
            self.engine = LLMEngine.from_engine_args(EngineArgs(**(arguments | config.engine)))
        except Exception as error:
            if not config.engine:
                raise
            raise UserError(f"rollout.engine: vLLM does not start with {config.engine}: {error}") from error
        if config.structured is not None:
            # Grammars that compile beside the engine join its batch at a moment that differs from run to run, and a
            # batch's composition shows in the last bits.
            manager = self.engine.engine_core.engine_core.structured_output_manager
            assert manager._use_async_grammar_compilation
            manager._use_async_grammar_compilation = False
        self.engine.set_weight_version("0")

    def add(self, request: Request) -> None:
        """Raises UserError for a grammar that vLLM cannot follow."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        parameters = SamplingParams(
            temperature=request.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k or -1,
            min_p=self.config.min_p,
            repetition_penalty=self.config.repetition_penalty,
            max_tokens=request.max_tokens,
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(self.config.stop_texts),
            skip_special_tokens=False,  # a stop text may be one
            stop=self.config.stop_texts,
            stop_token_ids=[*self.stop_token_ids, *self.config.stop_ids],
            structured_outputs=request.grammar and StructuredOutputsParams(**request.grammar),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            self._request(request.id, request.prompt, parameters)
        except VLLMValidationError as error:
            if request.grammar is None:
                raise
            raise UserError(f"rollout.structured: vLLM cannot follow {dict(request.grammar)}: {error}") from error

    def _request(self, request_id: str, prompt: Sequence[int], parameters: Any, salt: str = "") -> None:
        """With cache_after_update=keep it finds no block of the cache that older weights computed."""
        adapter = None if self.adapter is None else self.adapter.request
        salted = {"cache_salt": f"{salt}{self._loads}"} if self.config.cache_after_update == "keep" else {}
        self.engine.add_request(
            request_id, {"prompt_token_ids": list(prompt), **salted}, parameters, lora_request=adapter
        )

    def step(self) -> list[Response]:
        """Decode one token for every running request; return the responses that finished.

        Raises UserError where vLLM gave one up.
        """
        finished, self._finished = self._finished, []
        return [*finished, *(_response(output) for output in self.engine.step() if output.finished)]

    @property
    def busy(self) -> bool:
        return bool(self._finished or self.engine.has_unfinished_requests())

    @property
    def affords_seeds(self) -> bool:
        """Whether a seed per request costs little.

        On GPUs: nothing with vLLM's runner V2, which makes the noise of seed, position and token, and gives a seed to
        requests that have none; the older runner draws for each request that has one by itself.
        """
        return self.device == "cpu" or bool(self.engine.vllm_config.use_v2_model_runner)

    def settle(self) -> None:
        """Take in what the engine has begun and not yet returned. Call before weights are touched.

        With asynchronous scheduling (vLLM's default on GPUs) a step begins before the last one's tokens are read; they
        would be counted as the next weights'.
        """
        core: Any = self.engine.engine_core.engine_core
        if not core.batch_queue:
            return
        core.pause_scheduler("keep", clear_cache=False)  # nothing new begins
        while core.batch_queue:
            self._finished += [_response(output) for output in self.engine.step() if output.finished]
        core.resume_scheduler()

    def load(self, bundle: WeightBundle) -> None:
        """Replace the weights. Running requests go on with them."""
        if self.adapter is None:
            self.engine.collective_rpc("load_bundle", kwargs={"weights": list(bundle.tensors())})
        else:
            arrived = self.adapter.load(self.engine, bundle.tensors())
            self.engine.collective_rpc("adapter_came", kwargs={"arrived": arrived})
        self._begin_version(bundle.version)

    def receive(self, step: str, version: int, **arguments: Any) -> None:
        """Call a transfer method of vLLM's workers on each of them. `version`: of the weights that come."""
        self.engine.collective_rpc(step, kwargs=arguments)
        if step == "finish_weight_update":
            self._begin_version(version)

    def received_checksum(self) -> str:
        """Of the last transfer. Raises RuntimeError if the engine's workers received different weights."""
        checksums = set(self.engine.collective_rpc("received_checksum"))
        if len(checksums) > 1:
            raise RuntimeError(f"the GPUs of one engine received different weights: {', '.join(sorted(checksums))}")
        checksum: str = checksums.pop()
        return checksum

    def loaded(self) -> Loaded | None:
        """What was loaded since the last call, on all of the engine's GPUs together; None if one loaded nothing."""
        reports: list[Loaded | None] = self.engine.collective_rpc("loaded_report")
        if None in reports:
            return None
        return _joined([report for report in reports if report is not None])

    def sleep(self, level: int) -> None:
        """Free GPU memory; running requests are dropped. Level 1 keeps the weights in host memory; 2 drops them."""
        self.settle()
        self._finished.clear()
        self.engine.sleep(level)
        self.asleep = {"weights", "kv_cache"}

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        if tag in self.asleep:
            self.engine.wake_up([tag])
            self.asleep.remove(tag)

    def _begin_version(self, version: int) -> None:
        """Forget what older weights computed: a request that goes on with old keys and values has the log-probs of
        neither policy. With cache_after_update=keep it does, and new requests do not (`_request`)."""
        if self.device == "cpu" and self.adapter is None:
            self.engine.apply_model(_repack_head)
        self.engine.set_weight_version(str(version))
        self._loads += 1
        if self.config.cache_after_update == "keep":
            return
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM refused to reset its prefix cache")

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probs of all sequences, each without its first token: [sum of (length - 1)].

        Running requests go on meanwhile; those that finish are returned by the next `step`.
        """
        from vllm import SamplingParams

        for i, token_ids in enumerate(sequences):
            parameters = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            self._request(f"canary-{i}", token_ids, parameters, salt="canary-")
        finished: dict[str, Any] = {}
        while len(finished) < len(sequences):
            for output in self.engine.step():
                if output.finished and output.request_id.startswith("canary-"):
                    finished[output.request_id] = output
                elif output.finished:
                    self._finished.append(_response(output))
        logprobs = [
            row[token].logprob
            for i, token_ids in enumerate(sequences)
            for row, token in zip(finished[f"canary-{i}"].prompt_logprobs[FIRST_LOGPROB:], token_ids[1:], strict=True)
        ]
        return np.array(logprobs, dtype=np.float32)


def _joined(reports: Sequence[Loaded]) -> Loaded:
    return Loaded(
        unwritten=tuple(dict.fromkeys(name for report in reports for name in report.unwritten)),
        arrived=sum(report.arrived for report in reports),
        held=sum(report.held for report in reports),
    )


def _repack_head(model: Any) -> None:
    # vLLM 0.32 on CPU reloads a tied embedding, but not the head's packed copy of it: it would keep sampling from that.
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _response(output: Any) -> Response:
    completion = output.outputs[0]
    spans = completion.weight_versions
    reason = completion.finish_reason
    if reason == "error":
        raise UserError(f"vLLM failed at request {output.request_id}; its log says why (a grammar that is too large?)")
    return Response(
        id=output.request_id,
        token_ids=np.array(completion.token_ids, dtype=np.int32),
        logprobs=np.array(completion.logprobs.logprobs, dtype=np.float32),
        finish_reason=reason if reason in ("stop", "length") else "abort",
        cached_prompt_tokens=int(output.num_cached_tokens or 0),
        versions=np.concatenate([np.full(s.end - s.start, int(s.version), np.int32) for s in spans]),
    )
