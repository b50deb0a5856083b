"""Hugging Face models run on packed batches: as one packed row, or with each sequence as its own row.

The model's attention decides which: `rlkit_packed` is chosen at load if it is exact (selftest.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from rlkit.experience import UserError
from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.logprobs import LogProbLinear
from rlkit.models.packing import PackedBatch
from rlkit.models.sequence import SequenceRanks

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields for what models do to their logits after the head (`logits_scaling` of HyperCLOVA X multiplies)."""


class ModelLoadError(UserError, ValueError): ...


class PackedModel(nn.Module):
    """Maps a packed batch to numbers; `model` is the Hugging Face model."""

    ranks: SequenceRanks | None = None
    """The ranks that compute each batch together."""
    offloads: bool = False
    """Keep what the decoder saves for the backward pass in host memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def share_sequences(self, ranks: SequenceRanks | None) -> None:
        """Compute each batch together with other ranks. Raise ModelLoadError for a model that runs row by row."""
        if ranks is not None and not runs_packed(self.model):
            raise ModelLoadError(
                f"{type(self.model).__name__} runs row by row (docs/models.md), so ranks cannot share its sequences; "
                "leave sequence_parallel at 1"
            )
        self.ranks = ranks

    def _at(self, packed: PackedBatch, tokens: Tensor) -> tuple[Tensor, Tensor | slice, Callable[[Tensor], Tensor]]:
        """Return the final hidden states of those of N packed tokens that this rank holds, their places among the N,
        and a function that joins one number for each into the row [N] of all ranks."""
        # Tensors on a CPU are copied as well.
        with save_on_cpu(pin_memory=True) if self.offloads else nullcontext():
            hidden = hidden_states(self.model, packed, self.ranks)
        if self.ranks is None:
            return torch.index_select(hidden, 0, tokens), slice(None), lambda values: values
        places, own = self.ranks.mine(tokens)
        return torch.index_select(hidden, 0, own), places, partial(self.ranks.joined, places=places, count=len(tokens))

    def _scores(self, packed: PackedBatch, tokens: Tensor) -> Tensor:
        """Scores [N] in fp32, read at N packed tokens."""
        head: Any = self.model.score
        hidden, _, joined = self._at(packed, tokens)
        return joined(head(hidden)[:, 0].float())


class PackedCausalLM(PackedModel):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        head: Any = model.get_output_embeddings()
        kind = type(head)
        if kind is not nn.Linear:
            raise ModelLoadError(f"{type(model).__name__}: the head must be a plain Linear, not {kind.__name__}")
        head.__class__ = LogProbLinear
        head.scale, head.softcap = logit_scale_and_cap(model.config)

    def forward(
        self, packed: PackedBatch, temperature: float = 1.0, elements_per_chunk: int = 2**24
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs [R] of the packed batch's targets and entropies [R], both fp32."""
        head: Any = self.model.get_output_embeddings()
        hidden, places, joined = self._at(packed, packed.rows)
        logprobs, entropy = head(
            hidden, targets=packed.targets[places], temperature=temperature, elements_per_chunk=elements_per_chunk
        )
        return joined(logprobs), joined(entropy)


class Fp32Linear(nn.Linear):
    """Computes in fp32 and returns fp32, whatever the dtype of its weights and inputs."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class PackedScorer(PackedModel):
    """A one-label sequence classifier, read at the last token of each packed sequence, head in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if model.config.num_labels != 1:
            raise ModelLoadError(f"{type(model).__name__} has {model.config.num_labels} labels; a scorer has one")
        _score_in_fp32(model)

    def forward(self, packed: PackedBatch) -> Tensor:
        """Return raw scores [N], fp32."""
        return self._scores(packed, packed.last)


class PackedValueModel(PackedModel):
    """A critic: a value for every response token, head in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        _score_in_fp32(model)

    def forward(self, packed: PackedBatch) -> Tensor:
        """Return values [R], fp32, of the states in which the packed batch's targets are chosen."""
        return self._scores(packed, packed.rows)


def _score_in_fp32(model: Any) -> None:
    if type(getattr(model, "score", None)) is nn.Linear:
        model.score.__class__ = Fp32Linear


def logit_scale_and_cap(config: Any) -> tuple[float, float | None]:
    """The factor by which the logits are multiplied, and their soft cap."""
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


def hidden_states(model: PreTrainedModel, packed: PackedBatch, ranks: SequenceRanks | None = None) -> Tensor:
    """Final hidden states [T, D], or those of the tokens that this rank among `ranks` holds."""
    (hidden,) = _states(model, packed, lambda output: (output.last_hidden_state,), ranks)
    return hidden


def layer_states(model: PreTrainedModel, packed: PackedBatch, layers: Sequence[int]) -> Tensor:
    """Hidden states [T, L, D] after L layers, numbered as in transformers: 0 is the embedding, -1 the final state."""
    if list(layers) == [-1]:  # then the other states need not be kept
        return hidden_states(model, packed)[:, None]
    states = _states(
        model, packed, lambda output: [output.hidden_states[layer] for layer in layers], output_hidden_states=True
    )
    return torch.stack(states, dim=1)


def _states(
    model: PreTrainedModel,
    packed: PackedBatch,
    kept: Callable[[Any], Sequence[Tensor]],
    ranks: SequenceRanks | None = None,
    **options: Any,
) -> list[Tensor]:
    """Hidden states [T, D], one for each state [n, L, D] kept from the decoder's output."""
    decoder: Any = (
        model.base_model if model.base_model is not model else model.model
    )  # Llama 4's prefix names no module
    if runs_packed(model):
        token_ids, positions = packed.token_ids, packed.position_ids
        if ranks is not None:
            token_ids, positions = ranks.share(token_ids), ranks.share(positions)
            options["ranks"] = ranks
        output = decoder(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            packed=packed,
            **options,
        )
        return [state[0] for state in kept(output)]
    # Padding comes after all real tokens, and tokens of a causal model do not see later ones.
    grids, collapse = _one_grid(packed) if _is_partitioned(model) else packed.sequence_grids
    calls = [kept(decoder(input_ids=packed.token_ids[grid], use_cache=False, **options)) for grid in grids]
    flat = [torch.cat([state.flatten(0, 1) for state in states]) for states in zip(*calls, strict=True)]
    return [torch.index_select(state, 0, collapse) for state in flat]


def _one_grid(packed: PackedBatch) -> tuple[list[Tensor], Tensor]:
    """Like `sequence_grids`, but always a single grid."""
    starts, lengths = packed.cu_lengths[:-1].long(), packed.cu_lengths.diff().long()
    columns = torch.arange(max(packed.lengths), device=starts.device)
    grid = packed.expand[starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)]
    row = torch.repeat_interleave(torch.arange(len(packed.lengths), device=starts.device), lengths)
    return [grid], packed.collapse + (row * len(columns) - starts[row])[packed.collapse]


def _is_partitioned(model: PreTrainedModel) -> bool:
    """Whether ZeRO 3 gathers parameters in each call: all ranks must then make the same number of calls."""
    return hasattr(next(model.parameters()), "ds_id")
