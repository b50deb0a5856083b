"""Peak memory of learner ranks: measured, and as `rlkit/config/memory.py` predicts it.

    python benchmarks/memory.py                     # all rows, one at a time; 20 minutes on two cores
    python benchmarks/memory.py --row "0.06B ZeRO 1, 1 rank"

Each row makes a random model in a temporary folder and starts `learner.ranks` processes that run the class of the Ray
actor (`LearnerWorker`) over gloo: load, two updates of several micro-batches, weights for the engines, checkpoint. The
peak of a phase is VmHWM, reset before it by /proc/self/clear_refs. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
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


MODELS = {
    "0.06B": Model("llama", 512, 8, 1376, 8, 8, 32000, False),
    "0.1B": Model("llama", 768, 12, 2048, 12, 12, 32000, True),
    "0.25B": Model("qwen2", 1024, 16, 2816, 16, 4, 65536, False),
    "0.5B": Model("qwen2", 896, 24, 4864, 14, 2, 151936, True),
}


@dataclass(frozen=True)
class Row:
    model: str
    zero: int
    ranks: int = 1
    checkpointing: bool = False
    tokens: int = 1024
    """Of a micro-batch."""
    reference: bool = False

    @property
    def name(self) -> str:
        extras = [*(["checkpointing"] if self.checkpointing else []), *(["reference"] if self.reference else [])]
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return ", ".join([f"{self.model} ZeRO {self.zero}", ranks, *extras])


ROWS = [
    Row("0.06B", 1),
    *(Row("0.1B", zero) for zero in (0, 1, 2, 3)),
    Row("0.1B", 1, checkpointing=True),
    Row("0.1B", 1, reference=True),
    *(Row("0.1B", zero, ranks=2) for zero in (0, 1, 2, 3)),
    Row("0.25B", 1, checkpointing=True),
    Row("0.25B", 2, ranks=2, checkpointing=True),
    Row("0.25B", 3, ranks=2, checkpointing=True),
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
    """Print the peak resident bytes of each phase as JSON, first those of a process that has only imported."""
    from rlkit.config.loading import load_config
    from rlkit.learner.actors import LearnerWorker

    resolved = load_config(arguments)
    config = resolved.config
    answer = os.fdopen(os.dup(1), "w")  # an actor's output goes to its log
    worker = LearnerWorker(rank, config, config.model.path, resolved.make_algorithm(), f"{config.run_dir}.{rank}.log")
    peaks: dict[str, int] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")
        result = work()
        peaks[name] = _status("VmHWM")
        peaks[f"after {name}"] = _status("VmRSS")
        return result

    def imports() -> None:
        import deepspeed  # noqa: F401

        import rlkit.learner.policy  # noqa: F401

    phase("imports", imports)
    phase("load", lambda: worker.start(config.learner.ranks, "127.0.0.1", port))
    groups, advantages = _experience(config, resolved.algorithm_config.samples_per_prompt)
    worker.update(groups[: config.learner.ranks], advantages)  # creates Adam's moments
    phase("update", lambda: worker.update(groups, advantages))
    phase("publish", lambda: worker.weights([1, 2, 3, 4]))
    folder = Path(f"{config.run_dir}.saved")
    folder.mkdir(exist_ok=True)
    phase("save", lambda: (worker.save(str(folder / "policy")), worker.save_state(str(folder / "state"))))
    print(json.dumps(peaks), file=answer, flush=True)
    os._exit(0)  # DeepSpeed's and gloo's threads need no farewell


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _experience(config: Any, samples: int) -> tuple[Any, Any]:
    """Groups of full length with random tokens, and advantages for them."""
    import numpy as np

    from algorithms.base import Advantages
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
    count = len(groups) * samples
    tokens = [np.full(length, 1.0 if i % 2 else -1.0, np.float32) for i in range(count)]
    return groups, Advantages(tokens, np.ones(count, dtype=bool))


# -- the rows ----------------------------------------------------------------------------------------------------------


def make_model(name: str, folder: Path) -> None:
    """Random weights (in a process of its own), and the tokenizer of the model in the package."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        size.kind, hidden_size=size.hidden, num_hidden_layers=size.layers, intermediate_size=size.intermediate,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied, max_position_embeddings=4096,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in (ROOT / "rlkit" / "embedded" / "policy").glob("*token*"):
        shutil.copy(file, folder)


def measure(row: Row, folder: Path) -> list[dict[str, int]]:
    """Peak bytes per phase of every rank."""
    model = folder / row.model
    if not (model / "config.json").is_file():
        subprocess.run(
            [sys.executable, __file__, "--make-model", row.model, str(model)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
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
    """Bytes per part, of each phase."""
    from rlkit.config.loading import load_config
    from rlkit.config.memory import learner_phases

    resolved = load_config(overrides(row, folder / row.model, folder / "run"))
    return {name: dict(parts.host) for name, parts in learner_phases(resolved).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", help="only this row (repeat for more)")
    parser.add_argument("--json", action="store_true", help="a JSON line per row, with the predicted parts")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--make-model", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(int(arguments.rank[0]), int(arguments.rank[1]), arguments.rank[2:])
    elif arguments.make_model:
        make_model(arguments.make_model[0], Path(arguments.make_model[1]))
    else:
        run_rows(arguments)


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
