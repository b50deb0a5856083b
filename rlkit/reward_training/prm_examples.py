"""From rollouts to tokens, and from tokens to the examples of an optimizer step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rewards.implicit_prm.steps import StepStyle, split_steps, token_steps
from rlkit.data.base import BadRow, DataError, Problem
from rlkit.data.rendering import render
from rlkit.models.packing import Tree
from rlkit.reward_training.outcome_rows import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Balance = Literal["none", "prompt"]
Example = tuple[int, ...]
"""Places of the rollouts of one example: one, or the better and the worse one of a pair."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A rollout in tokens."""

    rollout: Rollout
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """With the end-of-sequence token."""
    steps: tuple[tuple[int, int], ...]
    """Response tokens [start, end) of each step."""

    @property
    def group(self) -> tuple[str, tuple[int, ...]]:
        """Equal for responses to the same problem that was asked in the same words."""
        return self.rollout.group, self.prompt


@dataclass(frozen=True, slots=True)
class PromptItem:
    """The responses of an optimizer step to one prompt."""

    tree: Tree
    labels: tuple[float, ...] = ()
    """One per suffix of the tree; none for a tree whose scores alone are wanted."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(better, worse) suffixes."""

    @property
    def tokens(self) -> int:
        return self.tree.tokens


def encode(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, style: StepStyle
) -> tuple[list[Encoded], list[BadRow]]:
    """Prompts through the chat template, responses with their end; those longer than `max_tokens` in all are bad."""
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
    found = []
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
        found.append(Encoded(rollout, prompt, response, tuple(spans)))
    return found, bad


def make_examples(encoded: Sequence[Encoded], paired: bool, balance: Balance, seed: int) -> list[Example]:
    """Every response, or every pair of a better and a worse response to the same prompt.

    balance=prompt keeps as many right as wrong responses of each prompt, drawn by `seed`.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, one in enumerate(encoded):
        groups.setdefault(one.group, []).append(i)
    label = [one.rollout.label for one in encoded]
    if paired:
        return [(a, b) for members in groups.values() for a in members for b in members if label[a] > label[b]]
    if balance == "none":
        return [(i,) for i in range(len(encoded))]
    rng = random.Random(seed)
    kept: list[int] = []
    for members in groups.values():
        right = [i for i in members if label[i] > 0.5]
        wrong = [i for i in members if label[i] <= 0.5]
        count = min(len(right), len(wrong))
        kept += rng.sample(right, count) + rng.sample(wrong, count)
    return [(i,) for i in sorted(kept)]


def draw_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches for ever: shuffled anew in each epoch, whose last batch may be smaller."""
    rng = random.Random(seed)
    while True:
        epoch = rng.sample(list(examples), len(examples))
        for start in range(0, len(epoch), size):
            yield epoch[start : start + size]


def prompt_items(encoded: Sequence[Encoded], batch: Sequence[Example]) -> list[PromptItem]:
    """The batch prompt by prompt: a prompt goes through the model once, and so does a response in several pairs."""
    groups: dict[tuple[str, tuple[int, ...]], list[Example]] = {}
    for example in batch:
        groups.setdefault(encoded[example[0]].group, []).append(example)
    items = []
    for (_, prompt), examples in groups.items():
        members = list(dict.fromkeys(i for example in examples for i in example))
        place = {i: n for n, i in enumerate(members)}
        items.append(
            PromptItem(
                tree=Tree(prompt, tuple(encoded[i].response for i in members)),
                labels=tuple(encoded[i].rollout.label for i in members),
                pairs=tuple((place[example[0]], place[example[1]]) for example in examples if len(example) == 2),
            )
        )
    return items
