"""Runs in the interpreter that has `verifiers`, and plays its environments for `environment=verifiers`.

Imports only the standard library and verifiers. Its messages are described in rlkit/environments/foreign/bridge.py;
what environments print goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TRIED = "verifiers>=0.3.1,<0.5"
OF_THE_POLICY = ("turns_spent", "context_length_exceeded", "EmptyModelResponseError", "InvalidModelResponseError")
"""Words in errors that the policy caused: a spent budget, or an answer without content or calls."""

SHOWN = 4000
"""Characters of an error that are shown."""


class Refused(Exception):
    """A message for the user, before anything is played."""


class Classic:
    """An environment of `verifiers.load_environment`, with a dataset and a rubric."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        import openai
        import verifiers
        from verifiers.clients import OpenAIChatCompletionsClient

        self.environment = verifiers.load_environment(name, **arguments)
        if self.environment.requires_group_rollouts or self.environment.provides_advantages:
            raise Refused(f"the rubric of {name} compares the rollouts of a group; each rollout needs its own reward")
        # The episode has the deadline. Creating a client is slow; copying it for another address is not.
        self.openai = openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1", timeout=None)
        self.new_client = OpenAIChatCompletionsClient

    def serving(self) -> Any:
        return contextlib.nullcontext()

    def tasks(self, most: int | None) -> dict[str, list[dict[str, Any]]]:
        splits = {"train": self.environment.build_dataset(), "heldout": self.environment.build_eval_dataset()}
        if splits["train"] is None:
            raise Refused("it has only a dataset for evaluation and nothing to train on")
        return {
            split: [_task(row, row["prompt"], row.get("answer")) for row in dataset.to_list()[:most]]
            for split, dataset in splits.items()
            if dataset is not None
        }

    async def run(self, row: Mapping[str, Any], base_url: str, model: str) -> dict[str, Any]:
        client = self.new_client(self.openai.with_options(base_url=base_url))
        output = await self.environment.run_rollout(row, client, model, {})
        error = output.get("error")
        if error and not _of_policy(str(error)):
            raise RuntimeError(error.get("error_chain_str") or error)
        return {"reward": output["reward"], "metrics": output["metrics"] or {}}


class Current:
    """An environment of `verifiers.v1`: a taskset and the agents that play it."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        import verifiers.v1 as vf

        config = vf.resolve_env_config({**arguments, "taskset": {**arguments.get("taskset", {}), "id": name}})
        self.vf, self.environment = vf, vf.load_environment(config)
        self.of_tasks = type(self.environment.taskset).task_type()

    def serving(self) -> Any:
        return self.environment.serving()

    def tasks(self, most: int | None) -> dict[str, list[dict[str, Any]]]:
        taskset = self.environment.taskset
        if most is None and not taskset.bounded:
            raise Refused("its tasks never end; set how many are used: environment.max_tasks=1000")
        listed = []
        for task in taskset if most is None else taskset.take(most):
            row = task.data.model_dump(mode="json")
            prompt = row["prompt"] or row["name"] or f"task {row['idx']}"
            if isinstance(prompt, str):
                system = [{"role": "system", "content": row["system_prompt"]}] if row["system_prompt"] else []
                prompt = [*system, {"role": "user", "content": prompt}]
            listed.append(_task(row, prompt, row.get("answer")))
        return {"train": listed}

    async def run(self, row: Mapping[str, Any], base_url: str, model: str) -> dict[str, Any]:
        vf, environment = self.vf, self.environment
        task = self.of_tasks(self.of_tasks.data_type().model_validate(row), environment.config.taskset.task)
        # A variable that nobody sets: the address is the only key.
        client = vf.EvalClientConfig(base_url=base_url, api_key_var="RLKIT_NO_KEY")
        (slot,) = environment.slots(task)
        episode = await environment.run_slot(slot, vf.ModelContext(model=model, client=client))
        traces = [trace for trace in episode.traces if trace.agent.trainable]
        errors = [*episode.errors, *(error for trace in traces if not trace.ok for error in trace.errors)]
        if errors or not traces:
            last = errors[-1] if errors else None
            raise RuntimeError(f"{last.type}: {last.message}" if last else "no trainable agent has played")
        rewards = {f"reward_{name}": reward.value for trace in traces for name, reward in trace.rewards.items()}
        metrics = {name: value for trace in traces for name, value in trace.metrics.items() if value is not None}
        return {"reward": sum(trace.reward for trace in traces) / len(traces), "metrics": {**rewards, **metrics}}


def _of_policy(error: str) -> bool:
    return any(name in error for name in OF_THE_POLICY)


def _task(row: Mapping[str, Any], prompt: list[Mapping[str, Any]], answer: Any) -> dict[str, Any]:
    messages = [{"role": message["role"], "content": _text(message["content"])} for message in prompt]
    content = {name: value for name, value in row.items() if name not in ("example_id", "idx")}
    return {
        "key": json.dumps(content, sort_keys=True, default=str),
        "messages": messages,
        "answer": answer if isinstance(answer, str) and answer else None,
        "row": row,
    }


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if wrong := next((part["type"] for part in content if part["type"] != "text"), None):
        raise Refused(f"its prompts have parts of type {wrong}, but the policy reads only text")
    return "".join(part["text"] for part in content)


def load(name: str, arguments: Mapping[str, Any]) -> Classic | Current:
    """Load an environment. Raises Refused."""
    try:
        installed = version("verifiers")
    except PackageNotFoundError:
        raise Refused(
            f"{sys.executable} has no verifiers; install it there: {sys.executable} -m pip install '{TRIED}'"
        ) from None
    release = tuple(int(part) for part in installed.split(".")[:2])
    if not (0, 3) <= release < (0, 5):
        raise Refused(f"{sys.executable} has verifiers {installed}, but this needs {TRIED}")
    module = name.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_")
    try:
        classic = hasattr(importlib.import_module(module), "load_environment")
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        classic = False
    if classic and release >= (0, 4):
        raise Refused(
            f"{module} has a load_environment, which verifiers {installed} no longer supports; install "
            "'verifiers>=0.3.1,<0.4' alongside it"
        )
    if not classic and release < (0, 4):
        raise Refused(
            f"{sys.executable} has no module {module} with a load_environment; install the package of {name} there, or "
            f"put {module}.py where the run is started; a taskset of verifiers.v1 needs 'verifiers>=0.4,<0.5'"
        )
    return (Classic if classic else Current)(name, arguments)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(fields: Mapping[str, Any]) -> None:
        answers.write(json.dumps(fields) + "\n")

    purpose = json.loads(sys.stdin.readline())
    sys.path[:1] = []  # the folder of this file
    sys.path.append(purpose["folder"])
    try:
        environment = load(purpose["id"], purpose["arguments"])
        say(environment.tasks(purpose["most"]) if purpose["list"] else {})
    except Exception as error:
        traceback.print_exc()
        say({"error": str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"})
        return
    if not purpose["list"]:
        asyncio.run(serve(environment, say))


async def serve(environment: Classic | Current, say: Any) -> None:
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str]()
    playing: dict[int, asyncio.Task[None]] = {}

    def read() -> None:
        for line in iter(sys.stdin.readline, ""):
            loop.call_soon_threadsafe(lines.put_nowait, line)
        os._exit(0)

    async def play(number: int, row: Mapping[str, Any], base_url: str, model: str) -> None:
        try:
            say({"number": number, **await environment.run(row, base_url, model)})
        except Exception as error:
            traceback.print_exc()
            say({"number": number, "error": f"{type(error).__name__}: {error}"[:SHOWN]})
        finally:
            playing.pop(number, None)

    async with environment.serving():
        threading.Thread(target=read, daemon=True).start()
        while True:
            request = json.loads(await lines.get())
            if (cancelled := request.get("cancel")) is not None:
                if cancelled in playing:
                    playing[cancelled].cancel()
                say({"cancelled": cancelled})
            else:
                playing[request["number"]] = asyncio.create_task(play(**request))


if __name__ == "__main__":
    main()
