"""Hugging Face models run on packed batches: as one packed row, or each sequence as a row of its own.

Which of the two is the model's attention: `rlkit_packed` was chosen at load where it is exact (selftest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkit.experience import UserError
from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.logprobs import LogProbLinear
from rlkit.models.packing import PackedBatch

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields of what models do to their logits after the head (`logits_scaling` of HyperCLOVA X multiplies)."""


class ModelLoadError(UserError, ValueError): ...


class PackedCausalLM(nn.Module):
    """Maps a packed batch to log-probs; `model` is the Hugging Face model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head: Any = model.get_output_embeddings()
        kind = type(head)
        if kind is not nn.Linear:
            raise ModelLoadError(f"{type(model).__name__}: the head must be a plain Linear, not {kind.__name__}")
        head.__class__ = LogProbLinear
        head.scale, head.softcap = logit_scale_and_cap(model.config)
        self.model = model

    def forward(
        self, packed: PackedBatch, temperature: float = 1.0, elements_per_chunk: int = 2**24
    ) -> tuple[Tensor, Tensor]:
        """Log-probs [R] of the packed batch's targets and entropies [R], both fp32."""
        hidden = hidden_states(self.model, packed)
        head: Any = self.model.get_output_embeddings()
        logprobs, entropy = head(
            torch.index_select(hidden, 0, packed.rows),
            targets=packed.targets,
            temperature=temperature,
            elements_per_chunk=elements_per_chunk,
        )
        return logprobs, entropy


class Fp32Linear(nn.Linear):
    """Computes in fp32 whatever its weights and inputs are, and returns fp32."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class PackedScorer(nn.Module):
    """A one-label sequence classifier, read at the last token of each packed sequence, head in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if model.config.num_labels != 1:
            raise ModelLoadError(f"{type(model).__name__} has {model.config.num_labels} labels; a scorer has one")
        self.model = model
        _score_in_fp32(model)

    def forward(self, packed: PackedBatch) -> Tensor:
        """Raw scores [N], fp32."""
        return _scores(self.model, packed, packed.last)


class PackedValueModel(nn.Module):
    """A critic: a value for every response token, head in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        _score_in_fp32(model)

    def forward(self, packed: PackedBatch) -> Tensor:
        """Values [R], fp32, of the states in which the packed batch's targets are chosen."""
        return _scores(self.model, packed, packed.rows)


def _scores(model: PreTrainedModel, packed: PackedBatch, tokens: Tensor) -> Tensor:
    """[n] fp32, read at n packed tokens."""
    head: Any = model.score
    scores: Tensor = head(torch.index_select(hidden_states(model, packed), 0, tokens))[:, 0]
    return scores.float()


def _score_in_fp32(model: Any) -> None:
    if type(getattr(model, "score", None)) is nn.Linear:
        model.score.__class__ = Fp32Linear


def logit_scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What the logits are multiplied by, and their soft cap."""
    text = config.get_text_config()
    divisors = () if text.model_type == "hyperclovax" else DIVISORS
    multipliers = (*MULTIPLIERS, *(name for name in DIVISORS if name not in divisors))
    scale = 1.0
    for name in multipliers:
        scale *= getattr(text, name, None) or 1.0
    for name in divisors:
        scale /= getattr(text, name, None) or 1.0
    cap = next((value for name in SOFT_CAPS if (value := getattr(text, name, None))), None)
    return scale, cap


def runs_packed(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == PACKED_ATTENTION)


def hidden_states(model: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """Final hidden states [T, D]."""
    (hidden,) = _states(model, packed, lambda output: (output.last_hidden_state,))
    return hidden


def layer_states(model: PreTrainedModel, packed: PackedBatch, layers: Sequence[int]) -> Tensor:
    """[T, L, D] after L layers, numbered as in transformers: 0 is the embedding, -1 the final state."""
    if list(layers) == [-1]:  # the others need not be kept
        return hidden_states(model, packed)[:, None]
    states = _states(
        model, packed, lambda output: [output.hidden_states[layer] for layer in layers], output_hidden_states=True
    )
    return torch.stack(states, dim=1)


def _states(
    model: PreTrainedModel, packed: PackedBatch, kept: Callable[[Any], Sequence[Tensor]], **options: Any
) -> list[Tensor]:
    """[T, D] of each kept state [n, L, D] of the decoder's output."""
    decoder: Any = (
        model.base_model if model.base_model is not model else model.model
    )  # Llama 4's prefix names no module
    if runs_packed(model):
        output = decoder(
            input_ids=packed.token_ids[None],
            position_ids=packed.position_ids[None],
            use_cache=False,
            packed=packed,
            **options,
        )
        return [state[0] for state in kept(output)]
    # Padding follows every real token, and a causal model's tokens do not see what follows them.
    grids, collapse = _one_grid(packed) if _is_partitioned(model) else packed.sequence_grids
    calls = [kept(decoder(input_ids=packed.token_ids[grid], use_cache=False, **options)) for grid in grids]
    flat = [torch.cat([state.flatten(0, 1) for state in states]) for states in zip(*calls, strict=True)]
    return [torch.index_select(state, 0, collapse) for state in flat]


def _one_grid(packed: PackedBatch) -> tuple[list[Tensor], Tensor]:
    """Like `sequence_grids`, but one."""
    starts, lengths = packed.cu_lengths[:-1].long(), packed.cu_lengths.diff().long()
    columns = torch.arange(max(packed.lengths), device=starts.device)
    grid = packed.expand[starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)]
    row = torch.repeat_interleave(torch.arange(len(packed.lengths), device=starts.device), lengths)
    return [grid], packed.collapse + (row * len(columns) - starts[row])[packed.collapse]


def _is_partitioned(model: PreTrainedModel) -> bool:
    """Whether ZeRO 3 gathers parameters in each call: all ranks must then make equally many."""
    return hasattr(next(model.parameters()), "ds_id")
