"""A small copy of a model's configuration with every kind of layer: a prefix of its layers, few tokens and experts.

Windows, chunks and other lengths are cut to a few tokens, so that short sequences exceed them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
WIDTH = 64
SHORT = 5
"""Tokens of a window or chunk; the self-test's sequences are longer."""
CHUNK = 16
LOW_CAP = 3.0
"""Upper limit of logits' soft caps, which uncapped logits exceed."""
MOST_LAYERS = 16

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "index_topk",
    "floor_scale",
)
_CHUNKS = ("chunk_size", "mamba_chunk_size")
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "ffn_hidden_size",
    "ffn_dim",
)
_NARROW = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "index_n_heads": 2,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 16,
    "linear_num_heads": 2,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "n_groups": 2,
}
_INDICES = ("layer_idx", "layer_id", "layer_index", "layer_num", "block_idx", "training")

Build = Callable[[Any], nn.Module]


def small_copies(config: Any, build: Build) -> Iterator[Any]:
    """Yield copies of `config`, smallest first, each for when the one before cannot be run; `build` makes a model of
    one."""
    for cuts in ((_cut_experts, _cut_width), (_cut_experts,), ()):
        try:
            yield _shallow(_cut(config, cuts), build)
        except Exception:  # an inconsistent configuration; the remaining copies are closer to the original
            continue
    whole = copy.deepcopy(config)
    _cut_tokens(whole)
    yield whole


def _cut(config: Any, cuts: Sequence[Callable[[Any], None]]) -> Any:
    small = copy.deepcopy(config)
    _cut_tokens(small)
    for part in _parts(small):
        for name in _WINDOWS:
            _lower(part, name, SHORT)
        for name in _CHUNKS:  # of linear attention: they change memory, not results
            _lower(part, name, CHUNK)
        for name in _SOFT_CAPS:
            if getattr(part, name, None):
                setattr(part, name, min(getattr(part, name), LOW_CAP))
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and "llama_4_scaling_beta" in rope:  # queries are scaled by position / this
            rope["original_max_position_embeddings"] = SHORT
        if part is small.get_text_config():
            for cut in cuts:
                cut(part)
    text = small.get_text_config()
    for part in _parts(small):
        if part is not text and part is not small:
            for name in ("num_hidden_layers", "depth"):
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, 1)
    if (dense := getattr(text, "first_k_dense_replace", None)) is not None and dense > 1:
        text.first_k_dense_replace = 1
    return small


def _cut_tokens(config: Any) -> None:
    text = config.get_text_config()
    for part in {id(part): part for part in (config, text)}.values():
        for name in _VOCABULARIES:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(getattr(part, name), VOCABULARY))
        if (getattr(part, "pad_token_id", None) or 0) >= VOCABULARY:
            part.pad_token_id = 0
    for part in _parts(config):
        part.dtype = torch.float32


def _cut_experts(text: Any) -> None:
    chosen = max((value for name in _CHOSEN_EXPERTS if isinstance(value := getattr(text, name, None), int)), default=1)
    groups = getattr(text, "n_group", None) or 1
    least = -(-max(4, 2 * chosen, 2 * groups) // groups) * groups
    for name in _EXPERTS:
        _lower(text, name, least)
    for name in _WIDTHS:
        widths = getattr(text, name, None)
        if isinstance(widths, list):
            setattr(text, name, [min(width, WIDTH) for width in widths])
        else:
            _lower(text, name, WIDTH)


def _cut_width(text: Any) -> None:
    """Reduce the number of heads, keeping their size, and make the hidden state as narrow as they allow."""
    if not hasattr(text, "num_attention_heads"):  # Mamba 2
        if hasattr(text, "expand") and hasattr(text, "num_heads"):
            text.update({"hidden_size": text.head_dim, "num_heads": text.expand, "n_groups": 1})
        return
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kept = min(kv_heads, 2)
    kept_heads = kept * min(heads // kv_heads, 3)
    try:
        explicit = getattr(text, "head_dim", None) is not None
    except Exception:  # transformers refuses to give one size if layers have different ones
        explicit = True
    width = min(text.hidden_size, 2 * WIDTH) if explicit else kept_heads * (text.hidden_size // heads)
    for name in ("lru_width", "word_embed_proj_dim"):
        if getattr(text, name, None) == text.hidden_size:
            setattr(text, name, width)
    text.hidden_size, text.num_attention_heads = width, kept_heads
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = kept
    for name, most in _NARROW.items():
        _lower(text, name, most)
    if isinstance(keys := getattr(text, "linear_num_key_heads", None), int):
        ratio = text.linear_num_value_heads // keys
        text.linear_num_key_heads, text.linear_num_value_heads = min(keys, 2), min(keys, 2) * ratio
    if isinstance(size := getattr(text, "mamba_d_head", None), int) and getattr(text, "mamba_expand", None):
        text.mamba_n_heads = max(1, text.mamba_expand * width // size)
        if getattr(text, "mamba_d_ssm", None):
            text.mamba_d_ssm = text.mamba_n_heads * size


def _lower(text: Any, name: str, most: int) -> None:
    value = getattr(text, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        setattr(text, name, most)


def _parts(config: Any) -> list[Any]:
    parts = [config]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            parts.append(part)
    return parts


def _shallow(config: Any, build: Build) -> Any:
    """Keep the shortest prefix of the layers, at least two, that has all kinds of them."""
    whole = config.get_text_config().num_hidden_layers
    kinds = _kinds(config, build)
    if kinds is None:  # the layers are not a list of modules
        return _with_layers(config, min(whole, MOST_LAYERS))
    distinct = set(kinds)
    least = max(2, *(kinds.index(kind) + 1 for kind in distinct)) if distinct else 2
    for layers in range(min(least, whole, MOST_LAYERS), min(whole, MOST_LAYERS) + 1):
        shallow = _with_layers(config, layers)
        if set(_kinds(shallow, build) or ()) >= distinct:
            return shallow
    return _with_layers(config, min(whole, MOST_LAYERS))


def _with_layers(config: Any, layers: int) -> Any:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    whole = text.num_hidden_layers
    if layers == whole:
        return shallow
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple, str)) and len(value) == whole and not name.startswith("_"):
            setattr(text, name, value[:layers])
    if getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = max(1, layers * text.num_kv_shared_layers // whole)
    text.num_hidden_layers = layers
    return shallow


def _kinds(config: Any, build: Build) -> list[Any] | None:
    """Describe what each layer consists of, without its sizes."""
    with torch.device("meta"):
        model = build(config)
    layers = config.get_text_config().num_hidden_layers
    stack = next(
        (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers), None
    )
    return None if stack is None else [_kind(layer) for layer in stack]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (
            name,
            type(module).__name__,
            tuple(key for key, _ in module.named_parameters(recurse=False)),
            tuple((key, _plain(value)) for key, value in sorted(vars(module).items()) if key not in _INDICES),
        )
        for name, module in layer.named_modules()
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and value in (0, 1)):
        return value
    return type(value).__name__
