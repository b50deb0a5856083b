"""Samples trajectories from a pool of policies, by one vLLM engine after another.

`python -m rewards.polar.generation ORDER.json` samples one policy; its memory is freed when the process ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rewards.polar.triplets import PromptRows
from rlkit.cluster import processes
from rlkit.config.schema import RolloutConfig
from rlkit.data.base import DataError
from rlkit.data.rendering import load_tokenizer
from rlkit.experience.section import Section
from rlkit.models.folder import ModelFolderError, check_model_folder, model_folder

POLL_SECONDS = 0.2
SHOWN_LINES = 20
LOOP = re.compile(r"(.{2,200}?)\1{3,}", re.DOTALL)
"""A span repeated four times or more."""
SHORTEST_LOOP = 64
"""In characters. Shorter repetitions are punctuation, lines of a table, or a row of zeros."""
KEPT = 3
"""Repetitions that are kept, so that the sample still shows the loop."""
ENDING = re.compile(r"[.!?。！？…][\"'”’)\]]*(?=\s)|[。！？]|\n")


class Generation(Section):
    """stage=generate: the pool of policies and its sampling. Defaults are the paper's."""

    policies: dict[str, str] = Field(default={})
    """The pool: name -> folder of a language model."""
    styles: dict[str, str] = Field(default={})
    """Policy -> its writing style, if styles differ; pre-training compares only within a style."""
    policies_per_prompt: int = Field(default=2, ge=2)
    """Number of policies drawn for each prompt."""
    samples_per_policy: int = Field(default=2, ge=2)
    """Responses from each policy drawn: two give a reference and a positive."""
    prompts_as: Literal["chat", "text"] = "chat"
    """chat: a user's message in each policy's chat template; text: the policies continue the prompt."""
    longest_prefix: int | None = Field(default=None, ge=1)
    """text: cut each prompt to a random number of tokens, from 1 to this (the paper: 1024)."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. If it is too low, policies cannot be told apart; if it is too high, they blur."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = Field(default=50, ge=0)
    """Sample from this many of the most likely tokens; 0: all."""
    max_new_tokens: int = Field(default=4096, ge=1)
    """Longest response in tokens; one that is cut off here is trimmed to its last complete sentence."""
    memory_gib: float = Field(default=1.0, gt=0)
    """CPU: memory of vLLM's key-value cache."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    """CUDA: share of the GPU's memory for vLLM."""
    stall_seconds: float = Field(default=900.0, gt=0)
    """The run ends if a policy finishes no response for this long (including loading)."""

    def problems(self) -> list[str]:
        messages = []
        for name, folder in self.policies.items():
            try:
                check_model_folder(folder)
            except ModelFolderError as error:
                messages.append(f"reward.generation.policies.{name}={folder}: {error}")
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                messages.append(f"reward.generation.policies.{name}: names consist of letters, digits, - _ and .")
        pool = len(self.policies)
        if pool and self.policies_per_prompt > pool:
            messages.append(f"reward.generation.policies_per_prompt={self.policies_per_prompt}: the pool has {pool}")
        unknown = sorted(set(self.styles) - set(self.policies))
        if unknown:
            messages.append(f"reward.generation.styles: {', '.join(unknown)} is not in the pool")
        return messages


@dataclass(frozen=True)
class SamplingOrder:
    """What one sampling process must do, as JSON."""

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
    """JSON Lines file: index of the prompt, number of the sample, finished, text."""


class SamplingFailed(DataError): ...


def draw(names: Sequence[str], prompts: int, policies: int, seed: int) -> list[list[str]]:
    rng = random.Random(f"pool/{seed}")
    return [sorted(rng.sample(names, policies), key=names.index) for _ in range(prompts)]


def prefixes(prompts: Sequence[str], tokenizer: Any, longest: int, seed: int) -> list[str]:
    """Return the first 1 to `longest` tokens of each prompt, as text."""
    rng = random.Random(f"prefix/{seed}")
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(row[: rng.randint(1, longest)], skip_special_tokens=True) for row in ids]


def generate(
    prompts: Sequence[PromptRows],
    options: Generation,
    work: Path,
    *,
    device: str,
    threads: int,
    seed: int,
    is_right: Callable[[PromptRows, str], bool | None],
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of trajectories.jsonl, one policy after another. Raise SamplingFailed."""
    names = list(options.policies)
    drawn = draw(names, len(prompts), options.policies_per_prompt, seed)
    for name in names:
        mine = [index for index, chosen in enumerate(drawn) if name in chosen]
        if not mine:
            continue
        say(f"sampling {name} on {len(mine)} prompts")
        own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4])
        order = SamplingOrder(
            folder=options.policies[name],
            prompts=[prompts[index].prompt for index in mine],
            samples=options.samples_per_policy,
            device=device,
            seed=own_seed,
            output=str(work / f"{name}.jsonl"),
            **{key: getattr(options, key) for key in _PASSED_ON},
        )
        run_policy(name, order, work, threads, options.stall_seconds)
        rows = [json.loads(line) for line in Path(order.output).read_text(encoding="utf-8").splitlines()]
        for row in sorted(rows, key=lambda row: (row["place"], row["turn"])):  # they arrive as they finish
            source = prompts[mine[row["place"]]]
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
    """Sample one policy in a separate process, which frees its memory and can be ended if it hangs."""
    from rlkit.rollout.engine import engine_environment

    spec, log, output = work / f"{name}.order.json", work / f"{name}.log", Path(order.output)
    spec.write_text(json.dumps(asdict(order)), encoding="utf-8")
    output.write_text("")
    environment = {**os.environ, **engine_environment(order.device, threads)}
    command = [sys.executable, "-m", "rewards.polar.generation", str(spec)]
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


# -- one policy --------------------------------------------------------------------------------------------------------


def sample(order: SamplingOrder) -> None:
    """Sample one policy; prompts too long for the model are left out and reported."""
    from rlkit.rollout.engine import stop_token_ids
    from rlkit.rollout.requests import Request
    from rlkit.rollout.sampler import Sampler

    folder = model_folder(order.folder)
    tokenizer = load_tokenizer(folder)
    if order.prompts_as == "chat":
        chats = [[{"role": "user", "content": prompt}] for prompt in order.prompts]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        prompts = tokenizer(order.prompts)
    ids = prompts["input_ids"]
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    longest = max(map(len, ids))
    if positions is not None:
        longest = min(longest, positions - 1)
    room = order.max_new_tokens if positions is None else min(order.max_new_tokens, positions - longest)
    sampler = Sampler(
        str(folder),
        RolloutConfig(
            temperature=order.temperature,
            top_p=order.top_p,
            top_k=order.top_k,
            max_prompt_tokens=longest,
            max_response_tokens=room,
            memory_gib=order.memory_gib,
            gpu_memory_utilization=order.gpu_memory_utilization,
        ),
        device=order.device,
        seed=order.seed,
        stop_token_ids=stop_token_ids(str(folder), tokenizer),
    )
    for index, prompt in enumerate(ids):
        if len(prompt) > longest:
            print(f"prompt {index} has {len(prompt)} tokens, more than the model's {longest}: left out")
            continue
        for turn in range(order.samples):
            seed = (order.seed + index * order.samples + turn) % 2**31
            sampler.add(Request(f"{index}/{turn}", prompt, seed, room, order.temperature))
    with Path(order.output).open("a", encoding="utf-8") as output:
        while sampler.busy:
            for response in sampler.step():
                text = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
                index, turn = map(int, response.id.split("/"))
                row = {"place": index, "turn": turn, "finished": response.finish_reason == "stop", "text": text}
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
            output.flush()


# -- trimming ----------------------------------------------------------------------------------------------------------


def trim(text: str, finished: bool) -> str:
    """Cut out loops and, unless `finished`, the unfinished end."""
    text = without_loops(text)
    return text if finished else without_unfinished_end(text)


def without_loops(text: str) -> str:
    return LOOP.sub(lambda loop: loop[1] * KEPT if len(loop[0]) >= SHORTEST_LOOP else loop[0], text)


def without_unfinished_end(text: str) -> str:
    """Cut after the last end of a sentence or line, if there is one."""
    ends = [match.end() for match in ENDING.finditer(text)]
    return text[: ends[-1]].rstrip("\n") if ends else text


if __name__ == "__main__":
    processes.die_with_parent()
    sample(SamplingOrder(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
