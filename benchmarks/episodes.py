"""Measures what episodes cost compared with single-turn rollouts of equal tokens, on one engine in this process.

    python benchmarks/episodes.py                         # embedded:agent, 128 episodes of 8 turns with 8 tokens each
    python benchmarks/episodes.py --turns 24 --tokens 2   # many short turns, as in a walk through a maze

Three kinds of work alternate over the same tokens. `episodes`: an environment in the rollout worker that says the same
after every turn. `requests`: the same turns as single-turn rollouts of the same prompts and seeds, in waves, so that
the engine does the same work. `long`: one response of as many tokens. No turn ends before its budget. Figures are
medians over the repeats, in wall-clock seconds and in CPU seconds of this process; those of the engine are the time
inside vLLM. `overhead` is the time of `episodes` beyond that of `requests`. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from rlkit.environments.base import Action, Environment, Step, Task
from rlkit.experience import Group, Message, Prompt

KINDS = ("episodes", "requests", "long")
GROUPS, SAMPLES = 16, 8


class Echo(Environment):
    """Answers every turn with the same text and never ends by itself."""

    @classmethod
    def tasks(cls, config: Any, split: str, seed: int) -> Sequence[Task]:
        return [Task(f"{split}-{n}", (Message("user", f"Walk from a{n} to e5. a{n}: north, east"),)) for n in range(99)]

    def step(self, action: Action) -> Step:
        return Step("b2: north, east", reward=0.1, success=False, state="b2")


class Engine:
    """Counts the tokens that pass through a worker's sampler, and the time they take."""

    def __init__(self, sampler: Any) -> None:
        self.asked: list[Any] = []
        self.tokens, self.wall, self.cpu = 0, 0.0, 0.0
        add, step = sampler.add, sampler.step

        def adding(request: Any) -> None:
            self.asked.append(request)
            self._timed(add, request)

        def stepping() -> Any:
            responses = self._timed(step)
            self.tokens += sum(len(response.token_ids) for response in responses)
            return responses

        sampler.add, sampler.step = adding, stepping

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = work(*arguments)
        self.wall += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu
        return result


class Benchmark:
    def __init__(self, worker: Any, turns: int, tokens: int) -> None:
        self.worker, self.turns, self.tokens = worker, turns, tokens
        self.episodes, self.engine = worker.episodes, Engine(worker.sampler)
        self.with_environment = worker.config
        self.without = worker.config.model_copy(update={"environment": {"_target_": None}})
        worker.sampler.stop_token_ids = []
        self.seconds: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in KINDS}

    async def repeat(self, number: int, counted: bool) -> None:
        from rlkit.rollout.requests import GroupRequest

        prompts = [
            Prompt(task.id, task.messages, tuple(self.episodes.renderer.whole(task.messages)))
            for task in Echo.tasks(None, "train", 0)[:GROUPS]
        ]
        names = [f"{number}-{place}" for place in range(GROUPS)]
        requests = [GroupRequest(name, p, SAMPLES, number, 1) for name, p in zip(names, prompts, strict=True)]
        played = await self._timed("episodes", [requests], counted)
        waves: dict[int, list[GroupRequest]] = defaultdict(list)
        for asked in self.engine.asked:
            turn = int(asked.id.rpartition(":")[2])
            prompt = Prompt(asked.id, (), tuple(asked.prompt))
            one = GroupRequest(asked.id, prompt, 1, asked.seed, 1, max_response_tokens=asked.max_tokens)
            waves[turn].append(one)
        again = await self._timed("requests", list(waves.values()), counted)
        assert sorted(_own_tokens(played)) == sorted(_joined(again)), "the same seeds sampled other tokens"
        await self._timed("long", [requests], counted)

    async def _timed(self, kind: str, waves: Sequence[Sequence[Any]], counted: bool) -> list[Group]:
        worker, engine = self.worker, self.engine
        worker.config = self.with_environment if kind == "episodes" else self.without
        worker.sampler.engine.reset_prefix_cache()
        engine.asked, engine.tokens, engine.wall, engine.cpu = [], 0, 0.0, 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        groups: list[Group] = []
        for wave in waves:
            async for item in worker.generate(wave):
                groups += item if isinstance(item, list) else []
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        expected = GROUPS * SAMPLES * self.turns * self.tokens
        assert engine.tokens == expected, f"{kind}: {engine.tokens} tokens, and not {expected}"
        if counted:
            seconds = self.seconds[kind]
            for name, value in (("wall", wall), ("cpu", cpu), ("engine_wall", engine.wall), ("engine_cpu", engine.cpu)):
                seconds[name].append(value)
        return groups

    def result(self) -> dict[str, Any]:
        medians = {
            kind: {name: statistics.median(values) for name, values in seconds.items()}
            for kind, seconds in self.seconds.items()
        }
        episodes, alone = medians["episodes"], medians["requests"]
        count = GROUPS * SAMPLES * self.turns
        return {
            "turns_per_second": count / episodes["wall"],
            "outside_engine_share": 1 - episodes["engine_wall"] / episodes["wall"],
            "outside_engine_share_of_requests": 1 - alone["engine_wall"] / alone["wall"],
            "outside_engine_cpu_us_per_turn": 1e6 * (episodes["cpu"] - episodes["engine_cpu"]) / count,
            "overhead_wall": episodes["wall"] / alone["wall"] - 1,
            "overhead_cpu": episodes["cpu"] / alone["cpu"] - 1,
            **{kind: {name: round(value, 4) for name, value in of_kind.items()} for kind, of_kind in medians.items()},
        }


def _own_tokens(groups: Sequence[Group]) -> list[list[int]]:
    return [sample.token_ids[sample.trained].tolist() for group in groups for sample in group.samples]


def _joined(groups: Sequence[Group]) -> list[list[int]]:
    """Return the turns of each sample, concatenated."""
    turns: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for group in groups:
        sample, _, turn = group.id.rpartition(":")
        turns[sample][int(turn)] = group.samples[0].token_ids.tolist()
    return [[token for turn in sorted(of_sample) for token in of_sample[turn]] for of_sample in turns.values()]


def without_end(model: str, folder: Path) -> Path:
    """Copy the model with a configuration that names no end-of-sequence token, because vLLM would stop at it."""
    from rlkit.models.folder import model_folder

    shutil.copytree(model_folder(model), folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": None}))
    return folder


async def measure(model: str, turns: int, tokens: int, repeats: int, scratch: Path) -> dict[str, Any]:
    import rlkit.rollout.worker
    from rlkit.config.loading import load_config

    folder = without_end(model, scratch / "model")
    words = [
        "model=agent", f"model.path={folder}", "environment._target_=benchmarks.episodes.Echo", "data=environment",
        "reward=environment", "verifier=environment", "environment.placement=inline",
        f"environment.max_turns={turns}", f"environment.max_turn_tokens={tokens}", f"run_dir={scratch / 'run'}",
        f"rollout.max_response_tokens={turns * (tokens + 32)}", "rollout.memory_gib=0.5",
    ]  # fmt: skip
    config = load_config(words).config
    # Each of `requests` is a group of one sample, and carries the seed of its turn.
    rlkit.rollout.worker.sample_seed = lambda seed, group, index: seed if ":" in group else hash((seed, group, index))
    screen = os.dup(1), os.dup(2)
    worker = rlkit.rollout.worker.RolloutWorker(str(folder), config, str(scratch / "worker.log"), 0)
    await worker.start()
    for copy, original in zip(screen, (1, 2), strict=True):  # an actor writes to its log
        os.dup2(copy, original)
    worker.rollout = worker.rollout.model_copy(update={"max_response_tokens": turns * tokens})
    benchmark = Benchmark(worker, turns, tokens)
    for number in range(repeats + 1):
        await benchmark.repeat(number, counted=number > 0)
    return benchmark.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:agent")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    from rlkit.rollout.engine import engine_environment

    os.environ.update(engine_environment("cpu", arguments.threads))
    with tempfile.TemporaryDirectory() as scratch:
        result = asyncio.run(
            measure(arguments.model, arguments.turns, arguments.tokens, arguments.repeats, Path(scratch))
        )
    given = {"turns": arguments.turns, "tokens": arguments.tokens}
    print(json.dumps(given | {key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
