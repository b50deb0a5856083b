"""Compares POLAR scoring with bare vLLM pooling, with and without sharing the common prefix of a group's samples.

    python benchmarks/polar.py [groups=32] [samples=8] [seconds=20] [threads=1] [model=random]

`model` is a discriminator's folder, `embedded:polar`, or `random`: 8 layers, width 384, random weights.

Inputs are the embedded task's problems, each with several answers and one reference, as in GRPO. The benchmark measures
inputs per second, end to end (text in, score out), of

- `transformers`: this project's packed forward pass, with a group's shared prefix computed once;
- `transformers, prefix not shared`: the same forward pass, with each input separate;
- `vllm`: this project's backend in vLLM's pooling runner, with its prefix cache;
- `bare vllm, prefix cache` and `bare vllm`: only `LLM.classify` on given token ids, as the lower bound.

Each is warmed up, then repeated for `seconds` on fresh inputs, which the prefix cache has not seen; the median counts.
Every row runs in a separate process. If the machine has other work, and for one thread, CPU time is the better figure.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DEFAULTS = {"groups": "32", "samples": "8", "seconds": "20", "threads": "1", "model": "random"}
ROWS = ("transformers", "transformers, prefix not shared", "vllm", "bare vllm, prefix cache", "bare vllm")
LEAST_REPEATS, MOST_REPEATS = 3, 30
ROW_SECONDS = 1800


def main() -> int:
    """Run every row; print a table."""
    options = dict(DEFAULTS)
    for argument in sys.argv[1:]:
        key, given, value = argument.partition("=")
        if key == "row":
            print(json.dumps(measure(value, options)))
            return 0
        if not given or key not in DEFAULTS:
            print(f"{argument}: not understood; known: {', '.join(DEFAULTS)}", file=sys.stderr)
            return 2
        options[key] = value
    with tempfile.TemporaryDirectory(prefix="polar_benchmark_") as temporary:
        if options["model"] == "random":
            options["model"] = random_model(Path(temporary))
        return table(options)


def table(options: dict[str, str]) -> int:
    """Print the table; every row runs in its own process."""
    arguments = [f"{key}={value}" for key, value in options.items()]
    print(f"{'':<34}{'inputs/s':>10}{'tokens/s':>11}{'CPU ms/group':>14}")
    scores = {}
    for row in ROWS:
        done = subprocess.run(
            [sys.executable, __file__, *arguments, f"row={row}"],
            capture_output=True,
            text=True,
            timeout=ROW_SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": options["threads"], "OMP_WAIT_POLICY": "PASSIVE"},
        )
        if done.returncode:
            print(f"{row}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        scores[row] = found["check"]
        print(
            f"{row:<34}{found['inputs_per_second']:>10.0f}{found['tokens_per_second']:>11.0f}"
            f"{found['cpu_milliseconds_per_group']:>14.2f}   ({found['repeats']} repeats)",
            flush=True,
        )
    spread = max(abs(a - b) for row in ROWS for a, b in zip(scores[row], scores[ROWS[0]], strict=True))
    print(f"largest difference between the rows' scores of the same inputs: {spread:.1e}")
    return 0


def random_model(folder: Path) -> str:
    """Write an untrained discriminator with the embedded tokenizer, whose scores differ between inputs."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from rlkit.models.folder import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder("embedded:polar"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=768, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=1024, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05, problem_type="regression",
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(row: str, options: dict[str, str]) -> dict[str, Any]:
    """Measure the median time of a row's scoring function over fresh inputs."""
    score = scorer(row, options)
    count, samples = int(options["groups"]), int(options["samples"])
    check = score(groups_of(4, samples, seed=0))
    score(groups_of(count, samples, seed=1))
    times, cpu_times, tokens, began = [], [], 0, time.perf_counter()
    while len(times) < LEAST_REPEATS or (
        time.perf_counter() - began < float(options["seconds"]) and len(times) < MOST_REPEATS
    ):
        groups = groups_of(count, samples, seed=2 + len(times))
        started, cpu_started = time.perf_counter(), time.process_time()
        score(groups)
        times.append(time.perf_counter() - started)
        cpu_times.append(time.process_time() - cpu_started)
        tokens = sum(len(ids) for ids in flat_inputs(groups, options["model"]))
    median = statistics.median(times)
    return {
        "inputs_per_second": count * samples / median,
        "cpu_milliseconds_per_group": 1000 * statistics.median(cpu_times) / count,
        "tokens_per_second": tokens / median,
        "repeats": len(times),
        "check": check,
    }


def groups_of(count: int, samples: int, seed: int) -> list[Any]:
    """Return groups of different answers to problems of the embedded task."""
    import numpy as np

    from examples.embedded_models.corpora import careless_solution
    from rlkit.data.arithmetic import ArithmeticConfig, draw_problems, write_solution
    from rlkit.experience import Group, Message, Prompt, Sample

    rng = random.Random(seed)
    problems = rng.sample(draw_problems(ArithmeticConfig(train_problems=4096), "train"), count)
    groups = []
    for problem in problems:
        reference = write_solution(problem.steps, problem.thing, "words")
        texts = [careless_solution(problem, "words", 0.5, rng) + f"\n#### {n}" for n in range(samples)]
        prompt = Prompt(problem.question, (Message("user", problem.question),), (1,), (reference,))
        empty = np.zeros(0, np.float32)
        groups.append(
            Group(
                problem.question,
                prompt,
                tuple(
                    Sample(i, empty.astype(np.int32), empty, text, "stop", (0, 0), 0) for i, text in enumerate(texts)
                ),
            )
        )
    return groups


def scorer(row: str, options: dict[str, str]) -> Callable[[Sequence[Any]], list[float]]:
    """Return the function groups -> scores of a row of the table."""
    if row.startswith("bare vllm"):
        return bare_vllm(options["model"], prefix_cache=row != "bare vllm")
    from rewards.base import RewardContext
    from rewards.polar.reward import PolarReward

    backend = "vllm" if row == "vllm" else "transformers"
    config = PolarReward.Config(backend=backend, model_path=options["model"])  # type: ignore[call-arg]
    reward = PolarReward(config, RewardContext(threads=int(options["threads"])))
    reward.start()
    together = row != "transformers, prefix not shared"

    def score(groups: Sequence[Any]) -> list[float]:
        if together:
            return [float(each.value or 0) for scores in reward.score(groups) for each in scores.samples]
        from dataclasses import replace

        single = [replace(group, samples=(sample,)) for group in groups for sample in group.samples]
        return [float(each.value or 0) for scores in reward.score(single) for each in scores.samples]

    return score


def bare_vllm(model: str, prefix_cache: bool) -> Callable[[Sequence[Any]], list[float]]:
    """Return vLLM's own `classify` on token ids; serialising is timed as in the other rows."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    from vllm import LLM, PoolingParams

    from rlkit.models.folder import model_folder

    llm = LLM(
        model=str(model_folder(model)),
        runner="pooling",
        dtype="float32",
        max_model_len=1024,
        enable_prefix_caching=prefix_cache,
        enforce_eager=True,
        disable_log_stats=True,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=2**30,
    )

    def score(groups: Sequence[Any]) -> list[float]:
        prompts = [{"prompt_token_ids": ids} for ids in flat_inputs(groups, model)]
        outputs = llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return [float(output.outputs.probs[0]) for output in outputs]

    return score


_SERIALISERS: dict[str, Any] = {}


def flat_inputs(groups: Sequence[Any], model: str) -> list[list[int]]:
    """Return the token ids of every input."""
    from transformers import AutoTokenizer

    from rewards.polar.serialise import Limits, Serialiser, prompt_text
    from rlkit.models.folder import model_folder

    if model not in _SERIALISERS:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(model), model_max_length=10**9)
        _SERIALISERS[model] = Serialiser(tokenizer, Limits(1016, 254))
    serialiser = _SERIALISERS[model]
    return [
        serialiser.token_ids(
            serialiser.text(prompt_text(group.prompt.messages), group.prompt.references[0], sample.text)
        )
        for group in groups
        for sample in group.samples
    ]


if __name__ == "__main__":
    sys.exit(main())
