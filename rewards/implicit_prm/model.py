"""The two language models of an implicit PRM: log-ratios per token, and training on outcomes."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from algorithms import prm_losses
from rewards.base import RewardContext
from rewards.implicit_prm.monitors import HeldOut, before_update, labels_of
from rlkit.config.schema import LearnerConfig
from rlkit.data.prompts import load_tokenizer
from rlkit.embedded import model_folder
from rlkit.experience import Group
from rlkit.learner.engine import build_engine, init_process_group, optimizer_step, resolve_dtype
from rlkit.learner.policy import save_policy
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
        self._resident = True
        self.path = path = model_folder(config.model_path)
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
        self.heldout = HeldOut(config.heldout_groups)
        self._leave_device()

    def token_rewards(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """beta * (log pi_phi - log pi_ref), [T] float32, of every sample of every group, in order."""
        with torch.no_grad(), self._on_device():
            self.engine.eval()
            ratios = per_token(self._log_ratios, groups, self.config.tokens_per_microbatch, self.device)
        return [(self.config.beta * ratio).astype(np.float32) for ratio in ratios]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One pass over the groups in mini-batches; metrics `prm/...`, the accuracies from before the update."""
        metrics = before_update(groups)
        groups = self.heldout.set_aside(groups)
        if self.heldout.groups:
            metrics |= self.heldout.metrics(self.token_rewards(self.heldout.groups))
        with self._on_device():
            return metrics | self._learn(groups)

    def _learn(self, groups: Sequence[Group]) -> dict[str, float]:
        losses, norms, skipped = [], [], 0
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
            skipped += done.skipped
        if not losses:
            return {}
        return {
            "prm/loss": float(np.mean(losses)),
            "prm/grad_norm": float(np.mean(norms)),
            "prm/skipped_updates": float(skipped),
        }

    def set_reference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give pi_ref new weights. Raises ValueError if they are of another architecture."""
        given = dict(weights)
        for name, parameter in self.reference.model.named_parameters():
            new = given.get(name)
            if new is None or new.shape != parameter.shape:
                raise ValueError(
                    f"reward.reference=policy: the policy has no {name} of shape {tuple(parameter.shape)}; "
                    "reward.model_path must have the policy's own architecture"
                )
            parameter.data.copy_(new)

    def save(self, folder: Path) -> None:
        """pi_phi as a Hugging Face folder with its tokenizer."""
        with self._on_device():
            weights = {name: value.detach().cpu().clone() for name, value in self._weights()}
        save_policy(self.engine.module.model.config, weights.items(), folder)
        load_tokenizer(self.path).save_pretrained(folder)

    def state_dict(self) -> Mapping[str, Any]:
        """Weights and optimizer on the CPU, and the groups set aside."""
        with self._on_device():
            return {
                "weights": {name: value.cpu() for name, value in self.engine.module.state_dict().items()},
                "optimizer": self.engine.optimizer.state_dict(),
                "heldout": list(self.heldout.groups),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of state_dict."""
        with self._on_device():
            self.engine.module.load_state_dict(state["weights"])
            self.engine.optimizer.load_state_dict(state["optimizer"])
        self.heldout.groups = list(state["heldout"])

    # -- inside --------------------------------------------------------------------------------------------------

    def _weights(self) -> Iterable[tuple[str, Tensor]]:
        parameters: Iterable[tuple[str, Tensor]] = self.engine.module.model.named_parameters()
        return parameters

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Both models and the optimizer are on their device inside, and in CPU memory outside if that is wanted."""
        if not self.config.offload or self._resident:
            yield
            return
        self.reference.to(self.device)
        self.engine.reload_states()
        self._resident = True
        try:
            yield
        finally:
            self._leave_device()

    def _leave_device(self) -> None:
        if self.config.offload:
            self.reference.to("cpu")
            self.engine.offload_states()
            torch.cuda.empty_cache()
        self._resident = False

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
        valid = [i for i, label in enumerate(labels_of(groups)) if label is not None]
        labels = torch.tensor([label for label in labels_of(groups) if label is not None], device=self.device)
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
            return float(sum(label is not None for label in labels_of(groups)))
        pairs = 0
        for group in groups:
            labels = [label for label in labels_of([group]) if label is not None]
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
