"""The optimizer step of offline reward training, in a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlkit.config.schema import LearnerConfig
from rlkit.experience import UserError
from rlkit.learner.engine import build_engine, learning_rate, optimizer_step
from rlkit.learner.policy_folder import gathered_parameters, parameter_metas, save_policy, with_buffers
from rlkit.models.packing import Tree, split_by_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Item(Protocol):
    @property
    def tokens(self) -> int:
        """Number of tokens in a packed batch."""
        ...


T = TypeVar("T", bound=Item)
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class PromptTree:
    tree: Tree
    pairs: tuple[tuple[int, int], ...] = ()
    """(better, worse) among the tree's suffixes."""
    labels: tuple[float, ...] = ()
    """One per suffix, or none."""

    @property
    def tokens(self) -> int:
        """Tokens that count against a micro-batch's limit."""
        return self.tree.charged_tokens


def items_within(members: Sequence[M], item: Callable[[Sequence[M]], T], limit: int) -> list[T]:
    """Make items of a prompt's members, halving them down to `limit` tokens or to one member."""
    whole = item(members)
    if whole.tokens <= limit or len(members) == 1:
        return [whole]
    half = len(members) // 2
    return [*items_within(members[:half], item, limit), *items_within(members[half:], item, limit)]


def pair_indices(items: Sequence[PromptTree]) -> tuple[list[int], list[int]]:
    """Return the indices (better, worse) of all pairs among the suffixes of all trees."""
    start, better, worse = 0, [], []
    for item in items:
        better += [start + first for first, _ in item.pairs]
        worse += [start + second for _, second in item.pairs]
        start += len(item.tree.suffixes)
    return better, worse


class StepSkipped(UserError):
    """Loss or gradient was not finite too many times in a row."""


class SupervisedEngine(Generic[T]):
    """Trains a module on items; all ranks call every method with the same arguments.

    `loss(module, items)` is a sum; `step` divides it by the total of the whole step, so that micro-batches and ranks do
    not matter.
    """

    MAX_SKIPPED = 3

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Any, Sequence[T]], Tensor],
        config: LearnerConfig,
        *,
        device: str,
        total_steps: int,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self.steps = 0
        self.skipped_in_a_row = 0
        self._loss = loss
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self.engine = build_engine(module, config, device)
        self.device = device

    def step(self, items: Sequence[T], total: float) -> float:
        """Run a step and return its loss: its sum divided by `total` (trained tokens, pairs, ...).

        Raise StepSkipped after MAX_SKIPPED steps in a row without a finite gradient.
        """
        value = torch.zeros((), device=self.device)

        def share(microbatch: Sequence[T]) -> Tensor:
            # A rank with no work left takes part in the others' collective operations with a loss of zero.
            loss = self._loss(self.engine, microbatch or items[:1]) / total
            loss = loss if microbatch else loss * 0.0
            value.add_(loss.detach())
            return loss

        losses = [partial(share, microbatch) for microbatch in self._my_microbatches(items)]
        done = optimizer_step(self.engine, losses, learning_rate(self.config, self.steps, self.total_steps))
        self.steps += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if done.skipped else 0
        if self.skipped_in_a_row >= self.MAX_SKIPPED:
            raise StepSkipped(
                f"{self.skipped_in_a_row} optimizer steps in a row had no finite gradient (last loss "
                f"{self._summed(value)}): lower reward.learning_rate or look at the data"
            )
        return self._summed(value)

    @torch.no_grad()
    def evaluate(self, items: Sequence[T], total: float) -> float:
        value = torch.zeros((), device=self.device)
        for microbatch in self._my_microbatches(items):
            loss = self._loss(self.engine, microbatch or items[:1]) / total
            value += loss if microbatch else loss * 0.0
        return self._summed(value)

    def _my_microbatches(self, items: Sequence[T]) -> list[list[T]]:
        """Return this rank's share: the same number of micro-batches as on every rank (the last may be empty)."""
        limit = self.config.tokens_per_microbatch
        batches = [[items[i] for i in members] for members in split_by_tokens([item.tokens for item in items], limit)]
        batches += [[] for _ in range(-len(batches) % self._world_size)]
        return batches[self._rank :: self._world_size]

    def _summed(self, value: Tensor) -> float:
        if self._world_size > 1:
            dist.all_reduce(value)
        return float(value)


def save_language_model(training: SupervisedEngine[Any], folder: Path) -> None:
    """Write the model; all ranks call it, rank 0 writes."""
    model = training.engine.module.model
    weights = gathered_parameters(model, training.config.zero_stage)
    if dist.get_rank() == 0:
        save_policy(model, *with_buffers(model, parameter_metas(model), weights), folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    for _ in weights:
        pass  # ZeRO-3 gathers on all ranks


def save_classifier(training: SupervisedEngine[Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer; all ranks call it, rank 0 writes."""
    model, rank = training.engine.module.model, dist.get_rank()
    weights = {
        name: tensor.cpu().clone()
        for name, tensor in gathered_parameters(model, training.config.zero_stage)
        if rank == 0
    }
    if rank == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
