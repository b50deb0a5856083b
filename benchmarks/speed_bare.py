"""Times a step without a framework: one process with vLLM's engine, and torch on the tokens that it generated.

Called by benchmarks/speed.py, which sets the environment before torch loads. Prompts, seeds and sampling parameters are
those of the rlkit run that it is compared with, so the tokens are the same. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOKENS_TOGETHER = 8192
"""Most tokens in a padded batch of the update."""
Sequences = list[tuple[list[int], list[int]]]
"""Prompt and response of each sample."""


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result, and the seconds and CPU seconds (of all threads) that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def engine(model: Path, new_tokens: int) -> Any:
    """Return vLLM's engine with the arguments of a rollout worker (rlkit/rollout/engine.py)."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=64 + new_tokens,
            max_num_seqs=256, enforce_eager=True, enable_prefix_caching=True, distributed_executor_backend="uni",
            logprobs_mode="processed_logprobs", disable_log_stats=True, generation_config="vllm",
            kv_cache_memory_bytes=2**30, block_size=32, enable_chunked_prefill=False, max_num_batched_tokens=8192,
        )
    )  # fmt: skip


def generate(llm: Any, prompts: Sequence[list[int]], samples: int, new_tokens: int, seeds: list[int]) -> Sequences:
    """Generate `samples` responses to each prompt, one request each."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for i, seed in enumerate(seeds):
        parameters = SamplingParams(
            temperature=1.0, max_tokens=new_tokens, seed=seed, logprobs=0, flat_logprobs=True, detokenize=False,
            stop_token_ids=[1], output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True,
        )  # fmt: skip
        llm.add_request(str(i), {"prompt_token_ids": prompts[i // samples]}, parameters)
    responses: dict[int, list[int]] = {}
    while llm.has_unfinished_requests():
        responses |= {int(o.request_id): list(o.outputs[0].token_ids) for o in llm.step() if o.finished}
    return [(prompts[i // samples], responses[i]) for i in range(len(seeds))]


def batches_of_equal_length(sequences: Sequences) -> list[Sequences]:
    """Batch sequences of equal length, without padding."""
    by_length: dict[int, Sequences] = {}
    for prompt, response in sequences:
        by_length.setdefault(len(response), []).append((prompt, response))
    return list(by_length.values())


def batches_of_similar_length(sequences: Sequences) -> list[Sequences]:
    """Batch sequences of similar length, padded to the longest of each batch."""
    batches: list[Sequences] = [[]]
    for prompt, response in sorted(sequences, key=lambda pair: len(pair[1])):
        if (len(batches[-1]) + 1) * (len(prompt) + len(response)) > TOKENS_TOGETHER:
            batches.append([])
        batches[-1].append((prompt, response))
    return batches


def update(policy: Any, optimizer: Any, batches: list[Sequences], tokens: int) -> None:
    """Run forward, backward, clipping and AdamW's step; prompts have equal lengths."""
    import torch

    for batch in batches:
        first = len(batch[0][0])
        rows = [torch.tensor(prompt + response) for prompt, response in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(response)) for _, response in batch], batch_first=True)
        # Padding comes after the tokens, so a causal model needs no mask for it.
        logits = policy(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits[:, :-1]
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, first:, None]).squeeze(-1)
        (-(logprobs * mask).sum() / tokens).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def publish(llm: Any, policy: Any) -> None:
    """Give the engine the policy's weights, in this process."""
    weights = [(name, parameter.detach()) for name, parameter in policy.named_parameters()]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    llm.reset_prefix_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=json.loads, help="what benchmarks/speed.py writes")
    work = parser.parse_args().work
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlkit.data.order import PromptOrder
    from rlkit.experience import Prompt
    from rlkit.rollout.requests import sample_seed

    model, samples = Path(work["model"]), work["samples"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=True)["input_ids"]
        for text in work["questions"]
    ]
    order = PromptOrder([Prompt(str(i), (), tuple(ids)) for i, ids in enumerate(prompts)], work["seed"])
    llm = engine(model, work["new_tokens"])
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-8, fused=True)
    flat = torch.empty(sum(parameter.numel() for parameter in policy.parameters()))
    ways, steps = [batches_of_equal_length, batches_of_similar_length], []
    for step in range(work["steps"]):
        asked = [list(prompt.token_ids) for prompt in order.take(work["prompts"])]
        groups = range(step * len(asked), (step + 1) * len(asked))
        seeds = [sample_seed(work["seed"], f"{group:08d}", i) for group in groups for i in range(samples)]
        sequences, generated = timed(lambda: generate(llm, asked, samples, work["new_tokens"], seeds))  # noqa: B023
        lengths = [len(response) for _, response in sequences]
        record: dict[str, Any] = {"generate": generated, "lengths": lengths}
        tried = []
        for batched in ways:
            batches = batched(sequences)
            tried.append(timed(lambda: update(policy, optimizer, batches, sum(lengths)))[1])  # noqa: B023
        record["update"] = min(tried, key=lambda seconds: seconds["cpu"])
        if step == work["warm"] - 1:
            ways = [ways[tried.index(record["update"])]]
        parameters = [parameter.detach().view(-1) for parameter in policy.parameters()]
        record["copy"] = timed(lambda: torch.cat(parameters, out=flat))[1]  # noqa: B023
        record["publish"] = timed(lambda: publish(llm, policy))[1]
        steps.append(record)
    print(json.dumps({"steps": steps, "threads": torch.get_num_threads(), "bytes": flat.numel() * 4}))


if __name__ == "__main__":
    main()
