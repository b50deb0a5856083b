"""Causal attention in two parts, in fp32 on CPUs: queries of responses see their shared prompt, and then their own row.

With out_i = softmax(s_i) v_i and lse_i = log(sum exp(s_i)) of each part i, attention over both is
    lse = logaddexp(lse_1, lse_2)     out = sum_i exp(lse_i - lse) out_i
The backward pass of a flash kernel needs of the softmax only lse and out, so with those of both parts together it gives
the gradients of each part (as in ring attention: Liu et al. 2023, arXiv:2310.01889). No key of a prompt is copied, and
nothing is masked but by the causal rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkit.models.packing import PackedBatch, take

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def in_two_parts(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scale: float) -> Tensor:
    """[T, Hq, D], [T, Hkv, D], [T, Hkv, D] -> [T, Hq, D]; fp32, on a CPU."""
    attended: Tensor = _TwoParts.apply(query, key, value, packed, scale)
    return attended


class _TwoParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scale: float) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        own = [_attend(*rows, 0.0, True, scale=scale) for rows in _own_rows(packed, query, key, value)]
        out = _tokens(packed, [part for part, _ in own])
        lse = _tokens(packed, [part[..., None] for _, part in own])
        for prompt, responses in packed.own.stems:
            q = _by_key_head(query[responses], key)
            part, part_lse = _attend(q, *_shared(q, key[prompt], value[prompt]), 0.0, False, scale=scale)
            part, part_lse = _by_query_head(part), _by_query_head(part_lse[..., None])
            both = torch.logaddexp(lse[responses], part_lse)
            out[responses] *= torch.exp(lse[responses] - both)
            out[responses] += part * torch.exp(part_lse - both)
            lse[responses] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        packed, grad, options = ctx.packed, grads[0].contiguous(), {"scale": ctx.scale}
        own = [
            _gradients(g, q, k, v, o, row_lse[..., 0], 0.0, True, **options)
            for g, (q, k, v, o, row_lse) in zip(
                _without_copies(packed, grad), _own_rows(packed, query, key, value, out, lse), strict=True
            )
        ]
        of_queries, of_keys, of_values = zip(*own, strict=True)
        dq, dk, dv = _tokens(packed, of_queries), _summed(packed, of_keys, key), _summed(packed, of_values, value)
        for prompt, responses in packed.own.stems:
            g, q, o, part_lse = (_by_key_head(tensor[responses], key) for tensor in (grad, query, out, lse))
            k, v = _shared(q, key[prompt], value[prompt])
            of_query, of_key, of_value = _gradients(g, q, k, v, o, part_lse[..., 0], 0.0, False, **options)
            dq[responses] += _by_query_head(of_query)
            dk[prompt] += of_key.sum(dim=0).transpose(0, 1)
            dv[prompt] += of_value.sum(dim=0).transpose(0, 1)
        return dq, dk, dv, None, None


def _own_rows(packed: PackedBatch, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """[T, H, D] each -> [n, Hq, L, D] for each grid; the first has all Hq heads."""
    for grid in packed.own.grids:
        rows = [take(t, grid.reshape(-1)).view(*grid.shape, *t.shape[1:]).transpose(1, 2) for t in tensors]
        repeats = [rows[0].shape[1] // row.shape[1] for row in rows]
        yield [row if n == 1 else row.repeat_interleave(n, dim=1) for row, n in zip(rows, repeats, strict=True)]


def _without_copies(packed: PackedBatch, tensor: Tensor) -> list[Tensor]:
    """[T, H, D] -> [n, H, L, D] for each grid: each token once, zeros elsewhere."""
    grids = packed.own.grids
    flat = tensor.new_zeros(sum(grid.numel() for grid in grids), *tensor.shape[1:])
    flat.flatten(1).index_copy_(0, packed.own.collapse, tensor.flatten(1))
    parts = flat.split([grid.numel() for grid in grids])
    return [part.view(*grid.shape, *part.shape[1:]).transpose(1, 2) for part, grid in zip(parts, grids, strict=True)]


def _tokens(packed: PackedBatch, parts: Sequence[Tensor]) -> Tensor:
    """[n, H, L, D] for each grid -> [T, H, D]: one copy of each token."""
    return take(torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]), packed.own.collapse)


def _summed(packed: PackedBatch, parts: Sequence[Tensor], key: Tensor) -> Tensor:
    """[n, Hq, L, D] for each grid -> [T, Hkv, D]: sums over all copies of a token, and over queries' heads."""
    total = torch.zeros_like(key)
    for part, grid in zip(parts, packed.own.grids, strict=True):
        rows = part.transpose(1, 2).flatten(0, 1)
        if rows.shape[1] > key.shape[1]:
            rows = rows.unflatten(1, (key.shape[1], -1)).sum(dim=2)
        total.flatten(1).index_add_(0, grid.flatten(), rows.flatten(1))
    return total


def _by_key_head(rows: Tensor, key: Tensor) -> Tensor:
    """[R, Hq, D] -> [Hq / Hkv, Hkv, R, D]"""
    return rows.unflatten(1, (key.shape[1], -1)).permute(2, 1, 0, 3)


def _by_query_head(rows: Tensor) -> Tensor:
    """[Hq / Hkv, Hkv, R, D] -> [R, Hq, D]"""
    return rows.permute(2, 1, 0, 3).flatten(1, 2)


def _shared(queries: Tensor, *tensors: Tensor) -> list[Tensor]:
    """[P, Hkv, D] each -> [Hq / Hkv, Hkv, P, D], without copies."""
    return [tensor.transpose(0, 1).expand(len(queries), -1, -1, -1) for tensor in tensors]
