"""Released POLAR checkpoints (`InternLM2ForRewardModel`) as `LlamaForSequenceClassification`, and back: exact.

The two architectures compute the same; only names differ, and InternLM2 keeps queries, keys and values of a key-value
head together in one matrix. The released model code is Python in the model folder; it is not needed, and under
transformers 5 it silently gives wrong scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewards.polar.backends import RELEASED_ARCHITECTURE, DiscriminatorError
from rewards.polar.weights import WeightReader

if TYPE_CHECKING:
    from torch import Tensor

RENAMED = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "v_head.weight": "score.weight",
}
RENAMED_IN_LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
"""InternLM2's name -> Llama's."""
FUSED = "attention.wqkv.weight"
SPLIT = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
COMPUTED = "rotary_emb.inv_freq"
"""A buffer that some files carry, and that is computed from the configuration."""
LAYER = re.compile(r"(model\.layers\.(?P<number>\d+)\.)(?P<rest>.+)")
_NAMED = 5
"""Missing tensors that a message names."""
SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the converted model. Raises DiscriminatorError for what Llama cannot express."""
    if config.get("architectures") != [RELEASED_ARCHITECTURE]:
        raise DiscriminatorError(f"config.json names {config.get('architectures')}, not {RELEASED_ARCHITECTURE}")
    if config.get("bias"):
        raise DiscriminatorError("config.json says bias=true; only models without biases can be converted")
    if config.get("hidden_act", "silu") != "silu":
        raise DiscriminatorError(f"config.json says hidden_act={config['hidden_act']}; only silu can be converted")
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling.get("type", scaling.get("rope_type")) != "dynamic":
        # Dynamic scaling begins beyond max_position_embeddings, where no input goes.
        raise DiscriminatorError(f"config.json says rope_scaling={scaling}; only none and dynamic can be converted")
    missing = [name for name in SAME_FIELDS if name not in config and name != "initializer_range"]
    if missing:
        raise DiscriminatorError(f"config.json lacks {', '.join(missing)}")
    return {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        **{name: config[name] for name in SAME_FIELDS if name in config},
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",  # with it vLLM's classify gives the raw score
        "dtype": config.get("torch_dtype", config.get("dtype", "float16")),
    }


def to_llama(weights: WeightReader, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """InternLM2's tensors under Llama's names.

    Raises DiscriminatorError if a tensor is missing, and for a name that belongs to no such model.
    """
    _check_complete(weights, config, [*RENAMED], [*RENAMED_IN_LAYER, FUSED])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name in weights.names:
        prefix, rest = _layer(name)
        if name in RENAMED:
            yield RENAMED[name], weights[name]
        elif rest in RENAMED_IN_LAYER:
            yield prefix + RENAMED_IN_LAYER[rest], weights[name]
        elif rest == FUSED:
            parts = split_wqkv(weights[name], heads, kv_heads)
            yield from ((prefix + part, tensor) for part, tensor in zip(SPLIT, parts, strict=True))
        elif not name.endswith(COMPUTED):
            raise DiscriminatorError(f"{name} is no tensor of an {RELEASED_ARCHITECTURE}")


def from_llama(weights: WeightReader, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The reverse of to_llama."""
    _check_complete(weights, config, [*RENAMED.values()], [*RENAMED_IN_LAYER.values(), *SPLIT])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    top = {new: old for old, new in RENAMED.items()}
    layer = {new: old for old, new in RENAMED_IN_LAYER.items()}
    for name in weights.names:
        prefix, rest = _layer(name)
        if name in top:
            yield top[name], weights[name]
        elif rest in layer:
            yield prefix + layer[rest], weights[name]
        elif rest == SPLIT[0]:
            query, key, value = (weights[prefix + part] for part in SPLIT)
            yield prefix + FUSED, join_wqkv(query, key, value, heads, kv_heads)
        elif rest not in SPLIT:
            raise DiscriminatorError(f"{name} has no counterpart in an {RELEASED_ARCHITECTURE}")


def _check_complete(
    weights: WeightReader, config: Mapping[str, Any], top: Sequence[str], in_layer: Sequence[str]
) -> None:
    layers = config["num_hidden_layers"]
    expected = [*top, *(f"model.layers.{i}.{name}" for i in range(layers) for name in in_layer)]
    missing = sorted(set(expected) - set(weights.names))
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise DiscriminatorError(f"the weights lack {', '.join(missing[:_NAMED])}{more}: is the folder complete?")
    beyond = sorted(
        name for name in weights.names if (found := LAYER.fullmatch(name)) and int(found["number"]) >= layers
    )
    if beyond:
        raise DiscriminatorError(f"{beyond[0]} is beyond the {layers} layers that config.json says")


def split_wqkv(fused: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from InternLM2's matrix: for each key-value head its queries, its key, its value."""
    queries = heads // kv_heads
    hidden = fused.shape[1]
    grouped = fused.view(kv_heads, queries + 2, -1, hidden)
    return (
        grouped[:, :queries].reshape(-1, hidden),
        grouped[:, queries].reshape(-1, hidden),
        grouped[:, queries + 1].reshape(-1, hidden),
    )


def join_wqkv(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The reverse of split_wqkv."""
    import torch

    queries = heads // kv_heads
    hidden = query.shape[1]
    parts = [
        query.view(kv_heads, queries, -1, hidden),
        key.view(kv_heads, 1, -1, hidden),
        value.view(kv_heads, 1, -1, hidden),
    ]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def _layer(name: str) -> tuple[str, str]:
    """`model.layers.3.` and what follows; two empty strings for a tensor of no layer."""
    found = LAYER.fullmatch(name)
    return (found[1], found["rest"]) if found else ("", "")
