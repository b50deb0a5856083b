"""One rank of the critic, without Ray: values of response tokens, and their regression on returns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from algorithms.base import Advantages, Algorithm, ValueLossInputs
from rlkit.config.schema import CriticConfig
from rlkit.experience import Group
from rlkit.learner.batches import Minibatch, TrainGroup, per_token, plan_minibatches, rows_of, train_groups
from rlkit.learner.engine import build_engine, learning_rate, load_to_train, optimizer_step
from rlkit.learner.metrics import StepMetrics
from rlkit.models.packing import Tree, pack
from rlkit.models.policy import load_value_model

log = logging.getLogger(__name__)


class Critic:
    """Needs an initialised process group. Value t is read where token t is predicted: the state before it is chosen."""

    def __init__(
        self,
        model_path: str | Path,
        config: CriticConfig,
        algorithm: Algorithm,
        *,
        device: str,
        total_steps: int,
        trust_remote_code: bool = False,
    ) -> None:
        self.config, self.algorithm, self.device, self.total_steps = config, algorithm, device, total_steps
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.optimizer_steps = 0
        model = load_to_train(load_value_model, model_path, config, device, trust_remote_code=trust_remote_code)
        self.engine = build_engine(model, config, device)

    @torch.no_grad()
    def values(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """[T] of every sample of every group, in order."""
        return per_token(self.engine, groups, self.config.tokens_per_microbatch, self.device)

    def update(self, groups: Sequence[Group], advantages: Advantages, values: Sequence[np.ndarray]) -> dict[str, float]:
        """One training step towards `advantages.returns`; `values` are those the advantages were computed with.

        Call with equal arguments on every rank; metrics are equal on all.
        """
        if advantages.returns is None:
            raise ValueError(f"{type(self.algorithm).__name__} has a critic but gave no returns to train it with")
        metrics = StepMetrics("critic")
        for minibatch in plan_minibatches(
            train_groups(groups, advantages),
            self.config.minibatches_per_step,
            self.world_size,
            self.config.tokens_per_microbatch,
        ):
            self._step(minibatch, advantages, values, metrics)
        return metrics.reduced(self.device)

    def counters(self) -> dict[str, int]:
        return {"optimizer_steps": self.optimizer_steps}

    def set_counters(self, counters: dict[str, int]) -> None:
        self.optimizer_steps = counters["optimizer_steps"]

    def _step(
        self, minibatch: Minibatch, advantages: Advantages, values: Sequence[np.ndarray], metrics: StepMetrics
    ) -> None:
        rate = learning_rate(self.config, self.optimizer_steps, self.total_steps)
        losses = [
            partial(self._loss, microbatch, minibatch, advantages, values, metrics)
            for microbatch in minibatch.microbatches[self.rank]
        ]
        done = optimizer_step(self.engine, losses, rate)
        self.optimizer_steps += 1
        metrics.optimizer_step(grad_norm=done.grad_norm, rate=rate, skipped=done.skipped)

    def _loss(
        self,
        microbatch: Sequence[TrainGroup],
        minibatch: Minibatch,
        advantages: Advantages,
        old_values: Sequence[np.ndarray],
        metrics: StepMetrics,
    ) -> Tensor:
        if not microbatch:  # this rank has nothing left but must take part in the others' collective operations
            values: Tensor = self.engine(pack([Tree((0,), ((0,),))]).to(self.device))
            return values.sum() * 0.0
        rows = rows_of(microbatch, advantages, self.device)
        assert rows.returns is not None
        predicted = self.engine(pack([group.tree for group in microbatch]).to(self.device))
        output = self.algorithm.value_loss(
            ValueLossInputs(
                values=predicted,
                old_values=torch.from_numpy(np.concatenate([old_values[index] for index in rows.indices])).to(
                    self.device
                ),
                returns=rows.returns,
                mask=rows.mask,
                sequence=rows.sequence,
                num_sequences=len(rows.indices),
                denominators=minibatch.denominators,
            )
        )
        metrics.add(output)
        return output.loss
