"""Offline training of an implicit PRM."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from rlkit.data.base import BadRow, DataError, Problem
from rlkit.data.rendering import render
from rlkit.experience.steps import StepStyle, split_steps, token_steps
from rlkit.learner.dealing import charge, split_tree
from rlkit.learner.engine import load_to_train
from rlkit.models.forward import PackedCausalLM
from rlkit.models.packing import Tree, split_by_tokens
from rlkit.models.policy import load_causal_lm, resolve_dtype
from rlkit.reward_training.engine import (
    PromptTree,
    SupervisedEngine,
    items_within,
    pair_indices,
    save_language_model,
)
from rlkit.reward_training.outcomes import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Balance = Literal["none", "prompt"]
Example = tuple[int, ...]
"""Index of a rollout, or indices of the better and the worse rollout of a pair."""


@dataclass(frozen=True, slots=True)
class Encoded:
    rollout: Rollout
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """Ends with the end-of-sequence token."""
    steps: tuple[tuple[int, int], ...]
    """Response tokens [start, end) of each step."""

    @property
    def group(self) -> tuple[str, tuple[int, ...]]:
        """A key that is equal for responses to the same problem, asked in the same words."""
        return self.rollout.group, self.prompt


def encode(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, style: StepStyle
) -> tuple[list[Encoded], list[BadRow]]:
    """Render prompts and end responses; rows of more than `max_tokens` in total are bad rows."""
    if not tokenizer.is_fast or tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise DataError(
            "reward.model_path: its tokenizer must have a tokenizer.json (for the places of tokens in the text), a "
            "chat template and an end-of-sequence token"
        )
    asked = {rollout.messages: rollout.origin for rollout in rollouts}
    problems = [Problem(id=str(i), messages=m, origin=asked[m]) for i, m in enumerate(asked)]
    prompts, refused = render(problems, tokenizer, max_prompt_tokens=2**31)
    reasons = {row.origin: row.reason for row in refused}
    bad: list[BadRow] = []
    prompt_ids = {prompt.messages: prompt.token_ids for prompt in prompts}
    texts = [rollout.response for rollout in rollouts]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    usable = []
    for rollout, ids, offsets in zip(rollouts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        prompt = prompt_ids.get(rollout.messages)
        if prompt is None:
            bad.append(BadRow(rollout.origin, reasons[asked[rollout.messages]]))
            continue
        response = (*ids, tokenizer.eos_token_id)
        if max_tokens is not None and len(prompt) + len(response) > max_tokens:
            reason = (
                f"has {len(prompt) + len(response)} tokens, more than the model's or reward.max_tokens={max_tokens}"
            )
            bad.append(BadRow(rollout.origin, reason))
            continue
        steps = rollout.steps or split_steps(rollout.response, style)
        spans = token_steps(rollout.response, offsets, steps, len(response))
        usable.append(Encoded(rollout, prompt, response, tuple(spans)))
    return usable, bad


def make_examples(encoded: Sequence[Encoded], paired: bool, balance: Balance, seed: int) -> list[Example]:
    """Return every response, or every pair of a better and a worse response to one prompt.

    balance=prompt keeps equal numbers of right and wrong responses per prompt, drawn with `seed`.
    """
    groups = _members(encoded)
    label = [one.rollout.label for one in encoded]
    if paired:
        return [(a, b) for members in groups for a in members for b in members if label[a] > label[b]]
    if balance == "none":
        return [(i,) for i in range(len(encoded))]
    rng = random.Random(seed)
    kept: list[int] = []
    for members in groups:
        right = [i for i in members if label[i] > 0.5]
        wrong = [i for i in members if label[i] <= 0.5]
        count = min(len(right), len(wrong))
        kept += rng.sample(right, count) + rng.sample(wrong, count)
    return [(i,) for i in sorted(kept)]


def _members(encoded: Sequence[Encoded]) -> list[list[int]]:
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, one in enumerate(encoded):
        groups.setdefault(one.group, []).append(i)
    return list(groups.values())


def prompt_items(encoded: Sequence[Encoded], batch: Sequence[Example], limit: int) -> list[PromptTree]:
    """Group examples by prompt, so that it, and a response in several pairs, go through the model only once.

    Groups above `limit` tokens are halved, down to single examples.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[Example]] = {}
    for example in batch:
        groups.setdefault(encoded[example[0]].group, []).append(example)
    return [item for examples in groups.values() for item in items_within(examples, partial(_item, encoded), limit)]


def _item(encoded: Sequence[Encoded], examples: Sequence[Example]) -> PromptTree:
    members = list(dict.fromkeys(i for example in examples for i in example))
    index = {i: n for n, i in enumerate(members)}
    return PromptTree(
        tree=Tree(encoded[members[0]].prompt, tuple(encoded[i].response for i in members)),
        labels=tuple(encoded[i].rollout.label for i in members),
        pairs=tuple((index[example[0]], index[example[1]]) for example in examples if len(example) == 2),
    )


class PrmScorer:
    """Computes log pi_phi - log pi_ref of responses; ranks share the work, and all get the result."""

    def __init__(self, policy: Any, reference: PackedCausalLM, config: LearnerConfig, device: str) -> None:
        self.policy, self.reference, self.config, self.device = policy, reference, config, device

    @torch.no_grad()
    def log_ratios(self, encoded: Sequence[Encoded]) -> list[np.ndarray]:
        """Return q [T] float32 of every response."""
        limit, members, trees = self.config.tokens_per_microbatch, [], []
        for of_prompt in _members(encoded):
            prompt, responses = encoded[of_prompt[0]].prompt, [encoded[i].response for i in of_prompt]
            for part in split_tree(Tree(prompt, responses), limit):
                members.append([of_prompt[i] for i in part])
                trees.append(Tree(prompt, tuple(responses[i] for i in part)))
        batches = split_by_tokens([charge(tree) for tree in trees], limit)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = [*batches, *[[]] * (-len(batches) % ranks)][rank::ranks]
        ratios: dict[int, np.ndarray] = {}
        for batch in mine:
            chosen = [trees[t] for t in batch or batches[0]]  # ZeRO-3 needs equal numbers of forward passes
            rows = self._ratios(chosen).float().cpu().numpy()
            lengths = [len(suffix) for tree in chosen for suffix in tree.suffixes]
            pieces = np.split(rows, np.cumsum(lengths)[:-1])
            ratios |= dict(zip((i for t in batch for i in members[t]), pieces, strict=False))
        if ranks > 1:
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, ratios)
            ratios = {i: piece for part in gathered for i, piece in part.items()}
        return [ratios[i] for i in range(len(encoded))]

    def _ratios(self, trees: Sequence[Tree]) -> Tensor:
        return log_ratios(self.policy, self.reference, trees, self.device, self.config.logit_elements_per_chunk)


class PrmLearner:
    """Trains pi_phi on outcomes; needs an initialised process group. All ranks must make the same calls."""

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
        policy = load_to_train(load_causal_lm, model_path, config, device, trust_remote_code=trust_remote_code)
        self.objective, self.beta = objective, beta
        self.reference = load_reference(reference_path, config, device, trust_remote_code)
        self.training = SupervisedEngine(policy, self._loss, config, device=device, total_steps=total_steps)
        self.scorer = PrmScorer(self.training.engine, self.reference, config, device)
        self._baseline = torch.zeros((), device=device)
        if reference_path == model_path:
            check_equal(self.training.engine, self.reference, device, config.logit_elements_per_chunk)

    def step(self, encoded: Sequence[Encoded], batch: Sequence[Example]) -> float:
        """Train on a batch; return the mean objective per example before the step (ln 2 at first, with ce or dpo)."""
        items = prompt_items(encoded, batch, self.training.config.tokens_per_microbatch)
        self._estimate_baseline(items)
        return self.training.step(items, len(batch))

    def evaluate(self, encoded: Sequence[Encoded], examples: Sequence[Example]) -> float:
        items = prompt_items(encoded, examples, self.training.config.tokens_per_microbatch)
        self._estimate_baseline(items)
        return self.training.evaluate(items, len(examples))

    def save(self, folder: Path) -> None:
        save_language_model(self.training, folder)

    def _estimate_baseline(self, items: Sequence[PromptTree]) -> None:
        """Estimate KTO's z over the whole batch, not per micro-batch; a batch with one prompt keeps the last z."""
        if self.objective != "kto":
            return
        trees: dict[tuple[int, ...], Tree] = {}
        for item in items:
            trees.setdefault(tuple(item.tree.prefix), item.tree)
        if len(trees) > 1:
            others = [PromptTree(tree) for tree in mismatched(list(trees.values()))]
            mean = self.training.evaluate(others, len(others))
            self._baseline = torch.tensor(max(0.0, mean), device=self.training.device)

    def _loss(self, module: Any, items: Sequence[PromptTree]) -> Tensor:
        trees = [item.tree for item in items]
        ratios = log_ratios(
            module, self.reference, trees, self.training.device, self.training.config.logit_elements_per_chunk
        )
        scores = response_scores(ratios, trees, self.beta)
        if not items[0].labels:
            return scores.sum()
        labels = torch.tensor([label for item in items for label in item.labels], device=scores.device)
        better, worse = (torch.tensor(i, dtype=torch.int64, device=scores.device) for i in pair_indices(items))
        baseline = None if self.objective in PAIRED else self._baseline
        return objective_sum(self.objective, scores, labels, (better, worse), baseline)


def load_reference(path: Path, config: LearnerConfig, device: str, trust_remote_code: bool) -> PackedCausalLM:
    """Load pi_ref: whole on every rank, frozen, in the precision that pi_phi computes in."""
    model = load_causal_lm(path, resolve_dtype(config.dtype, device), trust_remote_code=trust_remote_code)
    return model.to(device).eval().requires_grad_(False)
