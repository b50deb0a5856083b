"""One rank of the policy learner, without Ray: log-probs, the update, and the weights it publishes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from algorithms.base import POLICY, REFERENCE, Algorithm, Denominators, LossInputs
from rlkit.config.lora import AdapterConfig
from rlkit.config.schema import LearnerConfig
from rlkit.diagnostics.base import Diagnostic
from rlkit.learner.adapter import WithoutAdapter, adapter_tensors, add_adapter, save_adapter
from rlkit.learner.batches import Microbatch, Minibatch, PolicyRows, Share, on_device, per_token
from rlkit.learner.engine import build_engine, learning_rate, load_frozen, load_to_train, optimizer_step
from rlkit.learner.frozen import move_towards
from rlkit.learner.metrics import StepMetrics, measured, mismatch, with_effective_size
from rlkit.learner.policy_folder import (
    GATHERED_BYTES,
    gathered_parameters,
    parameter_metas,
    save_policy,
    with_buffers,
)
from rlkit.learner.signals import Watch
from rlkit.learner.weight_names import CheckpointNames
from rlkit.models.folder import model_folder
from rlkit.models.packing import PackedBatch, Tree, pack
from rlkit.models.policy import load_causal_lm
from rlkit.weights.bundle import TensorMeta
from rlkit.weights.tensor_file import WrittenFile

log = logging.getLogger(__name__)


class PolicyLearner:
    """Needs an initialised process group. `total_steps`: number of optimizer steps, for schedules that decay."""

    def __init__(
        self,
        model_path: str | Path,
        config: LearnerConfig,
        algorithm: Algorithm,
        *,
        device: str,
        temperature: float,
        total_steps: int,
        trust_remote_code: bool = False,
        reference: bool = True,
        lora: AdapterConfig | None = None,
        diagnostics: Sequence[Diagnostic] = (),
    ) -> None:
        """`reference`: whether the loss computes the reference's log-probs, if it needs them. `lora`: train only an
        adapter. `diagnostics`: those that measure something."""
        self.config = config
        self.diagnostics = diagnostics
        self.algorithm = algorithm
        self.device = device
        self.temperature = temperature
        self.total_steps = total_steps
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.optimizer_steps = 0
        self.version = 0
        self.watch = Watch()
        policy = load_to_train(load_causal_lm, model_path, config, device, trust_remote_code=trust_remote_code)
        if lora is not None:
            add_adapter(policy.model, lora)
        self.engine = build_engine(policy, config, device)
        self._load_frozen = partial(load_frozen, load_causal_lm, config=config, device=device)
        self._trusted = trust_remote_code
        self.base = None if lora is None else WithoutAdapter(self.engine)
        self.frozen: dict[str, Any] = {}
        """Models that only run forward: `reference`, and those from folders."""
        models = algorithm.needs().frozen_models(references_cached=not reference)
        if REFERENCE in models and self.base is not None:
            models.remove(REFERENCE)
            self.frozen[REFERENCE] = self.base
        for name in sorted(models):
            self.hold(name, model_path if name == REFERENCE else model_folder(name))

    def hold(self, name: str, path: str | Path) -> None:
        """Load a model for `logprobs`, replacing any of the same name. All ranks call it."""
        self.frozen.pop(name, None)
        self.frozen[name] = self._load_frozen(path, trust_remote_code=self._trusted)

    # -- log-probs -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def canary_logprobs(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probs at temperature 1 of all sequences in one packed row, each without its first token: [sum of
        (length - 1)]."""
        packed = pack([Tree(ids[:1], (ids[1:],)) for ids in sequences]).to(self.device)
        logprobs, _ = self.engine(packed, 1.0, self.config.logit_elements_per_chunk)
        return logprobs.float().cpu().numpy()

    def logprobs(self, microbatches: Sequence[Microbatch], which: str = POLICY) -> np.ndarray:
        """Log-probs [R over all micro-batches] under the policy or a model that is held. Every rank must have the same
        number of micro-batches."""
        if which not in (POLICY, *self.frozen):
            raise ValueError(f"this learner holds no model {which!r}: the algorithm did not ask for it")
        model = self.engine if which == POLICY else self.frozen[which]
        return per_token(lambda packed: self._forward(model, packed)[0], microbatches, self.device)

    def _forward(self, model: Any, packed: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropy = model(packed, self.temperature, self.config.logit_elements_per_chunk)
        return logprobs, entropy

    # -- the update ----------------------------------------------------------------------------------------------

    def learn(self, share: Share[PolicyRows]) -> dict[str, float]:
        """Run one training step. All ranks call it, each with its share; metrics are equal on all.

        Optimizer steps whose loss or gradient is not finite are skipped and reported.
        """
        metrics, self.watch = StepMetrics("policy", self.config.sequence_parallel), Watch()
        old = self._old_logprobs(share)
        for minibatch, before in zip(share.minibatches, old, strict=True):
            self._optimizer_step(minibatch, before, share, metrics)
        self.version += 1
        self._move_reference()
        result = with_effective_size(metrics.reduced(self.device))
        result["policy/optimizer_steps"] = float(self.optimizer_steps)
        return result

    @torch.no_grad()
    def _old_logprobs(self, share: Share[PolicyRows]) -> list[list[torch.Tensor | None]]:
        """Log-probs [R] of each micro-batch under the policy before the first optimizer step; None in the first
        mini-batch, where the update's own forward pass gives them."""

        def before(microbatch: Microbatch, rows: PolicyRows | None) -> torch.Tensor | None:
            if not share.old_known:
                return self._forward(self.engine, microbatch.packed(self.device))[0]
            known = None if rows is None else rows.old_logprobs
            return None if known is None else on_device(known, self.device)

        return [
            [before(*microbatch) if m else None for microbatch in minibatch.microbatches]
            for m, minibatch in enumerate(share.minibatches)
        ]

    def _optimizer_step(
        self,
        minibatch: Minibatch[PolicyRows],
        old: Sequence[torch.Tensor | None],
        share: Share[PolicyRows],
        metrics: StepMetrics,
    ) -> None:
        rate = learning_rate(self.config, self.optimizer_steps, self.total_steps)
        losses = [
            partial(self._microbatch_loss, microbatch, rows, before, minibatch.denominators, share, metrics)
            for (microbatch, rows), before in zip(minibatch.microbatches, old, strict=True)
        ]
        done = optimizer_step(self.engine, losses, rate)
        self.optimizer_steps += 1
        metrics.optimizer_step(minibatch.denominators, grad_norm=done.grad_norm, rate=rate, skipped=done.skipped)
        if done.skipped:
            log.warning("optimizer step %d skipped: gradient norm %s", self.optimizer_steps, done.grad_norm)

    def _microbatch_loss(
        self,
        microbatch: Microbatch,
        rows: PolicyRows | None,
        old: torch.Tensor | None,
        denominators: Denominators,
        share: Share[PolicyRows],
        metrics: StepMetrics,
    ) -> torch.Tensor:
        packed, device = microbatch.packed(self.device), self.device
        logprobs, entropy = self._forward(self.engine, packed)
        reference = self._reference_rows(packed, rows, share)
        if rows is None:
            return logprobs.sum() * 0.0
        before = logprobs.detach() if old is None else old
        sampled = before if rows.rollout_logprobs is None else on_device(rows.rollout_logprobs, device)
        pairs = rows.pairs
        inputs = LossInputs(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=before,
            rollout_logprobs=torch.where(sampled == math.inf, before, sampled),
            advantages=on_device(rows.advantages, device),
            mask=on_device(rows.mask, device),
            sequence=microbatch.sequence(device),
            group=microbatch.group(device),
            denominators=denominators,
            reference_logprobs=reference,
            extras={name: on_device(values, device) for name, values in rows.extras.items()},
            scalars=share.scalars,
            samples={name: on_device(values, device) for name, values in rows.samples.items()},
            pairs=None if pairs is None else torch.from_numpy(pairs.samples.copy()).to(device),
            pair_values={}
            if pairs is None
            else {name: on_device(values, device) for name, values in pairs.values.items()},
        )
        output = self.algorithm.loss(inputs)
        differences = [mismatch(before, inputs.rollout_logprobs, inputs.mask, denominators)]
        self.watch.add(rows.watched, inputs, output)
        seen = measured(self.diagnostics, inputs)
        metrics.add(output, *(() if rows.rollout_logprobs is None else differences), *seen)
        return output.loss

    @torch.no_grad()
    def _reference_rows(
        self, packed: PackedBatch, rows: PolicyRows | None, share: Share[PolicyRows]
    ) -> torch.Tensor | None:
        if share.reference_known:
            known = None if rows is None else rows.reference_logprobs
            return None if known is None else on_device(known, self.device)
        # With the KL in the reward, the loss needs no reference log-probs.
        unused = REFERENCE not in self.frozen or self.algorithm.needs().token_kl
        return None if unused else self._forward(self.frozen[REFERENCE], packed)[0]

    def _move_reference(self) -> None:
        every, share = self.algorithm.config.reference_every_steps, self.algorithm.config.reference_mix
        if REFERENCE in self.frozen and every and not self.version % every:
            move_towards(self.frozen[REFERENCE], self.engine.module, share, self.version)

    def counters(self) -> dict[str, int]:
        return {"optimizer_steps": self.optimizer_steps, "version": self.version}

    def set_counters(self, counters: dict[str, int]) -> None:
        self.optimizer_steps, self.version = counters["optimizer_steps"], counters["version"]

    # -- weights -------------------------------------------------------------------------------------------------

    def weight_metas(self) -> list[TensorMeta]:
        """Metadata of what `named_weights` yields, without gathering."""
        return self._names.metas

    @cached_property
    def _names(self) -> CheckpointNames:
        model = self.engine.module.model
        metas, _ = with_buffers(model, parameter_metas(model), ())
        return CheckpointNames(model, metas)

    def named_weights(self, bucket_bytes: int = GATHERED_BYTES) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name in a checkpoint, full tensor), tied weights once, persistent buffers last: a sleeping engine
        loses those that are parameters in vLLM. All ranks iterate.

        ZeRO-3 gathers `bucket_bytes` at a time and then frees them: copy what must outlive the iteration.
        """
        model = self.engine.module.model
        _, weights = with_buffers(model, (), gathered_parameters(model, self.config.zero_stage, bucket_bytes))
        return self._names.convert(weights)

    def adapter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name in peft's files, full tensor). All ranks iterate; copy what must outlive the iteration."""
        return adapter_tensors(self.engine.module.model, partitioned=self.config.zero_stage == 3)

    def save_adapter(self, base: str, folder: Path) -> list[WrittenFile]:
        """Write the peft folder of an adapter for `base`; return its weights' file. All ranks call it, rank 0
        writes."""
        if self.rank:
            for _ in self.adapter_weights():
                pass  # ZeRO-3 gathers on all ranks
            return []
        return [save_adapter(self.engine.module.model, base, folder, self.adapter_weights())]

    def save(self, folder: Path, which: str = POLICY) -> list[WrittenFile]:
        """Write a Hugging Face model folder; return its weights' files. All ranks call it, rank 0 writes."""
        held = self.engine if which == POLICY else self.frozen[which]
        model = getattr(held, "module", held).model
        weights = gathered_parameters(model, self.config.zero_stage)
        if self.rank:
            for _ in weights:
                pass  # ZeRO-3 gathers on all ranks
            return []
        return save_policy(model, *with_buffers(model, parameter_metas(model), weights), folder)
