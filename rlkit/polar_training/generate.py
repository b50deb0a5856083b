"""Trajectories from a pool of policies: each prompt is answered by some of them, one vLLM engine after another."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlkit.cluster import processes
from rlkit.data.base import DataError
from rlkit.experience.section import Section
from rlkit.polar_training.rows import Asked

POLL_SECONDS = 0.2
SHOWN_LINES = 20


class Generation(Section):
    """stage=generate: the pool, and how it is sampled. The defaults are the paper's."""

    policies: dict[str, str] = Field(default={})
    """The pool: name -> folder of a language model."""
    styles: dict[str, str] = Field(default={})
    """Policy -> how it writes, where policies of the pool write differently; pre-training compares within a style."""
    policies_per_prompt: int = Field(default=2, ge=2)
    """Policies that answer a prompt, drawn anew for each."""
    samples_per_policy: int = Field(default=2, ge=2)
    """Responses of each of them: two make a reference and a positive."""
    prompts_as: Literal["chat", "text"] = "chat"
    """chat: the prompt is a user's message in each policy's chat template; text: the policies continue it."""
    longest_prefix: int | None = Field(default=None, ge=1)
    """text: of every prompt only the first 1 to so many tokens stay, a random number (the paper: 1024)."""
    temperature: float = Field(default=1.0, gt=0)
    """Too cold and policies cannot be told apart, too hot and they blur."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = Field(default=50, ge=0)
    """Sample from so many tokens; 0: all."""
    max_new_tokens: int = Field(default=4096, ge=1)
    """A response that has not ended by then is cut back to its last whole sentence."""
    memory_gib: float = Field(default=1.0, gt=0)
    """CPU: memory of vLLM's key-value cache."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    """CUDA: share of the GPU's memory that vLLM takes."""
    stall_seconds: float = Field(default=900.0, gt=0)
    """A policy that finishes no response for so long (loading included) ends the run."""


@dataclass(frozen=True)
class SamplingOrder:
    """What the process that samples one policy is told (as JSON)."""

    folder: str
    prompts: list[str]
    prompts_as: str
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    memory_gib: float
    gpu_memory_utilization: float
    device: str
    seed: int
    output: str
    """JSON Lines file: prompt's place, finished, text."""


class SamplingFailed(DataError):
    """A policy that could not be sampled; the message names it, the cause and its log."""


def draw(names: Sequence[str], prompts: int, each: int, seed: int) -> list[list[str]]:
    """Per prompt the policies that answer it, in the pool's order."""
    rng = random.Random(f"pool/{seed}")
    return [sorted(rng.sample(names, each), key=names.index) for _ in range(prompts)]


def prefixes(prompts: Sequence[str], tokenizer: Any, longest: int, seed: int) -> list[str]:
    """The first 1 to `longest` tokens of each document."""
    rng = random.Random(f"prefix/{seed}")
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(row[: rng.randint(1, longest)], skip_special_tokens=True) for row in ids]


def generate(
    asked: Sequence[Asked],
    options: Generation,
    work: Path,
    *,
    device: str,
    threads: int,
    seed: int,
    is_right: Callable[[Asked, str], bool | None],
    said: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of trajectories.jsonl, policy after policy. Raises SamplingFailed."""
    from rlkit.polar_training.trim import trim

    names = list(options.policies)
    drawn = draw(names, len(asked), options.policies_per_prompt, seed)
    for name in names:
        mine = [place for place, chosen in enumerate(drawn) if name in chosen]
        if not mine:
            continue
        said(f"sampling {name} on {len(mine)} prompts")
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4])
        order = SamplingOrder(
            folder=options.policies[name],
            prompts=[asked[place].prompt for place in mine],
            samples=options.samples_per_policy,
            device=device,
            seed=own_seed,
            output=str(work / f"{name}.jsonl"),
            **{key: getattr(options, key) for key in _PASSED_ON},
        )
        run_policy(name, order, work, threads, options.stall_seconds)
        rows = [json.loads(line) for line in Path(order.output).read_text(encoding="utf-8").splitlines()]
        for row in sorted(rows, key=lambda row: (row["place"], row["turn"])):  # they come as they finish
            source = asked[mine[row["place"]]]
            text = trim(row["text"], row["finished"])
            yield {
                "prompt": source.prompt,
                "response": text,
                "policy": name,
                "style": options.styles.get(name, ""),
                "correct": is_right(source, text),
                "reference": source.reference,
                "finished": row["finished"],
            }


_PASSED_ON = (
    "prompts_as", "temperature", "top_p", "top_k", "max_new_tokens", "memory_gib", "gpu_memory_utilization",
)  # fmt: skip


def run_policy(name: str, order: SamplingOrder, work: Path, threads: int, stall_seconds: float) -> None:
    """Sample one policy in a process of its own: its memory is free afterwards, and a hang can be ended."""
    from rlkit.rollout.sampler import engine_environment

    spec, log, output = work / f"{name}.order.json", work / f"{name}.log", Path(order.output)
    spec.write_text(json.dumps(asdict(order)), encoding="utf-8")
    output.write_text("")
    environment = {**os.environ, **engine_environment(order.device, threads)}
    command = [sys.executable, "-m", "rlkit.polar_training.sample_policy", str(spec)]
    process = processes.start(command, log, environment)
    try:
        size, since = 0, time.monotonic()
        while not processes.wait(process, POLL_SECONDS):
            if output.stat().st_size != size:
                size, since = output.stat().st_size, time.monotonic()
            elif time.monotonic() - since > stall_seconds:
                raise SamplingFailed(
                    f"policy {name} finished no response for {stall_seconds:g} s "
                    f"(reward.generation.stall_seconds); its log is {log}"
                )
    finally:
        processes.end([process])
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        raise SamplingFailed(f"policy {name} could not be sampled (exit code {process.returncode}):\n{last}\n({log})")


def pool_report(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per policy: responses, how many ended by themselves, and how many are right where that is known."""
    report: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == name]
        known = [row["correct"] for row in mine if row["correct"] is not None]
        text = "".join(row["response"] for row in mine)
        report[name] = {
            "responses": len(mine),
            "finished": sum(row["finished"] for row in mine) / len(mine),
            "accuracy": sum(known) / len(known) if known else None,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    return report
