"""A vLLM engine in this process: token ids in, token ids with log-probs out. No Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rlkit.config.lora import LoraConfig
from rlkit.config.plan import WeightRoute
from rlkit.config.schema import RolloutConfig
from rlkit.experience import UserError
from rlkit.rollout.engine import draws_all_at_once, engine_arguments, joined, make_engine, repack_head, the_same
from rlkit.rollout.requests import Request, Response
from rlkit.weights.bundle import WeightBundle
from rlkit.weights.publication import Loaded


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
        """`sleeps` (CUDA): allocate memory so that `sleep` can free it. `lora`: weights loaded later are adapters."""
        from rlkit.rollout.adapter import EngineAdapter

        self.config, self.device = config, device
        self.adapter = None if lora is None else EngineAdapter(lora)
        self._finished: list[Response] = []
        """Responses that finished while the canary was computed, or while the engine settled."""
        self._loads = 0
        self.stop_token_ids = list(stop_token_ids)
        self.asleep: set[str] = set()
        adapters = {} if self.adapter is None else self.adapter.options(model_path)
        arguments = engine_arguments(
            model_path,
            config,
            device=device,
            seed=seed,
            trust_remote_code=trust_remote_code,
            route=route,
            sleeps=sleeps,
        )
        self.engine = make_engine(arguments | adapters, config.engine)
        if config.structured is not None:
            # Grammars compiled in parallel with the engine would join its batch at a different moment in each run, and
            # the composition of a batch affects the last bits.
            manager = self.engine.engine_core.engine_core.structured_output_manager
            assert manager._use_async_grammar_compilation
            manager._use_async_grammar_compilation = False
        self.engine.set_weight_version("0")

    def add(self, request: Request) -> None:
        """Add a request. Raises UserError for a grammar that vLLM cannot follow."""
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
            skip_clone=True,  # used by this request alone; a deep copy takes a third of the time
        )
        try:
            self._request(request.id, request.prompt, parameters)
        except VLLMValidationError as error:
            if request.grammar is None:
                raise
            raise UserError(f"rollout.structured: vLLM cannot follow {dict(request.grammar)}: {error}") from error

    def _request(self, request_id: str, prompt: Sequence[int], parameters: Any, salt: str = "") -> None:
        """Add a request; with cache_after_update=keep it does not use cache blocks computed by older weights."""
        adapter = None if self.adapter is None else self.adapter.request
        salted = {"cache_salt": f"{salt}{self._loads}"} if self.config.cache_after_update == "keep" else {}
        self.engine.add_request(
            request_id, {"prompt_token_ids": list(prompt), **salted}, parameters, lora_request=adapter
        )

    def abort(self, ids: Sequence[str]) -> None:
        """Drop those requests that have not finished."""
        self.engine.abort_request(list(ids))

    def step(self) -> list[Response]:
        """Decode one token for every running request; return the responses that finished.

        Raises UserError if vLLM gave up on one.
        """
        finished, self._finished = self._finished, []
        return [*finished, *(_response(output) for output in self.engine.step() if output.finished)]

    @property
    def busy(self) -> bool:
        return bool(self._finished or self.engine.has_unfinished_requests())

    @property
    def _scheduler(self) -> Any:
        core: Any = self.engine.engine_core
        return core.engine_core.scheduler

    @property
    def affords_seeds(self) -> bool:
        """Whether a seed per request costs little."""
        return self.device == "cpu" or draws_all_at_once(self.engine)

    def settle(self) -> None:
        """Collect what the engine has begun and not yet returned. Call before changing weights.

        With asynchronous scheduling (vLLM's default on GPUs) a step begins before the last step's tokens are read; they
        would be attributed to the next weights.
        """
        core: Any = self.engine.engine_core.engine_core
        if not core.batch_queue:
            return
        core.pause_scheduler("keep", clear_cache=False)  # begins nothing new
        while core.batch_queue:
            self._finished += [_response(output) for output in self.engine.step() if output.finished]
        core.resume_scheduler()

    def load(self, bundle: WeightBundle) -> None:
        """Replace the weights. Running requests continue with the new ones."""
        if self.adapter is None:
            self.engine.collective_rpc("load_bundle", kwargs={"weights": list(bundle.tensors())})
        else:
            arrived = self.adapter.load(self.engine, bundle.tensors())
            self.engine.collective_rpc("adapter_came", kwargs={"arrived": arrived})
        self._begin_version(bundle.version)

    def receive(self, step: str, version: int, **arguments: Any) -> None:
        """Call a transfer method on each of vLLM's workers. `version`: that of the weights that arrive."""
        self.engine.collective_rpc(step, kwargs=arguments)
        if step == "finish_weight_update":
            self._begin_version(version)

    def received_checksum(self) -> str:
        """Return the last transfer's checksum. Raises RuntimeError if the engine's workers received different ones."""
        return the_same(self.engine.collective_rpc("received_checksum"))

    def loaded(self) -> Loaded | None:
        """Return what all of the engine's GPUs together loaded since the last call; None if one loaded nothing."""
        reports: list[Loaded | None] = self.engine.collective_rpc("loaded_report")
        if None in reports:
            return None
        return joined([report for report in reports if report is not None])

    def sleep(self, level: int) -> None:
        """Free GPU memory; running requests are dropped. Level 1 keeps the weights in host memory; 2 drops them."""
        self.settle()
        self.abort(list(self.engine.output_processor.external_req_ids))  # those that vLLM drops would count as busy
        self._finished.clear()
        self.engine.sleep(level)
        self.asleep = {"weights", "kv_cache"}

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        if tag in self.asleep:
            self.engine.wake_up([tag])
            self.asleep.remove(tag)

    def _begin_version(self, version: int) -> None:
        """Drop what older weights computed: a request that continues with old keys and values has the log-probs of
        neither policy. With cache_after_update=keep running requests do so, but new ones do not (`_request`)."""
        if self.device == "cpu" and self.adapter is None:
            self.engine.apply_model(repack_head)
        self.engine.set_weight_version(str(version))
        self._loads += 1
        if self.config.cache_after_update == "keep":
            for request in self._scheduler.waiting:  # it begins with the new weights
                request.cache_salt = str(self._loads)
                request.block_hashes.clear()
                request.update_block_hashes()
            return
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM refused to reset its prefix cache")

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the log-probs of all sequences, each without its first token: [sum of (length - 1)].

        Running requests continue meanwhile; those that finish are returned by the next `step`. None has to end first:
        the sequences have their own slots, ahead of all waiting requests.
        """
        from vllm import SamplingParams

        scheduler = self._scheduler
        for i, token_ids in enumerate(sequences):
            parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
            self._request(f"canary-{i}", token_ids, parameters, salt="canary-")
        waiting = scheduler.waiting
        own = [request for request in waiting if request.request_id.startswith("canary-")]
        waiting.remove_requests(own)
        for request in reversed(own):
            waiting.prepend_request(request)
        finished: dict[str, Any] = {}
        scheduler.max_num_active_reqs += len(own)
        try:
            while len(finished) < len(sequences):
                for output in self.engine.step():
                    if output.finished and output.request_id.startswith("canary-"):
                        finished[output.request_id] = output
                    elif output.finished:
                        self._finished.append(_response(output))
        finally:
            scheduler.max_num_active_reqs -= len(own)
        of_each = [finished[f"canary-{i}"].prompt_logprobs.logprobs for i in range(len(sequences))]
        return np.concatenate([np.array(logprobs, dtype=np.float32) for logprobs in of_each])


def _response(output: Any) -> Response:
    completion = output.outputs[0]
    spans = completion.weight_versions
    reason = completion.finish_reason
    if reason == "error":
        raise UserError(
            f"vLLM failed on request {output.request_id}; its log says why (perhaps the grammar is too large)"
        )
    return Response(
        id=output.request_id,
        token_ids=np.array(completion.token_ids, dtype=np.int32),
        logprobs=np.array(completion.logprobs.logprobs, dtype=np.float32),
        finish_reason=reason if reason in ("stop", "length") else "abort",
        cached_prompt_tokens=int(output.num_cached_tokens or 0),
        versions=np.concatenate([np.full(s.end - s.start, int(s.version), np.int32) for s in spans]),
    )
