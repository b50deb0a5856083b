"""Seconds per GRPO step, beside the floor: bare vLLM generating and bare torch computing on the same tokens.

    python benchmarks/speed.py              # W1: 2 x 128 model, 64 completions of at most 32 tokens
    python benchmarks/speed.py --workload W2   # 8 x 384 model (11.8M), 64 completions of at most 256 tokens

Random models over 100 characters: responses end where an end-of-sequence token is drawn, so lengths are ragged. The
floor is measured in this process before the run, on batches of the same size; the run is `python -m rlkit.train` with a
reward that costs nothing and a learning rate that leaves the lengths alone; its times are medians over steps from
metrics.jsonl. The ratio is per response token. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORKLOADS = {
    "W1": {"hidden": 128, "layers": 2, "new_tokens": 32},
    "W2": {"hidden": 384, "layers": 8, "new_tokens": 256},
}
PROMPTS, SAMPLES = 8, 8


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama over printable ASCII with a character tokenizer and a plain chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *string.printable[:95], "\n"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def questions(count: int) -> list[str]:
    """Prompts of about 45 characters."""
    return [f"Write {i % 9 + 1} words about topic {i:03d}." for i in range(count)]


def floor(model: Path, new_tokens: int, repeats: int) -> dict[str, float]:
    """Bare vLLM on PROMPTS x SAMPLES completions, then bare torch on the tokens it made. Medians of `repeats`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(model)
    engine = LLM(
        model=str(model), dtype="float32", enforce_eager=True, max_model_len=64 + new_tokens, max_num_seqs=64,
        kv_cache_memory_bytes=2**30, enable_prefix_caching=True, distributed_executor_backend="uni",
        disable_log_stats=True,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generate, compute, tokens = [], [], []
    for repeat in range(repeats + 1):
        prompts: list[Any] = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=True, return_dict=True)[
                "input_ids"
            ]
            for q in questions(PROMPTS * (repeat + 1))[-PROMPTS:]
        ]
        began = time.perf_counter()
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(n=SAMPLES, temperature=1.0, max_tokens=new_tokens, seed=repeat, detokenize=False),
            use_tqdm=False,
        )
        generate.append(time.perf_counter() - began)
        sequences = [(list(o.prompt_token_ids), list(c.token_ids)) for o in outputs for c in o.outputs]
        tokens.append(sum(len(response) for _, response in sequences))
        began = time.perf_counter()
        bare_update(policy, sequences)
        compute.append(time.perf_counter() - began)
    return {
        "floor_generate": statistics.median(generate[1:]),
        "floor_update": statistics.median(compute[1:]),
        "floor_tokens": statistics.median(tokens[1:]),
    }


def bare_update(policy: Any, sequences: list[tuple[list[int], list[int]]]) -> None:
    """Forward and backward on real tokens: batches of equal length (no padding), each sequence with its own prompt."""
    import torch

    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for prompt, response in sequences:
        by_length.setdefault(len(prompt) + len(response), []).append((prompt, response))
    for batch in by_length.values():
        ids = torch.tensor([prompt + response for prompt, response in batch])
        first = min(len(prompt) for prompt, _ in batch)
        logits = policy(input_ids=ids, use_cache=False).logits[:, first - 1 : -1]
        logp = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, first:, None])
        logp.mean().backward()
    policy.zero_grad()


def ours(model: Path, new_tokens: int, steps: int, scratch: Path) -> dict[str, float]:
    """Medians over the steps of a whole run, the first three left out."""
    data, run_dir = scratch / "prompts.jsonl", scratch / "run"
    data.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions(256)))
    subprocess.run(
        [
            sys.executable, "-m", "rlkit.train", "algorithm=grpo", "algorithm.kl_coefficient=0", "model=hf",
            f"model.path={model}", "data=jsonl", f"data.path={data}",
            "reward._target_=benchmarks.controls.LetterReward",
            f"trainer.prompts_per_step={PROMPTS}", f"algorithm.samples_per_prompt={SAMPLES}",
            f"trainer.total_steps={steps + 3}", "trainer.evaluate_every_steps=0", "trainer.evaluation_prompts=1",
            "rollout.max_prompt_tokens=64", f"rollout.max_response_tokens={new_tokens}", "learner.learning_rate=1e-8",
            "tracking.tensorboard=false", "tracking.console=plain", f"run_dir={run_dir}",
        ],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = [record for record in records if record["kind"] == "step"][3:]
    names = ("time/step", "time/generate", "time/score", "time/update", "time/publish")
    result = {name: statistics.median(record[name] for record in timed) for name in names}
    result["tokens"] = statistics.median(record["length/mean"] for record in timed) * PROMPTS * SAMPLES
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    size: dict[str, int] = WORKLOADS[arguments.workload]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from rlkit.rollout.sampler import engine_environment

    os.environ.update(engine_environment("cpu", arguments.threads))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        make_model(scratch / "model", size["hidden"], size["layers"])
        result: dict[str, Any] = {"workload": arguments.workload, **size}
        result |= floor(scratch / "model", size["new_tokens"], repeats=max(3, arguments.steps // 4))
        result |= ours(scratch / "model", size["new_tokens"], arguments.steps, scratch)
    per_token = (result["floor_generate"] + result["floor_update"]) / result["floor_tokens"]
    result["step_over_floor_per_token"] = result["time/step"] / result["tokens"] / per_token
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
