"""Loading Hugging Face models for packed batches, each with an attention under which it is exact (selftest.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlkit.models.forward import ModelLoadError, PackedCausalLM, PackedScorer, PackedValueModel
from rlkit.models.selftest import choose_attention


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Return the torch dtype; `auto` is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_causal_lm(path: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PackedCausalLM:
    """Load a causal language model. Raise ModelLoadError with the remedy."""
    model, info = _load(AutoModelForCausalLM, path, dtype, trust_remote_code)
    _refuse_missing(path, info)
    return PackedCausalLM(model)


def load_scorer(path: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PackedScorer:
    """Load a one-label sequence classifier. Raise ModelLoadError with the remedy."""
    model, info = _load(AutoModelForSequenceClassification, path, dtype, trust_remote_code)
    _refuse_missing(path, info)
    return PackedScorer(model)


def load_value_model(path: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PackedValueModel:
    """Load a critic from the folder of a causal language model (or of a saved critic).

    A head that is not in the folder starts at zero: all values are 0 until the critic is trained.
    """
    model, info = _load(AutoModelForSequenceClassification, path, dtype, trust_remote_code, num_labels=1)
    if not (Path(path) / "config.json").read_text().count("ForSequenceClassification"):
        head: Any = model.score
        nn.init.zeros_(head.weight)
        info["missing_keys"] = [name for name in info["missing_keys"] if not name.startswith("score.")]
    _refuse_missing(path, info)
    return PackedValueModel(model)


def find_attention(path: str | Path, *, trust_remote_code: bool = False) -> str:
    """Return the attention of a causal language model (`choose_attention`) without loading it. Raise ModelLoadError if
    none."""
    return choose_attention(_config(path, trust_remote_code), trust_remote_code=trust_remote_code)


def _load(
    auto: Any, path: str | Path, dtype: torch.dtype, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    attention = choose_attention(_config(path, trust_remote_code, **options), auto, trust_remote_code=trust_remote_code)
    try:
        model, info = auto.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"model {path} cannot be loaded: {error}") from error
    _refuse_not_finite(path, model)
    return model, info


def _config(path: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"model {path} cannot be loaded: {error}") from error


def _refuse_missing(path: str | Path, info: dict[str, Any]) -> None:
    lost = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if lost:
        raise ModelLoadError(
            f"model {path} lacks {', '.join(lost[:5])}: they would be random; name a folder with all weights"
        )


def _refuse_not_finite(path: str | Path, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        tensor = getattr(parameter, "ds_tensor", parameter)  # with ZeRO 3, this rank's share
        if tensor.numel() and not tensor.is_meta and not all(map(torch.isfinite, tensor.aminmax())):
            raise ModelLoadError(
                f"model {path} has numbers that are not finite, in {name}: the file is damaged, or the training "
                "that wrote it had diverged; fetch it again, or name an earlier checkpoint"
            )
