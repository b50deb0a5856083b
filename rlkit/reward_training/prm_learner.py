"""The two models of an implicit PRM: scoring with both, and training pi_phi in a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rewards.implicit_prm.config import PAIRED, Objective
from rewards.implicit_prm.model import (
    check_equal,
    log_ratios,
    mismatched,
    objective_sum,
    response_scores,
)
from rlkit.config.schema import LearnerConfig
from rlkit.models.packing import Tree, split_by_tokens
from rlkit.models.policy import PackedCausalLM, load_causal_lm, resolve_dtype
from rlkit.reward_training.engine import SupervisedEngine, load_to_train, save_language_model
from rlkit.reward_training.prm_examples import Encoded, Example, PromptItem, prompt_items


class PrmScorer:
    """log pi_phi - log pi_ref of responses; ranks share the work, and all of them get the result."""

    def __init__(self, policy: Any, reference: PackedCausalLM, config: LearnerConfig, device: str) -> None:
        self.policy, self.reference, self.config, self.device = policy, reference, config, device

    @torch.no_grad()
    def log_ratios(self, encoded: Sequence[Encoded]) -> list[np.ndarray]:
        """q [T] float32 of every response, in order."""
        self.policy.eval()
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for i, one in enumerate(encoded):
            groups.setdefault(one.group, []).append(i)
        members = list(groups.values())
        trees = [Tree(encoded[m[0]].prompt, tuple(encoded[i].response for i in m)) for m in members]
        batches = split_by_tokens([tree.tokens for tree in trees], self.config.tokens_per_microbatch)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        turns = [*batches, *[[]] * (-len(batches) % ranks)][rank::ranks]
        found: dict[int, np.ndarray] = {}
        for batch in turns:
            chosen = [trees[t] for t in batch or batches[0]]  # ZeRO-3 wants equally many forward passes of all ranks
            rows = self._ratios(chosen).float().cpu().numpy()
            lengths = [len(suffix) for tree in chosen for suffix in tree.suffixes]
            pieces = np.split(rows, np.cumsum(lengths)[:-1])
            found |= dict(zip((i for t in batch for i in members[t]), pieces, strict=False))
        if ranks > 1:
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, found)
            found = {i: piece for part in gathered for i, piece in part.items()}
        return [found[i] for i in range(len(encoded))]

    def _ratios(self, trees: Sequence[Tree]) -> Tensor:
        return log_ratios(self.policy, self.reference, trees, self.device, self.config.logit_elements_per_chunk)


class PrmLearner:
    """Trains pi_phi on outcomes; needs an initialised process group. All ranks call every method alike."""

    def __init__(
        self,
        model_path: Path,
        reference_path: Path,
        config: LearnerConfig,
        *,
        objective: Objective,
        beta: float,
        device: str,
        total_steps: int,
        trust_remote_code: bool = False,
    ) -> None:
        policy = load_to_train(model_path, config, trust_remote_code)
        self.objective, self.beta = objective, beta
        self.reference = load_reference(reference_path, config, device, trust_remote_code)
        self.training = SupervisedEngine(policy, self._loss, config, device=device, total_steps=total_steps)
        self.scorer = PrmScorer(self.training.engine, self.reference, config, device)
        self._baseline = torch.zeros((), device=device)
        if reference_path == model_path:
            check_equal(self.training.engine, self.reference, device, config.logit_elements_per_chunk)

    def step(self, encoded: Sequence[Encoded], batch: Sequence[Example]) -> float:
        """One optimizer step; returns the mean objective per example before it (ln 2 at the first, with ce or dpo)."""
        items = prompt_items(encoded, batch)
        self._estimate_baseline(items)
        return self.training.step(items, len(batch))

    def evaluate(self, encoded: Sequence[Encoded], examples: Sequence[Example]) -> float:
        """The mean objective per example."""
        items = prompt_items(encoded, examples)
        self._estimate_baseline(items)
        return self.training.evaluate(items, len(examples))

    def save(self, folder: Path) -> None:
        """Write pi_phi as a plain Hugging Face folder; rank 0 writes."""
        save_language_model(self.training, folder)

    def _estimate_baseline(self, items: Sequence[PromptItem]) -> None:
        """KTO's z over the whole batch, not per micro-batch; a batch with one prompt keeps the last one."""
        if self.objective != "kto":
            return
        trees = list({tuple(item.tree.prefix): item.tree for item in items}.values())
        if len(trees) > 1:
            others = [PromptItem(tree) for tree in mismatched(trees)]
            mean = self.training.evaluate(others, len(others))
            self._baseline = torch.tensor(max(0.0, mean), device=self.training.device)

    def _loss(self, module: Any, items: Sequence[PromptItem]) -> Tensor:
        """The objective's sum over the items' examples; the scores' sum for items without labels."""
        trees = [item.tree for item in items]
        ratios = log_ratios(
            module, self.reference, trees, self.training.device, self.training.config.logit_elements_per_chunk
        )
        scores = response_scores(ratios, trees, self.beta)
        if not items[0].labels:
            return scores.sum()
        labels = torch.tensor([label for item in items for label in item.labels], device=scores.device)
        start = np.cumsum([0, *(len(item.labels) for item in items)])
        pairs = [(s + better, s + worse) for s, item in zip(start, items, strict=False) for better, worse in item.pairs]
        places = torch.tensor(pairs, dtype=torch.int64, device=scores.device).reshape(-1, 2)
        if self.objective in PAIRED:
            return objective_sum(self.objective, scores, labels, (places[:, 0], places[:, 1]))
        return objective_sum(self.objective, scores, labels, (places[:, 0], places[:, 1]), self._baseline)


def load_reference(path: Path, config: LearnerConfig, device: str, trust_remote_code: bool) -> PackedCausalLM:
    """pi_ref: whole on every rank, frozen, in the precision that pi_phi computes in."""
    model = load_causal_lm(path, resolve_dtype(config.dtype, device), trust_remote_code=trust_remote_code)
    return model.to(device).eval().requires_grad_(False)
