"""Samples answers of tiny policies with transformers; an engine per policy would start more slowly than it samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

MAX_ANSWER_TOKENS = 64
PROMPTS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling options. Defaults are those of POLAR's pre-training trajectories."""

    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 0.9
    top_k: int = 50
    """0: all tokens."""


PLAIN = Sampling(top_p=1.0, top_k=0)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0)


def load_policy(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def sample_answers(
    model: nn.Module, tokenizer: object, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seed: int
) -> list[list[str]]:
    """Sample `count` answers per prompt, cut at MAX_ANSWER_TOKENS."""
    torch.manual_seed(seed)
    sampled = sample_tokens(model, tokenizer, prompts, count, sampling, MAX_ANSWER_TOKENS)
    decode = tokenizer.batch_decode  # type: ignore[attr-defined]
    return [decode(rows, skip_special_tokens=True) for rows in sampled]


@torch.inference_mode()
def sample_tokens(
    model: nn.Module,
    tokenizer: object,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    max_tokens: int,
) -> list[list[list[int]]]:
    """Sample `count` responses per prompt, with their end token if they have one, from torch's own seed."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together, for little padding
    sampled: list[list[list[int]]] = [[] for _ in prompts]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id  # type: ignore[attr-defined]
    for start in range(0, len(order), max(1, PROMPTS_PER_BATCH // count)):
        members = order[start : start + max(1, PROMPTS_PER_BATCH // count)]
        width = max(len(prompts[i]) for i in members)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in members])
        options = (
            {"do_sample": False}
            if sampling.temperature == 0
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        )
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            max_new_tokens=max_tokens,
            num_return_sequences=count,
            pad_token_id=pad,
            eos_token_id=eos,
            **options,
        )
        rows = [[token for token in row if token != pad] for row in output[:, width:].tolist()]
        for row, i in enumerate(members):
            sampled[i] = rows[row * count : (row + 1) * count]
    return sampled
