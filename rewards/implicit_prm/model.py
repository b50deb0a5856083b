"""The two models of an implicit PRM: log-ratios per token, objectives, training on outcomes, measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.functional import links
from algorithms.functional.links import correct_incorrect_pairs, kto_baseline
from algorithms.functional.selection import brier, calibration_error, pair_accuracy, sign_accuracy
from rewards.base import RewardContext
from rewards.implicit_prm.config import PAIRED, ImplicitPRMConfig, Objective
from rewards.services.scorer import Scorer, group_tree
from rlkit.cluster.processes import free_port
from rlkit.config.schema import LearnerConfig
from rlkit.data.rendering import load_tokenizer
from rlkit.experience import Group
from rlkit.experience.records import from_json, to_json
from rlkit.experience.types import BoolArray
from rlkit.learner.adapter import WithoutAdapter, add_adapter
from rlkit.learner.dealing import charge, split_tree
from rlkit.learner.engine import build_engine, init_process_group, load_to_train, optimizer_step
from rlkit.learner.policy_folder import gathered_parameters, parameter_metas, save_policy, with_buffers
from rlkit.learner.state import full_state, load_full_state
from rlkit.learner.weight_names import CheckpointNames
from rlkit.models.folder import model_folder
from rlkit.models.packing import Tree, pack, split_by_tokens
from rlkit.models.policy import load_causal_lm, resolve_dtype

LARGEST_INITIAL_RATIO = 1e-3
"""Largest log-ratio between models of equal weights; if it is exceeded, they use different kernels or dtypes."""


def log_ratios(policy: Any, reference: Any, trees: Sequence[Tree], device: str, chunk: int) -> Tensor:
    """Return q = log pi_phi - log pi_ref [R] of the trees' suffix tokens at temperature 1; differentiable in pi_phi."""
    packed = pack(trees).to(device)
    with torch.no_grad():
        reference_logprobs, _ = reference(packed, 1.0, chunk)
    logprobs, _ = policy(packed, 1.0, chunk)
    ratios: Tensor = logprobs - reference_logprobs
    return ratios


def group_parts(group: Group, limit: int) -> list[tuple[Tree, list[int]]]:
    """Split a group into trees within the token budget, each with the indices of its samples."""
    tree = group_tree(group)
    return [(Tree(tree.prefix, tuple(tree.suffixes[i] for i in part)), part) for part in split_tree(tree, limit)]


def response_scores(ratios: Tensor, trees: Sequence[Tree], beta: float, mask: Tensor | None = None) -> Tensor:
    """Return s = beta * sum of q [S], one per suffix of the trees, without rows whose mask is 0."""
    lengths = torch.tensor([len(suffix) for tree in trees for suffix in tree.suffixes])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(ratios.device)
    mask = torch.ones_like(ratios) if mask is None else mask
    return beta * links.sample_sums(ratios, mask, sequence, len(lengths))


def objective_sum(
    objective: Objective,
    scores: Tensor,
    labels: Tensor,
    pairs: tuple[Tensor, Tensor],
    baseline: Tensor | None = None,
) -> Tensor:
    """Sum the objective over scores [S] with labels [S] (ce, kto), or over pairs ([P] better, [P] worse indices).

    `baseline`: KTO's z over the whole batch.
    """
    if objective == "ce":
        return links.cross_entropy(scores, labels).sum()
    if objective == "kto":
        if baseline is None:
            raise ValueError("kto needs the baseline of the whole batch")
        return links.kto(scores, labels, baseline).sum()
    better, worse = pairs
    loss = links.sigmoid if objective == "dpo" else links.nca
    return loss(scores[better], scores[worse]).sum()


def mismatched(trees: Sequence[Tree]) -> list[Tree]:
    """Put the first response of each tree after the next tree's prompt; KTO's baseline is the mean score of these.

    Trees must have different prompts. Raise ValueError for fewer than two trees.
    """
    if len(trees) < 2:
        raise ValueError("KTO's baseline needs responses to at least two prompts in a batch")
    following = [*trees[1:], trees[0]]
    return [Tree(other.prefix, tree.suffixes[:1]) for tree, other in zip(trees, following, strict=True)]


@torch.no_grad()
def check_equal(policy: Any, reference: Any, device: str, chunk: int) -> None:
    """Raise ValueError if two models of equal weights do not give log-ratios of zero."""
    largest = float(log_ratios(policy, reference, [Tree((0,), (tuple(range(1, 17)),))], device, chunk).abs().max())
    if not largest <= LARGEST_INITIAL_RATIO:
        raise ValueError(
            f"the implicit PRM and its reference have equal weights but differ by {largest:.3g} in log-prob "
            f"(at most {LARGEST_INITIAL_RATIO:g} is allowed): process rewards would be numerical noise"
        )


def labels_of(groups: Sequence[Group]) -> list[float | None]:
    """Return outcomes from 0 to 1; None for a sample that is invalid or has no trained token."""
    return [
        min(1.0, max(0.0, score.value)) if score.valid and score.value is not None and sample.trained.any() else None
        for group in groups
        for sample, score in group.scored()
    ]


def before_update(groups: Sequence[Group]) -> dict[str, float]:
    """Return metrics `prm/...` of these groups' scores, which are from before the update, so on unseen data."""
    scores = np.array([score.components.get("implicit_prm", 0.0) for group in groups for _, score in group.scored()])
    labels, valid, group = _arrays(groups)
    metrics = {"prm/sign_accuracy": sign_accuracy(scores, labels, valid)} | _pairs(
        "prm/pair_accuracy", scores, labels, valid, group
    )
    if valid.any():
        metrics |= {
            "prm/score_mean": float(scores[valid].mean()),
            "prm/score_p95": float(np.quantile(np.abs(scores[valid]), 0.95)),
            "prm/brier": brier(scores[valid], labels[valid]),
            "prm/calibration_error": calibration_error(scores[valid], labels[valid]),
        }
    return metrics


class HeldOut:
    """Groups of the first steps that are held out of training, to measure the model at every update."""

    LARGEST_SHARE = 0.25

    def __init__(self, size: int) -> None:
        self.size = size
        self.groups: list[Group] = []

    def set_aside(self, groups: Sequence[Group]) -> list[Group]:
        """Keep groups with differing outcomes until there are enough; return those to train on."""
        room = min(self.size - len(self.groups), int(self.LARGEST_SHARE * len(groups)))
        taken = [group for group in groups if _differ(group)][:room] if room > 0 else []
        # Only tokens and scores are needed again; data columns are dropped, because they may hold anything.
        self.groups += [replace(group, prompt=replace(group.prompt, columns={})) for group in taken]
        kept = {group.id for group in taken}
        return [group for group in groups if group.id not in kept]

    def metrics(self, token_rewards: Sequence[np.ndarray]) -> dict[str, float]:
        """Return `prm/heldout_pair_accuracy`, from the current token rewards of all samples of `groups`."""
        samples = (sample for group in self.groups for sample in group.samples)
        scores = np.array([float(row[s.trained].sum()) for row, s in zip(token_rewards, samples, strict=True)])
        labels, valid, group = _arrays(self.groups)
        return _pairs("prm/heldout_pair_accuracy", scores, labels, valid, group)


def _differ(group: Group) -> bool:
    labels = [label for label in labels_of([group]) if label is not None]
    return len(set(labels)) > 1


def _arrays(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels (0 if unknown), whether they are known, and group numbers."""
    known = labels_of(groups)
    valid = np.array([label is not None for label in known], dtype=np.bool_)
    labels = np.array([label or 0.0 for label in known], dtype=np.float64)
    return labels, valid, np.array([g for g, group in enumerate(groups) for _ in group.samples], dtype=np.int64)


def _pairs(
    metric: str, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray, group: np.ndarray
) -> dict[str, float]:
    mixed = [g for g in np.unique(group[valid]) if np.ptp(labels[valid & (group == g)]) > 0]
    if not mixed:
        return {}
    accuracy = float(pair_accuracy(scores, labels, group, valid & np.isin(group, mixed)).mean())
    return {metric: accuracy}


class ImplicitModel:
    """pi_phi in a DeepSpeed engine of one rank, and a frozen pi_ref. Log-probs are at temperature 1."""

    def __init__(self, config: ImplicitPRMConfig, context: RewardContext) -> None:
        self.config, self.device = config, context.device
        self._resident = True
        self.path = path = model_folder(config.model_path)
        reference_path = path if config.reference_path is None else model_folder(config.reference_path)
        init_process_group(0, 1, "127.0.0.1", free_port(), self.device)
        learner = LearnerConfig(
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            tokens_per_microbatch=config.tokens_per_microbatch,
            gradient_checkpointing=config.gradient_checkpointing,
            zero_stage=1 if self.device == "cuda" else 0,
        )
        self._chunk = learner.logit_elements_per_chunk
        module = load_to_train(load_causal_lm, path, learner, self.device)
        if config.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # this process has no seed yet, and runs must be reproducible
                add_adapter(module.model, config.lora)
        self.engine = build_engine(module, learner, self.device)
        dtype = resolve_dtype(learner.dtype, self.device)
        reference = load_causal_lm(reference_path, dtype) if config.lora is None else WithoutAdapter(self.engine)
        # One tree per pass, so that a response's score does not depend, even in the last bit, on other groups.
        self.reference = Scorer(
            reference, device=self.device, tokens_per_batch=None, logit_elements_per_chunk=self._chunk
        )
        if config.reference_path is None:
            check_equal(self.engine, self.reference.module, self.device, self._chunk)
        self.heldout = HeldOut(config.heldout_groups)
        self._leave_device()

    def token_rewards(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Return beta * (log pi_phi - log pi_ref), [T] float32, of every sample of every group, in order."""
        rewards: list[np.ndarray] = []
        with torch.no_grad(), self._on_device():
            for group in groups:
                rows: dict[int, np.ndarray] = {}
                for tree, samples in group_parts(group, self.config.tokens_per_microbatch):
                    pairs = zip(self._policy_logprobs(tree), self.reference.logprobs([tree]), strict=True)
                    rows |= zip(samples, (self.config.beta * (new - old) for new, old in pairs), strict=True)
                rewards += [rows[i].astype(np.float32) for i in range(len(group.samples))]
        return rewards

    def _policy_logprobs(self, tree: Tree) -> list[np.ndarray]:
        logprobs = self.engine(pack([tree]).to(self.device), 1.0, self._chunk)[0].float().cpu().numpy()
        return np.split(logprobs, np.cumsum([len(suffix) for suffix in tree.suffixes])[:-1])

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Train once on the groups in mini-batches; return metrics `prm/...`, the accuracies from before the update."""
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
            sizes = [charge(group_tree(group)) for group in chosen]
            split = split_by_tokens(sizes, self.config.tokens_per_microbatch)
            seen: list[Tensor] = []
            baseline = self._baseline(chosen)
            shares = [
                loss for members in split for loss in self._losses([chosen[i] for i in members], total, baseline, seen)
            ]
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
        """Set pi_ref's weights; raise ValueError if they have another architecture or other names than this model."""
        policy = dict(weights)
        self.reference.forget()
        model = self.reference.model
        for name, parameter in model.named_parameters():
            new = policy.get(name)
            if new is None or new.shape != parameter.shape:
                why = "reward.model_path must have the policy's own architecture"
                metas = parameter_metas(model)
                if {meta.name for meta in CheckpointNames(model, metas).metas} != {meta.name for meta in metas}:
                    why = (
                        f"transformers fuses weights of {model.config.model_type} when it loads them; use "
                        "reward.reference=frozen"
                    )
                raise ValueError(
                    f"reward.reference=policy: the policy sends no {name} of shape {tuple(parameter.shape)}: {why}"
                )
            parameter.data.copy_(new)

    def save(self, folder: Path) -> None:
        with self._on_device():
            model = self.engine.module.model
            weights = gathered_parameters(model, zero_stage=0)  # one rank holds all weights
            save_policy(model, *with_buffers(model, parameter_metas(model), weights), folder)
        load_tokenizer(self.path).save_pretrained(folder)

    def state_dict(self) -> Mapping[str, Any]:
        """Return full fp32 weights and moments on the CPU, and the held-out groups as JSON."""
        with self._on_device():
            return {"engine": full_state(self.engine), "heldout": json.dumps(to_json(self.heldout.groups))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._on_device():
            load_full_state(self.engine, state["engine"])
        self.heldout.groups = from_json(json.loads(state["heldout"]))

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """With `offload`, keep models and optimizer on the device only within the `with` block."""
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

    def _scores(self, trees: Sequence[Tree], masks: Sequence[BoolArray]) -> Tensor:
        """Return s [S] over the trained tokens of the trees' suffixes."""
        ratios = log_ratios(self.engine, self.reference.module, trees, self.device, self._chunk)
        mask = torch.from_numpy(np.concatenate(masks)).to(self.device)
        return response_scores(ratios, trees, self.config.beta, mask.float())

    def _objective(self, scores: Tensor, groups: Sequence[Group], total: float, baseline: Tensor | None) -> Tensor:
        """scores [S] of all samples of the groups -> their contribution to the mean."""
        valid = [i for i, label in enumerate(labels_of(groups)) if label is not None]
        labels = torch.tensor([label for label in labels_of(groups) if label is not None], device=self.device).float()
        numbers = torch.tensor([g for g, group in enumerate(groups) for _ in group.samples], device=self.device)
        pairs = correct_incorrect_pairs(labels, numbers[valid])
        return objective_sum(self.config.objective, scores[valid], labels, pairs, baseline) / total

    def _losses(
        self, groups: Sequence[Group], total: float, baseline: Tensor | None, seen: list[Tensor]
    ) -> list[Callable[[], Tensor]]:
        """Return one loss for a micro-batch; for a group above the token budget, one for each of its parts."""
        parts = group_parts(groups[0], self.config.tokens_per_microbatch)
        if len(groups) > 1 or len(parts) == 1:
            return [partial(self._loss, groups, total, baseline, seen)]
        # The objective may compare samples of different parts: its gradients by the scores of all samples are computed
        # once, and each part's backward pass starts from them.
        (group,) = groups
        masked = [(tree, [group.samples[i].trained for i in samples], samples) for tree, samples in parts]
        scores = torch.zeros(len(group.samples), device=self.device)
        with torch.no_grad():
            for tree, masks, samples in masked:
                scores[samples] = self._scores([tree], masks)
        loss = self._objective(scores.requires_grad_(), groups, total, baseline)
        (slopes,) = torch.autograd.grad(loss, scores)
        seen.append(loss.detach())
        return [partial(self._part_loss, tree, masks, slopes[samples]) for tree, masks, samples in masked]

    def _part_loss(self, tree: Tree, masks: Sequence[BoolArray], slopes: Tensor) -> Tensor:
        return (self._scores([tree], masks) * slopes).sum()

    def _loss(self, groups: Sequence[Group], total: float, baseline: Tensor | None, seen: list[Tensor]) -> Tensor:
        scores = self._scores([group_tree(g) for g in groups], [s.trained for g in groups for s in g.samples])
        loss = self._objective(scores, groups, total, baseline)
        seen.append(loss.detach())
        return loss

    def _count(self, groups: Sequence[Group]) -> float:
        """Return the number of terms in the objective's mean: valid samples, or pairs of a better and a worse one."""
        if self.config.objective not in PAIRED:
            return float(sum(label is not None for label in labels_of(groups)))
        pairs = 0
        for group in groups:
            labels = [label for label in labels_of([group]) if label is not None]
            pairs += sum(a > b for a in labels for b in labels)
        return float(pairs)

    @torch.no_grad()
    def _baseline(self, groups: Sequence[Group]) -> Tensor | None:
        """Return KTO's z over a whole mini-batch; its lower bound 0 if there is only one prompt."""
        if self.config.objective != "kto":
            return None
        by_prompt = {group.prompt.token_ids: group for group in groups}
        if len(by_prompt) < 2:
            return torch.zeros((), device=self.device)
        trees = mismatched([group_tree(group) for group in by_prompt.values()])
        masks = [group.samples[0].trained for group in by_prompt.values()]
        split = split_by_tokens([charge(tree) for tree in trees], self.config.tokens_per_microbatch)
        scores = [self._scores([trees[i] for i in members], [masks[i] for i in members]) for members in split]
        return kto_baseline(torch.cat(scores))
