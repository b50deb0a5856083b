"""Hugging Face models, run on packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlkit.experience import UserError
from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.logprobs import LogProbLinear
from rlkit.models.packing import PackedBatch

CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields that change the logits after the head: our log-probs would be wrong."""


class ModelLoadError(UserError, ValueError): ...


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class PackedCausalLM(nn.Module):
    """Maps a packed batch to log-probs; `model` is the Hugging Face model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ModelLoadError(f"{type(model).__name__}: the head must be a plain Linear, not {type(head).__name__}")
        changed = [name for name in CHANGES_LOGITS if getattr(model.config, name, None) not in (None, 1, 1.0)]
        if changed:
            raise ModelLoadError(f"{type(model).__name__} changes its logits by {', '.join(changed)}: not supported")
        head.__class__ = LogProbLinear
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
        hidden = hidden_states(self.model, packed)
        score: Any = self.model.score
        scores: Tensor = score(torch.index_select(hidden, 0, packed.last))[:, 0]
        return scores.float()


class PackedValueModel(nn.Module):
    """A critic: a value for every response token, head in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        _score_in_fp32(model)

    def forward(self, packed: PackedBatch) -> Tensor:
        """Values [R], fp32, of the states in which the packed batch's targets are chosen."""
        hidden = hidden_states(self.model, packed)
        score: Any = self.model.score
        values: Tensor = score(torch.index_select(hidden, 0, packed.rows))[:, 0]
        return values.float()


def _score_in_fp32(model: Any) -> None:
    if type(getattr(model, "score", None)) is nn.Linear:
        model.score.__class__ = Fp32Linear


def hidden_states(model: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """Final hidden states [T, D]."""
    hidden: Tensor = _decode(model, packed).last_hidden_state[0]
    return hidden


def layer_states(model: PreTrainedModel, packed: PackedBatch, layers: Sequence[int]) -> Tensor:
    """[T, L, D] after L layers, numbered as in transformers: 0 is the embedding, -1 the final state."""
    if list(layers) == [-1]:  # the others need not be kept
        return hidden_states(model, packed)[:, None]
    states = _decode(model, packed, output_hidden_states=True).hidden_states
    return torch.stack([states[layer][0] for layer in layers], dim=1)


def _decode(model: PreTrainedModel, packed: PackedBatch, **options: Any) -> Any:
    decoder: Any = model.base_model
    return decoder(
        input_ids=packed.token_ids[None],
        position_ids=packed.position_ids[None],
        use_cache=False,
        packed=packed,
        **options,
    )


def load_causal_lm(path: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PackedCausalLM:
    """Raise ModelLoadError with the remedy."""
    return PackedCausalLM(_load(AutoModelForCausalLM, path, dtype, trust_remote_code))


def load_scorer(path: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PackedScorer:
    """Raise ModelLoadError with the remedy."""
    model, info = _load_with_info(AutoModelForSequenceClassification, path, dtype, trust_remote_code)
    lost = sorted(info["missing_keys"])
    if lost:
        raise ModelLoadError(
            f"model {path} lacks {', '.join(lost[:5])}: they would start at random; name a folder with all weights"
        )
    return PackedScorer(model)


def load_value_model(path: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PackedValueModel:
    """Load a critic from the folder of a causal language model (or of a saved critic).

    A head that is not in the folder starts at zero: all values are 0 until the critic has learnt.
    """
    model = _load(AutoModelForSequenceClassification, path, dtype, trust_remote_code, num_labels=1)
    if not (Path(path) / "config.json").read_text().count("ForSequenceClassification"):
        head: Any = model.score
        nn.init.zeros_(head.weight)
    return PackedValueModel(model)


def _load(auto: Any, path: str | Path, dtype: torch.dtype, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    return _load_with_info(auto, path, dtype, trust_remote_code, **options)[0]


def _load_with_info(
    auto: Any, path: str | Path, dtype: torch.dtype, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        model, info = auto.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"model {path} cannot be loaded: {error}") from error
    return model, info
