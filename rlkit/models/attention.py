"""Attention over packed tokens, for transformers' models: `rlkit_packed`.

It expands queries, keys and values to whole sequences, attends causally inside each, and collapses the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rlkit.models.packing import PackedBatch

PACKED_ATTENTION = "rlkit_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]. Raise ValueError for other features."""
    extras = [name for name in ("softcap", "s_aux", "position_bias") if unsupported.get(name) is not None]
    if extras or attention_mask is not None or dropout:
        raise ValueError(
            f"{type(module).__name__}: packed attention does not implement {extras or 'masks and dropout'}"
        )
    if sliding_window is not None and max(packed.lengths) > sliding_window:
        raise ValueError(
            f"sequences of {max(packed.lengths)} tokens exceed the model's sliding window of {sliding_window}: "
            "lower rollout.max_prompt_tokens or rollout.max_response_tokens"
        )
    rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        attended = _varlen(*rows, packed, scaling)
    else:
        attended = _bucketed(*rows, packed, scaling)
    return attended.unsqueeze(0), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float) -> Tensor:
    """[T, H, D] each -> [T, Hq, D] by torch's variable-length flash attention, without padding."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packed.lengths)
    whole = varlen_attn(
        _take(query, packed.expand),
        _take(key, packed.expand),
        _take(value, packed.expand),
        packed.cu_lengths,
        packed.cu_lengths,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(whole, Tensor)
    return _take(whole, packed.collapse)


def _bucketed(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float) -> Tensor:
    """[T, H, D] each -> [T, Hq, D], one padded call per bucket of similar lengths.

    Padding follows every real token, so the causal rule alone hides it.
    """
    pieces = []
    for bucket in packed.buckets:
        indices = packed.expand[bucket].reshape(-1)
        q, k, v = (
            _take(t, indices).view(*bucket.shape, *t.shape[1:]).transpose(1, 2) for t in (query, key, value)
        )  # [n, H, L, D]
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        pieces.append(out.transpose(1, 2).reshape(-1, query.shape[1] * query.shape[2]))
    flat = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return torch.index_select(flat, 0, packed.bucket_collapse).view_as(query)


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices]; its backward is one index_add, which is fast on CPU too."""
    return torch.index_select(rows.reshape(rows.shape[0], -1), 0, indices).view(-1, *rows.shape[1:])


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
