"""One rank of the critic, without Ray: values of response tokens, and their regression towards the returns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from algorithms.base import Algorithm, Denominators, ValueLossInputs
from rlkit.config.schema import CriticConfig
from rlkit.learner.batches import Microbatch, Minibatch, Share, ValueRows, on_device, per_token
from rlkit.learner.engine import build_engine, learning_rate, load_to_train, optimizer_step
from rlkit.learner.metrics import StepMetrics
from rlkit.models.policy import load_value_model

log = logging.getLogger(__name__)


class Critic:
    """Needs an initialised process group. Value t is read where token t is predicted: it is that of the state before
    token t."""

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

    def values(self, microbatches: Sequence[Microbatch]) -> np.ndarray:
        """Values [R over all micro-batches]. Every rank must have the same number of micro-batches."""
        return per_token(self.engine, microbatches, self.device)

    def learn(self, share: Share[ValueRows]) -> dict[str, float]:
        """Run one training step towards the returns. All ranks call it, each with its share; metrics are equal on
        all."""
        metrics = StepMetrics("critic", self.config.sequence_parallel)
        for minibatch in share.minibatches:
            self._step(minibatch, metrics)
        return metrics.reduced(self.device)

    def counters(self) -> dict[str, int]:
        return {"optimizer_steps": self.optimizer_steps}

    def set_counters(self, counters: dict[str, int]) -> None:
        self.optimizer_steps = counters["optimizer_steps"]

    def _step(self, minibatch: Minibatch[ValueRows], metrics: StepMetrics) -> None:
        rate = learning_rate(self.config, self.optimizer_steps, self.total_steps)
        losses = [
            partial(self._loss, microbatch, rows, minibatch.denominators, metrics)
            for microbatch, rows in minibatch.microbatches
        ]
        done = optimizer_step(self.engine, losses, rate)
        self.optimizer_steps += 1
        metrics.optimizer_step(minibatch.denominators, grad_norm=done.grad_norm, rate=rate, skipped=done.skipped)

    def _loss(
        self, microbatch: Microbatch, rows: ValueRows | None, denominators: Denominators, metrics: StepMetrics
    ) -> Tensor:
        predicted: Tensor = self.engine(microbatch.packed(self.device))
        if rows is None:
            return predicted.sum() * 0.0
        output = self.algorithm.value_loss(
            ValueLossInputs(
                values=predicted,
                old_values=on_device(rows.old_values, self.device),
                returns=on_device(rows.returns, self.device),
                mask=on_device(rows.mask, self.device),
                sequence=microbatch.sequence(self.device),
                num_sequences=len(microbatch.lengths),
                denominators=denominators,
            )
        )
        metrics.add(output)
        return output.loss
