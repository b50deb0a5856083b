"""Measures the peak memory of learner ranks and compares it with the prediction of `rlkit/config/memory.py`.

    python benchmarks/memory.py                     # all rows, one at a time; 20 minutes on two cores
    python benchmarks/memory.py --row "0.04B ZeRO 1, 1 rank"
    python benchmarks/memory.py --presets           # only predictions: what fits GPUs of 80 GB
    python benchmarks/memory.py --long              # the same for long responses of a 7B on eight of them

Each row makes a random model in a temporary folder and starts `learner.ranks` processes that run the Ray actor's class
(`LearnerWorker`) over gloo: load, two updates of several micro-batches, weights for the engines, checkpoint. The peak
of a phase is VmHWM, which /proc/self/clear_refs resets before it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PRESETS = (("single_gpu", "1.5B"), ("multi_gpu", "7B"), ("multi_node", "32B"))
"""The presets and the models that they are meant for."""
LONG_PROMPT, LONG_RESPONSES = 2048, (8192, 32768, 65536, 126976)
ADAPTER = "model.lora.rank=16"
"""Needs peft."""
PHASES = ("load", "update", "publish", "save")
GIB = 2**30


@dataclass(frozen=True)
class Model:
    kind: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "0.5B": Model("qwen2", 896, 24, 4864, 14, 2, 151936, True),
    "1.5B": Model("qwen2", 1536, 28, 8960, 12, 2, 151936, True),
    "3B": Model("qwen2", 2048, 36, 11008, 16, 2, 151936, True),
    "7B": Model("qwen2", 3584, 28, 18944, 28, 4, 152064, False),
    "14B": Model("qwen2", 5120, 48, 13824, 40, 8, 152064, False),
    "32B": Model("qwen2", 5120, 64, 27648, 40, 8, 152064, False),
    "72B": Model("qwen2", 8192, 80, 29568, 64, 8, 152064, False),
}
"""Qwen2.5, only for predictions."""
MODELS = {
    "0.04B": Model("llama", 640, 4, 1728, 10, 10, 16000, False),
    "0.1B": Model("llama", 768, 12, 2048, 12, 12, 32000, True),
    "0.3B": Model("qwen2", 1024, 16, 2816, 16, 4, 65536, False),
    "0.5B": SHAPES["0.5B"],
}


@dataclass(frozen=True)
class Row:
    model: str
    zero: int
    ranks: int = 1
    checkpointing: bool = False
    tokens: int = 1024
    """Tokens of a micro-batch."""
    reference: bool = False

    @property
    def name(self) -> str:
        extras = [*(["checkpointing"] if self.checkpointing else []), *(["reference"] if self.reference else [])]
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return ", ".join([f"{self.model} ZeRO {self.zero}", ranks, *extras])


ROWS = [
    Row("0.04B", 1, tokens=512),
    *(Row("0.1B", zero) for zero in (0, 1, 2, 3)),
    Row("0.1B", 1, checkpointing=True),
    Row("0.1B", 1, reference=True),
    *(Row("0.1B", zero, ranks=2) for zero in (0, 1, 2, 3)),
    Row("0.3B", 1, checkpointing=True),
    Row("0.3B", 2, ranks=2, checkpointing=True),
    Row("0.3B", 3, ranks=2, checkpointing=True),
    Row("0.5B", 0, checkpointing=True),
]


def overrides(row: Row, model: Path, run_dir: Path) -> list[str]:
    samples, prompt = 4, 64
    response = (row.tokens - prompt) // samples  # a group fills a micro-batch
    return [
        f"model.path={model}", "model=hf", "reward=rule", f"run_dir={run_dir}",
        f"trainer.prompts_per_step={2 * row.ranks}",
        f"algorithm.samples_per_prompt={samples}", f"algorithm.kl_coefficient={0.04 if row.reference else 0}",
        f"rollout.max_prompt_tokens={prompt}", f"rollout.max_response_tokens={response}",
        f"learner.ranks={row.ranks}", f"learner.zero_stage={row.zero}", f"learner.tokens_per_microbatch={row.tokens}",
        f"learner.gradient_checkpointing={str(row.checkpointing).lower()}", "cluster.threads_per_actor=1",
    ]  # fmt: skip


# -- in the process of a rank ------------------------------------------------------------------------------------------


def rank_main(rank: int, port: int, arguments: list[str]) -> None:
    """Print the peak resident bytes of each phase as JSON, starting with those after the imports."""
    import numpy as np

    from algorithms.base import Advantages
    from rlkit.config.loading import load_config
    from rlkit.learner.actors import LearnerWorker
    from rlkit.learner.dealing import policy_shares

    resolved = load_config(arguments)
    config = resolved.config
    answer = os.fdopen(os.dup(1), "w")  # an actor's output goes to its log
    algorithm = resolved.make_algorithm()
    worker = LearnerWorker(rank, config, config.model.path, algorithm, f"{config.run_dir}.{rank}.log")
    peaks: dict[str, int] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        result = work()
        peaks[name] = _status("VmHWM")
        peaks[f"after {name}"] = _status("VmRSS")
        return result

    def advantages(groups: list[Any]) -> Advantages:
        lengths = [len(sample) for group in groups for sample in group.samples]
        rows = [np.full(length, 1.0 if i % 2 else -1.0, np.float32) for i, length in enumerate(lengths)]
        return Advantages(rows, np.ones(len(rows), dtype=bool))

    def imports() -> None:
        import deepspeed  # noqa: F401

        import rlkit.learner.policy  # noqa: F401

    phase("imports", imports)
    phase("load", lambda: worker.start(config.learner.ranks, "127.0.0.1", port))
    groups = _groups(config, resolved.algorithm_config.samples_per_prompt)
    first, whole = (
        policy_shares(some, advantages(some), config.learner, algorithm.needs())[0][rank]
        for some in (groups[: config.learner.ranks], groups)
    )
    worker.learn(first)  # creates Adam's moments
    phase("update", lambda: worker.learn(whole))
    phase("publish", lambda: (worker.weights(), worker.canary_logprobs(((1, 2, 3, 4),))))
    folder = Path(f"{config.run_dir}.saved")
    folder.mkdir(exist_ok=True)
    phase("save", lambda: (worker.save(str(folder / "policy")), worker.save_state(str(folder / "state"))))
    print(json.dumps(peaks), file=answer, flush=True)
    os._exit(0)  # no need to wait for DeepSpeed's and gloo's threads


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _groups(config: Any, samples: int) -> list[Any]:
    """Return groups of full length with random tokens."""
    import numpy as np

    from rlkit.experience import Group, Prompt, Sample

    random = np.random.default_rng(0)
    length = config.rollout.max_response_tokens
    groups = []
    for number in range(config.trainer.prompts_per_step):
        prompt = tuple(int(token) for token in random.integers(5, 1000, config.rollout.max_prompt_tokens))
        responses = tuple(
            Sample(
                index=i, token_ids=random.integers(5, 1000, length).astype(np.int32),
                logprobs=np.full(length, -9.0, np.float32), text="", finish_reason="length", policy_versions=(0, 0),
                seed=i,
            )
            for i in range(samples)
        )  # fmt: skip
        groups.append(Group(str(number), Prompt(str(number), (), prompt), responses))
    return groups


# -- the rows ----------------------------------------------------------------------------------------------------------


def measure(row: Row, folder: Path) -> list[dict[str, int]]:
    """Return each rank's peak bytes per phase."""
    model = folder / row.model
    if not model.is_dir():
        write_model(MODELS[row.model], model, random=True)
    arguments = overrides(row, model, folder / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(rank), str(port), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(row.ranks)
    ]  # fmt: skip
    try:
        return [json.loads(process.communicate(timeout=900)[0].splitlines()[-1]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def predict(row: Row, folder: Path) -> dict[str, dict[str, float]]:
    """Return the predicted bytes per part of each phase."""
    from rlkit.config.loading import load_config
    from rlkit.config.memory import learner_phases

    resolved = load_config(overrides(row, folder / row.model, folder / "run"))
    return {name: dict(parts.host) for name, parts in learner_phases(resolved).items()}


def write_model(size: Model, folder: Path, *, random: bool) -> None:
    """Write a model folder. `random`: with fp32 weights, else with bf16 ones in a sparse file, only for predictions."""
    import numpy as np

    folder.mkdir(parents=True)
    config = {
        "model_type": size.kind, "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "intermediate_size": size.intermediate, "num_attention_heads": size.heads, "vocab_size": size.vocabulary,
        "num_key_value_heads": size.kv_heads, "tie_word_embeddings": size.tied, "max_position_embeddings": 131072,
        "architectures": [f"{size.kind.capitalize()}ForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for file in (ROOT / "rlkit" / "embedded" / "policy").iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    header, end, width = {}, 0, 4 if random else 2
    for name, shape in _tensors(size).items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": "F32" if random else "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        if not random:
            stream.truncate(stream.tell() + end)
            return
        for shape in _tensors(size).values():
            values = generator.standard_normal(math.prod(shape), dtype=np.float32) * np.float32(0.02)
            stream.write((values + (len(shape) == 1)).astype(np.float32).tobytes())


def _tensors(size: Model) -> dict[str, list[int]]:
    hidden, wide, keys = size.hidden, size.intermediate, size.kv_heads * size.hidden // size.heads
    layer = {
        "self_attn.q_proj.weight": [hidden, hidden], "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.v_proj.weight": [keys, hidden], "self_attn.o_proj.weight": [hidden, hidden],
        "mlp.gate_proj.weight": [wide, hidden], "mlp.up_proj.weight": [wide, hidden],
        "mlp.down_proj.weight": [hidden, wide],
        "input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden],
    }  # fmt: skip
    if size.kind == "qwen2":
        layer |= {f"self_attn.{x}_proj.bias": [hidden if x == "q" else keys] for x in "qkv"}
    tensors = {"model.embed_tokens.weight": [size.vocabulary, hidden], "model.norm.weight": [hidden]}
    if not size.tied:
        tensors["lm_head.weight"] = [size.vocabulary, hidden]
    return tensors | {f"model.layers.{i}.{part}": shape for i in range(size.layers) for part, shape in layer.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", help="only this row (repeat for more)")
    parser.add_argument("--json", action="store_true", help="a JSON line per row, with the predicted parts")
    parser.add_argument(
        "--presets", action="store_true", help="print the table of models and presets of docs/cluster.md"
    )
    parser.add_argument("--long", action="store_true", help="print the table of docs/long_contexts.md")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(int(arguments.rank[0]), int(arguments.rank[1]), arguments.rank[2:])
    elif arguments.presets:
        preset_table()
    elif arguments.long:
        long_table()
    else:
        run_rows(arguments)


def preset_table() -> None:
    """Print predicted GiB of 80 GB GPUs and one machine, with and without a reference policy, or what does not fit."""
    from rlkit.config.loading import load_config
    from rlkit.config.machine import host_bytes, this_machine
    from rlkit.config.memory import gpu_phases, total
    from rlkit.config.messages import ConfigError

    phases = ("load", "sample", "update", "publish")
    print(f"| cluster | model | {' | '.join(phases)} | host, each machine |\n|---|---|{'---|' * len(phases)}---|")
    with tempfile.TemporaryDirectory(prefix="rlkit-memory-") as folder:
        for options in (*([f"cluster={preset}"] for preset, _ in PRESETS), ["cluster=single_gpu", ADAPTER]):
            shown = ", ".join(option.removeprefix("cluster=") for option in options)
            for name, size in SHAPES.items():
                model = Path(folder) / name
                if not model.is_dir():
                    write_model(size, model, random=False)
                command = [
                    *options,
                    "model=hf",
                    f"model.path={model}",
                    "reward=rule",
                    f"run_dir={folder}/run",
                ]
                try:
                    load_config([*command, "cluster.gpu_memory_gib=80"])
                    fits = ""
                except ConfigError:
                    fits = " **does not fit**"
                with contextlib.suppress(ConfigError):  # four GPUs cannot share its heads
                    run = load_config(command)
                    gpu = {part: total(parts) for part, parts in gpu_phases(run, 80.0 * GIB).items()}
                    cells = [f"{gpu[phase] / GIB:.0f}" for phase in phases]
                    host = host_bytes(run, this_machine(run)) / GIB
                    print(f"| {shown} | {name}{fits} | {' | '.join(cells)} | {host:.0f} |")


def long_table() -> None:
    """Print predicted GiB in the update, for each of eight 80 GB GPUs that train a 7B; `ranks` share each sequence."""
    from rlkit.config.loading import load_config
    from rlkit.config.memory import GIB, gpu_phases, total
    from rlkit.config.messages import ConfigError

    ways = [(1, False), (2, False), (4, False), (1, True), (4, True)]
    heads = [f"{ranks} {'ranks' if ranks > 1 else 'rank'}{', offloaded' if offload else ''}" for ranks, offload in ways]
    print(f"| response tokens | {' | '.join(heads)} |\n|---|{'---|' * len(ways)}")
    with tempfile.TemporaryDirectory(prefix="rlkit-memory-") as folder:
        write_model(SHAPES["7B"], Path(folder) / "7B", random=False)
        for response in LONG_RESPONSES:
            cells = []
            for ranks, offload in ways:
                command = [
                    f"model.path={folder}/7B", "model=hf", "reward=rule", f"run_dir={folder}/run", "cluster=multi_gpu",
                    f"rollout.max_prompt_tokens={LONG_PROMPT}", f"rollout.max_response_tokens={response}",
                    f"learner.tokens_per_microbatch={LONG_PROMPT + response}", f"learner.sequence_parallel={ranks}",
                    f"learner.offload_activations={str(offload).lower()}", "dry_run=true",
                ]  # fmt: skip
                try:
                    load_config([*command, "cluster.gpu_memory_gib=80"])
                    fits = ""
                except ConfigError:
                    fits = " **does not fit**"
                update = total(gpu_phases(load_config(command), 80.0 * GIB)["update"])
                cells.append(f"{update / GIB:.0f}{fits}")
            print(f"| {response:,} | {' | '.join(cells)} |", flush=True)


def run_rows(arguments: argparse.Namespace) -> None:
    rows = [row for row in ROWS if not arguments.row or row.name in arguments.row]
    if not arguments.json:
        print(f"| measured / predicted GiB | {' | '.join(PHASES)} |\n|---|{'---|' * len(PHASES)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="rlkit-memory-") as name:
        for row in rows:
            began = time.monotonic()
            peaks = measure(row, Path(name))
            measured = {phase: float(max(peak[phase] for peak in peaks)) for phase in PHASES}
            parts = predict(row, Path(name))
            predicted = {phase: sum(parts[phase].values()) for phase in PHASES}
            if arguments.json:
                seconds = round(time.monotonic() - began)
                line = {"row": row.name, "seconds": seconds, "measured": measured, "predicted": predicted}
                print(json.dumps({**line, "parts": parts, "ranks": peaks}), flush=True)
                continue
            off = {phase: predicted[phase] / measured[phase] - 1 for phase in PHASES}
            cells = [f"{measured[p] / GIB:.2f} / {predicted[p] / GIB:.2f} ({off[p]:+.0%})" for p in PHASES]
            print(f"| {' | '.join([row.name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
