"""A real rollout worker around a sampler without a model, which stops, fails or dies where a file says so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlkit.rollout.sampler import Request, Response
from rlkit.rollout.worker import RolloutWorker
from rlkit.weights.bundle import WeightBundle

HOLD_SECONDS = 30.0


def weights_of(version: int) -> WeightBundle:
    """A bundle whose one tensor is its version."""
    return WeightBundle.pack(version, [("version", torch.tensor([float(version)]))])


class ScriptedSampler:
    """Samples are three tokens whose log-probs are the weights; `script` holds the files."""

    stop_token_ids = (1,)

    def __init__(self, script: Path) -> None:
        self.script, self.weights = script, 0.0
        self.waiting: list[Request] = []
        self._meet("start")

    def _meet(self, point: str) -> None:
        """Die once if the file die-<point> is there, raise once if raise-<point> is; wait while hold-<point> is."""
        at = self.script / f"at-{point}"
        at.touch()
        if self.takes(f"die-{point}"):
            os._exit(9)
        if self.takes(f"raise-{point}"):
            raise ValueError(f"scripted failure at {point}")
        end = time.monotonic() + HOLD_SECONDS
        while (self.script / f"hold-{point}").exists() and time.monotonic() < end:
            time.sleep(0.01)

    def takes(self, file: str) -> bool:
        """Whether the file is there; of several processes only one takes it, unless always-<file> is there, too."""
        if (self.script / f"always-{file}").exists():
            return True
        try:
            (self.script / file).unlink()
        except FileNotFoundError:
            return False
        return True

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[Response]:
        self._meet("step")
        request = self.waiting.pop(0)
        logprobs = np.full(3, -self.weights, np.float32)
        return [Response(request.id, np.arange(3, dtype=np.int32), logprobs, "stop", 0)]

    def load(self, bundle: WeightBundle) -> None:
        self._meet(f"load-{bundle.version}")
        self.weights = float(dict(bundle.tensors())["version"][0]) + (
            0.5 if self.takes(f"wrong-{bundle.version}") else 0
        )

    def receive(self, step: str, **arguments: Any) -> None:
        raise ValueError("no room for this bucket")

    def prompt_logprobs(self, canary: Sequence[int]) -> np.ndarray:
        self._meet("canary")
        return np.full(len(canary) - 1, -self.weights, np.float32)

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        pass


class _Texts:
    def batch_decode(self, ids: Sequence[Any], skip_special_tokens: bool) -> list[str]:
        return ["text"] * len(ids)


class ScriptedWorker(RolloutWorker):
    """Use through Ray, in place of RolloutWorker."""

    def _load(self) -> None:
        self.tokenizer = _Texts()
        self.sampler: Any = ScriptedSampler(self.config.run_dir)

    def _take(self, bundle: WeightBundle) -> None:
        if self.sampler.takes(f"damaged-{bundle.version}"):
            bundle = replace(bundle, data=~bundle.data)
        super()._take(bundle)
        if self.sampler.takes(f"stale-{bundle.version}"):
            self.version -= 1


class Script:
    """The test's side: what the next process that comes to a point does there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def die_at(self, point: str) -> None:
        (self.folder / f"die-{point}").touch()

    def raise_at(self, point: str) -> None:
        (self.folder / f"raise-{point}").touch()

    def spoil(self, version: int, how: str, always: bool = False) -> None:
        """`damaged`, `stale` or `wrong`: the next process that takes weights of this version, or all of them."""
        (self.folder / f"{'always-' if always else ''}{how}-{version}").touch()

    def hold_at(self, point: str) -> None:
        (self.folder / f"at-{point}").unlink(missing_ok=True)
        (self.folder / f"hold-{point}").touch()

    def let_go(self, point: str) -> None:
        (self.folder / f"hold-{point}").unlink()

    def come_to(self, point: str) -> Iterator[None]:
        """Yields until a process has come to a point that is held."""
        end = time.monotonic() + HOLD_SECONDS
        while not (self.folder / f"at-{point}").exists():
            assert time.monotonic() < end, f"nobody came to {point}"
            yield
