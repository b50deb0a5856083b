"""Measures seconds per GRPO step, compared with a step without a framework and, if its environment is given, with TRL.

    python benchmarks/speed.py                            # W1: 2 x 128 model, 64 responses of at most 32 tokens
    python benchmarks/speed.py --workload W2 --steps 4    # 8 x 384 model (11.8M), 64 responses of at most 256 tokens
    python benchmarks/speed.py --trl trl/bin/python       # python3.11 -m venv trl; see benchmarks/speed_trl.py

The sides run in separate processes, one after the other, and all of them `--repeats` times:

- bare: vLLM's engine and torch in one process (benchmarks/speed_bare.py), with the prompts, seeds, sampling parameters
  and OpenMP settings of the run. The floor is its generation plus its update, by the faster of two ways to batch;
- k0, k1: `python -m rlkit.train` with `trainer.max_staleness` 0 and 1; `unrecorded` is k0 without recorded samples;
- trl: TRL's trainer, which is given the length of each response (benchmarks/speed_trl.py).

The model is random, over 100 characters; its responses end when an end-of-sequence token is drawn. Seeds make the
tokens of bare, k0 and k1 equal (the learning rate is too low to change them), and TRL gets their lengths, so all sides
have the same number of tokens in every step. Times are medians over the means of neighbouring steps, because with k1 a
long step follows a short one. CPU seconds are those of all processes of a side; if other jobs use the machine, they are
the figure to trust. Prints a Markdown table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORKLOADS = {
    "W1": {"hidden": 128, "layers": 2, "new_tokens": 32, "warm": 3},
    "W2": {"hidden": 384, "layers": 8, "new_tokens": 256, "warm": 1},
}
"""`warm`: steps at the start that are not timed."""
PROMPTS, SAMPLES, SEED = 8, 8, 0
UNRECORDED = ("tracking.sample_groups_per_step=0", "tracking.token_groups_per_step=0")
PHASES = ("generate", "score", "update", "publish")
ACTORS = {"RolloutWorker": "generate", "LearnerWorker": "update"}
"""Actors whose CPU seconds count as those of the phase, including their part of publishing."""
Figures = dict[str, float]


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """Write a random Llama over printable ASCII with a character tokenizer and a plain chat template."""
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
    """Return prompts of 48 tokens."""
    return [f"Write {i % 9 + 1} words about topic {i:03d}." for i in range(count)]


def median_of_pairs(values: Sequence[float]) -> float:
    return statistics.median((a + b) / 2 for a, b in pairwise(values)) if len(values) > 1 else values[0]


class Benchmark:
    def __init__(self, workload: str, steps: int, threads: int, scratch: Path, trl: str | None) -> None:
        from rlkit.rollout.engine import engine_environment

        size = WORKLOADS[workload]
        self.steps, self.threads, self.scratch, self.trl = steps, threads, scratch, trl
        self.environment = {**_inherited(), **engine_environment("cpu", threads), "TOKENIZERS_PARALLELISM": "false"}
        self.new_tokens, self.warm = size["new_tokens"], size["warm"]
        self.model, self.data, self.heldout = (scratch / name for name in ("model", "prompts.jsonl", "heldout.jsonl"))
        make_model(self.model, size["hidden"], size["layers"])
        rows = [json.dumps({"question": text, "answer": "1"}) + "\n" for text in questions(257)]
        self.data.write_text("".join(rows[:-1]))
        self.heldout.write_text(rows[-1])
        self.lengths: list[list[int]] = []
        """Length of each response, step by step."""

    def side(self, name: str) -> Figures:
        """Measure one side once."""
        sides: dict[str, Callable[[], Figures]] = {
            "bare": self.bare,
            "k0": lambda: self.run(0),
            "k1": lambda: self.run(1),
            "unrecorded": lambda: self.run(0, *UNRECORDED),
            "trl": self.peer,
        }
        return sides[name]()

    def bare(self) -> Figures:
        result = self._child(sys.executable, "speed_bare.py", seed=SEED)
        self.lengths = [step["lengths"] for step in result["steps"]]
        timed = result["steps"][self.warm :]
        middle: dict[str, Figures] = {
            part: {unit: median_of_pairs([step[part][unit] for step in timed]) for unit in ("wall", "cpu")}
            for part in ("generate", "update", "copy", "publish")
        }
        generated, updated = middle["generate"], middle["update"]
        return {
            "step": generated["wall"] + updated["wall"],
            "cpu": generated["cpu"] + updated["cpu"],
            "generate": generated["wall"],
            "update": updated["wall"],
            "publish": middle["publish"]["wall"],
            "copy": middle["copy"]["wall"],
            "generate_cpu": generated["cpu"],
            "update_cpu": updated["cpu"],
            "tokens": self._tokens(self.lengths),
        }

    def run(self, staleness: int, *options: str) -> Figures:
        """Run rlkit once, with a reward that costs nothing."""
        run_dir = self.scratch / f"run-{time.monotonic_ns()}"
        command = [
            sys.executable, "-m", "rlkit.train", "algorithm=grpo", "algorithm.kl_coefficient=0", "model=hf",
            f"model.path={self.model}", "data=jsonl", f"data.path={self.data}", f"data.heldout_path={self.heldout}",
            "reward._target_=benchmarks.controls.LetterReward", f"seed={SEED}", f"trainer.max_staleness={staleness}",
            f"trainer.prompts_per_step={PROMPTS}", f"algorithm.samples_per_prompt={SAMPLES}",
            f"trainer.total_steps={self.steps + self.warm}", "trainer.evaluate_every_steps=0",
            "trainer.evaluation_prompts=1", "evaluation.training_answers=false",
            f"cluster.threads_per_actor={self.threads}", "rollout.max_prompt_tokens=64",
            f"rollout.max_response_tokens={self.new_tokens}", "learner.learning_rate=1e-8",
            "tracking.tensorboard=false", "tracking.console=plain", f"run_dir={run_dir}",
            *options,
        ]  # fmt: skip
        log = self.scratch / "run.log"
        with (
            log.open("w") as output,
            subprocess.Popen(command, cwd=ROOT, env=_inherited(), stdout=output, stderr=subprocess.STDOUT) as process,
        ):
            began, marks = time.monotonic(), {}
            while process.poll() is None:
                done = _lines(run_dir)
                for mark in (1, self.warm, self.warm + self.steps - 1):  # processes end after the last step
                    if done >= mark and mark not in marks:
                        marks[mark] = done, time.monotonic() - began, _cpu_seconds(process.pid)
                time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")
        timed = _steps(run_dir)[self.warm :]
        figures = {name: median_of_pairs([step[f"time/{name}"] for step in timed]) for name in ("step", *PHASES)}
        figures["rest"] = figures["step"] - sum(figures[name] for name in ("generate", "update", "publish"))
        (before, _, early), (after, _, late) = marks[self.warm], marks[self.warm + self.steps - 1]
        cpu = {kind: (late[kind] - early[kind]) / (after - before) for kind in early}
        figures |= {"cpu": sum(cpu.values()), **{f"{kind}_cpu": seconds for kind, seconds in cpu.items()}}
        figures |= {"first_step_after": marks[1][1], "first_step_after_cpu": sum(marks[1][2].values())}
        figures["tokens"] = statistics.fmean(step["length/mean"] for step in timed) * PROMPTS * SAMPLES
        return figures

    def peer(self) -> Figures:
        assert self.trl is not None
        result = self._child(self.trl, "speed_trl.py", lengths=self.lengths)
        marks = result["marks"][self.warm - 1 :]
        spent: dict[str, list[float]] = {
            unit: [b[unit] - a[unit] for a, b in pairwise(marks)] for unit in ("wall", "cpu", "generate")
        }
        return {
            "step": median_of_pairs(spent["wall"]),
            "cpu": median_of_pairs(spent["cpu"]),
            "generate": median_of_pairs(spent["generate"]),
            "update": median_of_pairs([w - g for w, g in zip(spent["wall"], spent["generate"], strict=True)]),
            "tokens": statistics.fmean(result["tokens"][self.warm :]),
        }

    def _child(self, python: str, script: str, **more: Any) -> dict[str, Any]:
        work = {
            "model": str(self.model), "questions": questions(256), "prompts": PROMPTS, "samples": SAMPLES,
            "new_tokens": self.new_tokens, "steps": self.steps + self.warm, "warm": self.warm, **more,
        }  # fmt: skip
        command = [python, str(ROOT / "benchmarks" / script), json.dumps(work)]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if result["threads"] != self.threads:
            raise SystemExit(f"{script} had {result['threads']} threads, not {self.threads}")
        return result

    def _tokens(self, lengths: Iterable[Sequence[int]]) -> float:
        return statistics.fmean(map(sum, list(lengths)[self.warm :]))


def _inherited() -> dict[str, str]:
    import os

    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "VLLM_"))}
    return own | {"HF_HUB_OFFLINE": "1"}


def _lines(run_dir: Path) -> int:
    """Count lines, which are at least the steps so far; parsing them 50 times a second would slow the run down."""
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b'"kind":"step"') if file.is_file() else 0


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def _cpu_seconds(pid: int) -> dict[str, float]:
    """Return the CPU seconds of a run's sampler, its learner, and everything else that it started, including Ray."""
    import psutil

    seconds = dict.fromkeys(("generate", "update", "plumbing"), 0.0)
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = next((kind for name, kind in ACTORS.items() if title.startswith(f"ray::{name}")), "plumbing")
        seconds[kind] += times.user + times.system
    return seconds


def measure(benchmark: Benchmark, sides: Sequence[str], repeats: int) -> dict[str, Figures]:
    """Return medians of `repeats` rounds over all sides. The first side must be `bare`, which records the lengths."""
    rounds: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            rounds[side].append(benchmark.side(side))
            print(f"{side}: {_rounded(rounds[side][-1])}", file=sys.stderr, flush=True)
    return {
        side: {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        for side, measured in rounds.items()
    }


def _rounded(figures: Figures) -> Figures:
    return {name: round(value, 4) for name, value in figures.items()}


def table(figures: dict[str, Figures]) -> str:
    floor = figures["bare"]
    columns = ("step", "generate", "update", "publish", "rest", "cpu", "generate_cpu", "update_cpu", "plumbing_cpu")
    lines = [
        "| seconds | step | generate | update | publish | rest | CPU: all | sampler | learner | others | tokens "
        "| over floor, per token: wall, CPU |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for side, own in figures.items():
        cells = [f"{own[name]:.3f}" if name in own else "" for name in columns]
        wall, cpu = (own[unit] / own["tokens"] * floor["tokens"] / floor[unit] for unit in ("step", "cpu"))
        lines.append(f"| {side} | {' | '.join(cells)} | {own['tokens']:.0f} | {wall:.2f}, {cpu:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each actor, and of the other sides")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL")
    parser.add_argument("--sides", nargs="+", choices=("k0", "k1", "unrecorded"), default=["k0", "k1"])
    arguments = parser.parse_args()
    sides = ["bare", *arguments.sides, *(["trl"] if arguments.trl else [])]
    with tempfile.TemporaryDirectory() as temporary:
        benchmark = Benchmark(arguments.workload, arguments.steps, arguments.threads, Path(temporary), arguments.trl)
        figures = measure(benchmark, sides, arguments.repeats)
    print(table(figures))
    print(json.dumps({"workload": arguments.workload, **{side: _rounded(own) for side, own in figures.items()}}))


if __name__ == "__main__":
    main()
