"""The order in which prompts are drawn: reshuffled every epoch, without retired prompts, resumable at any position."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rlkit.data.base import DataError
from rlkit.data.stored import picked
from rlkit.experience import Prompt
from rlkit.experience.buffer import DataSolvedError

ALL_RETIRED = "the data are solved: the policy has reached buffer.retire_solved_share on every prompt"


class PromptOrder:
    """A seeded sequence of prompts, endless until all are retired. In an epoch each prompt comes at most once."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("there are no prompts to draw from")
        self._prompts = prompts
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._permutation = self._shuffled()
        self._fingerprint = _fingerprint(prompts)
        self._retired: set[str] = set()

    @property
    def left(self) -> int:
        """Number of prompts that are not retired."""
        return len(self._prompts) - len(self._retired)

    def retire(self, ids: Collection[str]) -> None:
        """Never draw these prompts again."""
        self._retired |= set(ids)

    def take(self, count: int) -> list[Prompt]:
        """Draw the next prompts. Raises DataSolvedError if all are retired."""
        if count < 0:
            raise ValueError(f"cannot take {count} prompts")
        prompts: list[Prompt] = []
        while len(prompts) < count:
            if not self.left:
                raise DataSolvedError(ALL_RETIRED)
            chosen = self._permutation[self._position : self._position + count - len(prompts)]
            drawn = (self._prompts[i] for i in chosen)
            prompts += [prompt for prompt in drawn if prompt.id not in self._retired]
            self._position += len(chosen)
            if self._position == len(self._prompts):
                self._epoch += 1
                self._position = 0
                self._permutation = self._shuffled()
        return prompts

    def named(self, ids: Collection[str]) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self._prompts if prompt.id in ids} if ids else {}

    def metrics(self) -> dict[str, float]:
        epochs = {"data/epochs": self._epoch + self._position / len(self._prompts)}
        return {**epochs, "data/retired": len(self._retired)} if self._retired else epochs

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
            "retired": sorted(self._retired),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position. Raises DataError if it was saved with other data."""
        count = state.get("prompts", "several sources of")
        if count != len(self._prompts) or state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"the checkpoint was made with other data ({count} prompts, now {len(self._prompts)}): resume with the "
                "same data files, system prompt and chat template, or start a new run."
            )
        if not 0 <= state["position"] < len(self._prompts):
            raise DataError(f"the checkpoint's data position {state['position']} is not within an epoch")
        self._seed = int(state["seed"])
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._permutation = self._shuffled()
        self._retired = set(state.get("retired", ()))  # not in older checkpoints

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._prompts))


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{len(prompt.id)}:{prompt.id}".encode())
        digest.update(np.asarray(prompt.token_ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


class MixtureOrder:
    """Prompts of several sources, each with its own order and epochs. In any stretch their numbers are in proportion to
    the weights."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, weights: Mapping[str, float]) -> None:
        """A prompt's id begins with `source/`. Raises DataError for a source without prompts."""
        parts: dict[str, list[int]] = {name: [] for name in weights}
        for i, prompt in enumerate(prompts):
            parts[prompt.id.partition("/")[0]].append(i)
        for name, own in parts.items():
            if not own:
                raise DataError(f"data.sources.{name} has no usable training problem")
        self._orders = {name: PromptOrder(picked(prompts, own), seed) for name, own in parts.items()}
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in weights.items()}
        self._taken = dict.fromkeys(weights, 0)

    def retire(self, ids: Collection[str]) -> None:
        for name, order in self._orders.items():
            order.retire([id for id in ids if id.partition("/")[0] == name])

    def take(self, count: int) -> list[Prompt]:
        """Draw the next prompts. A source whose prompts are all retired leaves its share to the others, by their
        weights. Raises DataSolvedError if all prompts are retired."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Prompt:
        left = [name for name, order in self._orders.items() if order.left]
        if not left:
            raise DataSolvedError(ALL_RETIRED)
        drawn = sum(self._taken[name] for name in left) + 1
        # Exactly 1 while nothing is retired: rounding would change a seed's order.
        total = 1 - sum(self._shares[name] for name in self._orders if name not in left)
        name = max(left, key=lambda name: self._shares[name] * drawn - self._taken[name] * total)
        self._taken[name] += 1
        return self._orders[name].take(1)[0]

    def named(self, ids: Collection[str]) -> dict[str, Prompt]:
        return {id: prompt for order in self._orders.values() for id, prompt in order.named(ids).items()}

    def metrics(self) -> dict[str, float]:
        """`data/epochs` is that of the source with the most epochs."""
        own = {name: order.metrics() for name, order in self._orders.items()}
        epochs = {f"data/epochs/{name}": metrics["data/epochs"] for name, metrics in own.items()}
        retired = sum(metrics.get("data/retired", 0) for metrics in own.values())
        return {"data/epochs": max(epochs.values()), **epochs, **({"data/retired": retired} if retired else {})}

    def state_dict(self) -> dict[str, Any]:
        orders = {name: order.state_dict() for name, order in self._orders.items()}
        return {"sources": orders, "taken": dict(self._taken), "shares": self._shares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position. Raises DataError if it was saved with other data. Changed weights apply from now on."""
        saved = state.get("sources", {})
        if saved.keys() != self._orders.keys():
            raise DataError(
                f"the checkpoint was made with other data (sources {', '.join(saved) or 'none'}, now "
                f"{', '.join(self._orders)}): resume with the same sources, or start a new run."
            )
        for name, order in self._orders.items():
            order.load_state_dict(saved[name])
        if state["shares"] == self._shares:
            self._taken = {name: int(count) for name, count in state["taken"].items()}


def order_of(prompts: Sequence[Prompt], seed: int, weights: Mapping[str, float]) -> PromptOrder | MixtureOrder:
    """Return the order of the prompts. `weights`: those of a mixture's sources."""
    return MixtureOrder(prompts, seed, weights) if weights else PromptOrder(prompts, seed)
