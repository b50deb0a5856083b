"""The two language models of an implicit PRM: log-ratios per token, and training on outcomes."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from algorithms import prm_losses
from algorithms.prm_metrics import pair_accuracy, sign_accuracy
from rewards.base import RewardContext
from rlkit.config.schema import LearnerConfig
from rlkit.embedded import model_folder
from rlkit.experience import Group
from rlkit.learner.engine import build_engine, init_process_group, optimizer_step, resolve_dtype
from rlkit.learner.ragged import per_token
from rlkit.models.packing import Tree, pack, split_by_tokens
from rlkit.models.policy import load_causal_lm

if TYPE_CHECKING:
    from rewards.implicit_prm.reward import ImplicitPRM

LARGEST_INITIAL_RATIO = 1e-3
"""Models of equal weights must agree to this: else the two run through different kernels or types."""


class ImplicitModel:
    """pi_phi in a DeepSpeed engine of one rank, and a frozen pi_ref. Log-probs are taken at temperature 1."""

    def __init__(self, config: ImplicitPRM.Config, context: RewardContext) -> None:
        self.config, self.device = config, context.device
        path = model_folder(config.model_path)
        reference_path = path if config.reference_path is None else model_folder(config.reference_path)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        init_process_group(0, 1, "127.0.0.1", port, self.device)
        learner = LearnerConfig(
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            tokens_per_microbatch=config.tokens_per_microbatch,
            zero_stage=1 if self.device == "cuda" else 0,
        )
        self._chunk = learner.logit_elements_per_chunk
        self.engine = build_engine(load_causal_lm(path, torch.float32), learner, self.device)
        dtype = resolve_dtype(learner.dtype, self.device)
        self.reference = load_causal_lm(reference_path, dtype).to(self.device).eval().requires_grad_(False)
        if config.reference_path is None:
            self._check_equal()

    def token_rewards(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """beta * (log pi_phi - log pi_ref), [T] float32, of every sample of every group, in order."""
        with torch.no_grad():
            ratios = per_token(self._log_ratios, groups, self.config.tokens_per_microbatch, self.device)
        return [(self.config.beta * ratio).astype(np.float32) for ratio in ratios]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One pass over the groups in mini-batches; metrics `prm/...`, the accuracies from before the update."""
        metrics = self._measured(groups)
        losses, norms = [], []
        for start in range(0, len(groups), self.config.minibatch_groups):
            chosen = [g for g in groups[start : start + self.config.minibatch_groups] if self._count([g])]
            total = self._count(chosen)
            if not total:
                continue
            trees = [_tree(group) for group in chosen]
            split = split_by_tokens([tree.tokens for tree in trees], self.config.tokens_per_microbatch)
            seen: list[Tensor] = []
            shares = [partial(self._loss, [chosen[i] for i in members], total, seen) for members in split]
            self.engine.train()
            done = optimizer_step(self.engine, shares, self.config.learning_rate)
            losses.append(float(torch.stack(seen).sum()))
            norms.append(done.grad_norm)
            metrics["prm/skipped_updates"] = metrics.get("prm/skipped_updates", 0.0) + done.skipped
        if losses:
            metrics |= {"prm/loss": float(np.mean(losses)), "prm/grad_norm": float(np.mean(norms))}
        return metrics

    def state_dict(self) -> Mapping[str, Any]:
        """Weights and optimizer on the CPU."""
        return {
            "weights": {name: value.cpu() for name, value in self.engine.module.state_dict().items()},
            "optimizer": self.engine.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of state_dict."""
        self.engine.module.load_state_dict(state["weights"])
        self.engine.optimizer.load_state_dict(state["optimizer"])

    # -- inside --------------------------------------------------------------------------------------------------

    def _log_ratios(self, packed: Any) -> Tensor:
        """[R], differentiable in pi_phi."""
        with torch.no_grad():
            reference, _ = self.reference(packed, 1.0, self._chunk)
        logprobs, _ = self.engine(packed, 1.0, self._chunk)
        ratios: Tensor = logprobs - reference
        return ratios

    def _scores(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """(s, labels, group number) of the valid samples of some groups; s = beta * summed log-ratios."""
        packed = pack([_tree(group) for group in groups]).to(self.device)
        ratios = self._log_ratios(packed)
        lengths = torch.tensor([len(sample) for group in groups for sample in group.samples])
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.device)
        mask = torch.from_numpy(np.concatenate([s.trained for g in groups for s in g.samples])).to(self.device)
        scores = prm_losses.response_scores(
            ratios, torch.zeros_like(ratios), mask.float(), sequence, len(lengths), self.config.beta
        )
        valid = [i for i, label in enumerate(_labels(groups)) if label is not None]
        labels = torch.tensor([label for label in _labels(groups) if label is not None], device=self.device)
        numbers = torch.tensor([g for g, group in enumerate(groups) for _ in group.samples], device=self.device)
        return scores[valid], labels.float(), numbers[valid]

    def _loss(self, groups: Sequence[Group], total: float, seen: list[Tensor]) -> Tensor:
        """A micro-batch's share of the objective's mean."""
        scores, labels, group = self._scores(groups)
        if self.config.objective == "ce":
            loss = prm_losses.cross_entropy(scores, labels).sum()
        elif self.config.objective == "kto":
            baseline = prm_losses.kto_baseline(self._mismatched(groups))
            loss = prm_losses.kto(scores, labels, baseline).sum()
        else:
            chosen, rejected = prm_losses.correct_incorrect_pairs(labels, group)
            pair_loss = prm_losses.dpo if self.config.objective == "dpo" else prm_losses.nca_pair
            loss = pair_loss(scores[chosen], scores[rejected]).sum()
        loss = loss / total
        seen.append(loss.detach())
        return loss

    def _count(self, groups: Sequence[Group]) -> float:
        """What the objective averages over: valid samples, or pairs of a better and a worse one."""
        if self.config.objective in ("ce", "kto"):
            return float(sum(label is not None for label in _labels(groups)))
        pairs = 0
        for group in groups:
            labels = [label for label in _labels([group]) if label is not None]
            pairs += sum(a > b for a in labels for b in labels)
        return float(pairs)

    @torch.no_grad()
    def _mismatched(self, groups: Sequence[Group]) -> Tensor:
        """s of each group's first response after the next group's prompt: what KTO's baseline is made of."""
        trees = [
            Tree(other.prompt.token_ids, (group.samples[0].token_ids.tolist(),))
            for group, other in zip(groups, [*groups[1:], groups[0]], strict=True)
        ]
        packed = pack(trees).to(self.device)
        lengths = torch.tensor([len(tree.suffixes[0]) for tree in trees])
        sequence = torch.repeat_interleave(torch.arange(len(trees)), lengths).to(self.device)
        ratios = self._log_ratios(packed)
        return prm_losses.response_scores(
            ratios, torch.zeros_like(ratios), torch.ones_like(ratios), sequence, len(trees), self.config.beta
        )

    def _measured(self, groups: Sequence[Group]) -> dict[str, float]:
        """Accuracies of the scores that these groups carry: from before the update, so a true generalisation."""
        samples = [(g, score) for g, group in enumerate(groups) for _, score in group.scored()]
        valid = np.array([score.valid for _, score in samples])
        scores = np.array([score.components.get("implicit_prm", 0.0) for _, score in samples])
        labels = np.array([score.value or 0.0 for _, score in samples])
        group = np.array([g for g, _ in samples])
        mixed = [g for g in np.unique(group[valid]) if np.ptp(labels[valid & (group == g)]) > 0]
        metrics = {"prm/sign_accuracy": sign_accuracy(scores, labels, valid)}
        if mixed:
            chosen = valid & np.isin(group, mixed)
            metrics["prm/pair_accuracy"] = float(pair_accuracy(scores, labels, group, chosen).mean())
        if valid.any():
            metrics |= {
                "prm/score_mean": float(scores[valid].mean()),
                "prm/score_p95": float(np.quantile(np.abs(scores[valid]), 0.95)),
            }
        return metrics

    @torch.no_grad()
    def _check_equal(self) -> None:
        packed = pack([Tree((0,), (tuple(range(1, 17)),))]).to(self.device)
        largest = float(self._log_ratios(packed).abs().max())
        if largest > LARGEST_INITIAL_RATIO:
            raise ValueError(
                f"the implicit PRM and its reference have equal weights but differ by {largest:.3g} in log-prob "
                f"(at most {LARGEST_INITIAL_RATIO:g} is allowed): process rewards would be numerical noise"
            )


def _tree(group: Group) -> Tree:
    return Tree(group.prompt.token_ids, tuple(sample.token_ids.tolist() for sample in group.samples))


def _labels(groups: Sequence[Group]) -> list[float | None]:
    """Outcome in 0 to 1 of every sample, None where it is invalid or has no trained token."""
    return [
        min(1.0, max(0.0, score.value)) if score.valid and score.value is not None and sample.trained.any() else None
        for group in groups
        for sample, score in group.scored()
    ]
