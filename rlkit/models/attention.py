"""Attention over packed tokens for transformers' models: `rlkit_packed`.

Each piece of a packed batch attends to its own sequence: causally, within a window or within chunks, with soft-capped
scores and sinks if the model has them. Queries of a shared prefix attend only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from rlkit.models.packing import Bucket, PackedBatch
from rlkit.models.sequence import SequenceRanks

PACKED_ATTENTION = "rlkit_packed"
WIDEST_FLASH_HEAD = 256
SCORES_PER_BLOCK = 2**25
"""Attention scores held in memory at a time where they are computed explicitly."""


@dataclass(frozen=True)
class Pattern:
    """Which keys, among those up to position i of its sequence, a query at position i sees: taken from transformers'
    mask."""

    window: int | None = None
    """Only the last `window` of them."""
    chunk: int | None = None
    """Only those in its own chunk of this length."""

    def within(self, length: int) -> Pattern:
        """Drop the limits that make no difference to sequences of `length` tokens."""
        return Pattern(
            window=self.window if self.window is not None and self.window < length else None,
            chunk=self.chunk if self.chunk is not None and self.chunk < length else None,
        )

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries see keys, given positions that broadcast: bool."""
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        if self.chunk is not None:
            seen = seen & (keys // self.chunk == queries // self.chunk)
        return seen


CAUSAL = Pattern()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Pattern | Tensor | None,
    *,
    packed: PackedBatch | None = None,
    ranks: SequenceRanks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, E] -> [1, T, Hq, E].

    T: tokens of the batch, or those that this rank among `ranks` holds. `softcap` c caps scores z at c * tanh(z / c);
    `s_aux` [Hq] are sinks: scores of a key without a value. Raise ValueError for anything else that changes attention.
    """
    name = type(module).__name__
    if packed is None:
        raise ValueError(f"{name}: the model does not pass its keyword arguments on to its attention")
    refused = [k for k in ("position_bias", "indices", "block_indices") if others.get(k) is not None]
    if isinstance(attention_mask, Tensor):
        refused.append("a mask of its own")
    if dropout:
        refused.append("dropout")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refused.append("attention to later tokens")
    tokens = len(packed.token_ids) if ranks is None else ranks.held(len(packed.token_ids))
    if not query.shape[2] == key.shape[2] == tokens:
        refused.append(f"{query.shape[2]} queries and {key.shape[2]} keys for {tokens} tokens")
    longest = max(packed.lengths)
    pattern = (attention_mask if isinstance(attention_mask, Pattern) else CAUSAL).within(longest)
    if sliding_window is not None and Pattern(sliding_window).within(longest).window != pattern.window:
        refused.append(f"a window of {sliding_window} tokens that its mask does not have")
    if refused:
        raise ValueError(f"{name}: packed attention does not implement {', '.join(refused)}")

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if ranks is not None:
        q, k, v = (tensor[: len(packed.token_ids)] for tensor in ranks.tokens_to_heads((q, k, v)))
        s_aux = None if s_aux is None else ranks.of_heads(s_aux)
    if softcap is not None or s_aux is not None:
        attended = _bucketed(q, k, v, packed, pattern, _Explicit(scale, softcap, s_aux))
    else:
        # Flash kernels need keys and values of the same width; zeros change neither scores nor outputs.
        width = max(key.shape[-1], value.shape[-1])
        q, k, v = (nn.functional.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        half = query.dtype in (torch.bfloat16, torch.float16)
        if query.is_cuda and half and width <= WIDEST_FLASH_HEAD and pattern.chunk is None:
            attended = _varlen(q, k, v, packed, pattern, scale)
        else:
            attended = _bucketed(q, k, v, packed, pattern, _Fused(scale))
        attended = attended[..., : value.shape[-1]]
    if ranks is not None:
        attended = ranks.heads_to_tokens(attended)
    return attended.unsqueeze(0), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, pattern: Pattern, scale: float) -> Tensor:
    """[T, H, D] each -> [T, Hq, D], computed by torch's variable-length flash attention without padding.

    It aligns the last query of a piece with its last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    runs = packed.runs
    attended = varlen_attn(
        _take(query, runs.queries),
        _take(key, runs.keys),
        _take(value, runs.keys),
        runs.cu_queries,
        runs.cu_keys,
        runs.longest_query,
        runs.longest_key,
        scale=scale,
        window_size=(-1 if pattern.window is None else pattern.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return _take(attended, runs.collapse)


_Attend = Callable[[Tensor, Tensor, Tensor, Bucket, Pattern], Tensor]
"""q [n, Hq, L, D], k [n, Hkv, S, D], v [n, Hkv, S, E] -> [n, Hq, L, E]."""


def _bucketed(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, pattern: Pattern, attend: _Attend
) -> Tensor:
    """[T, H, D] each -> [T, Hq, E], one padded call per bucket of similar lengths.

    Padding comes after all real tokens, so the causal rule is enough to hide it.
    """
    queries, keys = ([getattr(bucket, side) for bucket in packed.buckets] for side in ("queries", "keys"))
    inputs = (_grids(tensor, grids) for tensor, grids in ((query, queries), (key, keys), (value, keys)))
    outputs = []
    for bucket, q, k, v in zip(packed.buckets, *inputs, strict=True):
        out = attend(q, k, v, bucket, pattern)
        outputs.append(out.transpose(1, 2).reshape(-1, query.shape[1] * value.shape[2]))
    flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return torch.index_select(flat, 0, packed.bucket_collapse).view(*query.shape[:2], value.shape[2])


@dataclass(frozen=True)
class _Fused:
    scale: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, pattern: Pattern) -> Tensor:
        causal = bucket.starts == (0, 0) and pattern == CAUSAL
        seen = None
        if not causal:
            seen = pattern.sees(bucket.positions[:, None, :, None], torch.arange(k.shape[2], device=k.device))
        if q.is_cuda:  # only its flash kernel supports grouped heads; the others would hold all scores at once
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )


@dataclass(frozen=True)
class _Explicit:
    """Scores computed in fp32, block by block; if there are several blocks, the backward pass recomputes them."""

    scale: float
    softcap: float | None
    sinks: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, pattern: Pattern) -> Tensor:
        sequences, heads, length, _ = q.shape
        scores = heads * k.shape[2]
        columns = max(1, min(length, SCORES_PER_BLOCK // scores))
        rows = max(1, SCORES_PER_BLOCK // (scores * columns))
        several = columns < length or rows < sequences
        outputs = []
        for row in range(0, sequences, rows):
            some = slice(row, row + rows)
            blocks = []
            for first in range(0, length, columns):
                some_queries = slice(first, first + columns)
                # the keys that any query of the block may see
                low = 0 if pattern.window is None else max(0, bucket.starts[0] + first - pattern.window + 1)
                high = min(k.shape[2], bucket.starts[1] + first + columns)
                inputs = (
                    q[some, :, some_queries],
                    k[some, :, low:high],
                    v[some, :, low:high],
                    pattern.sees(
                        bucket.positions[some, None, some_queries, None], torch.arange(low, high, device=k.device)
                    ),
                )
                if several and torch.is_grad_enabled():
                    blocks.append(checkpoint(self._block, *inputs, use_reentrant=False, preserve_rng_state=False))
                else:
                    blocks.append(self._block(*inputs))
            outputs.append(torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0])
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _block(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        n, heads, length, _ = q.shape
        groups = k.shape[1]
        queries = q.float().reshape(n, groups, heads // groups * length, -1)  # heads of a group share keys
        scores = (queries @ k.float().transpose(2, 3)).view(n, heads, length, -1) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        # Finite, because a padding query may see no key of its block.
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks.float().view(1, heads, 1, 1).expand(n, heads, length, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        p = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
        out = p.reshape(n, groups, heads // groups * length, -1) @ v.float()
        return out.view(n, heads, length, -1).to(q.dtype)


def _grids(rows: Tensor, indices: Sequence[Tensor]) -> list[Tensor]:
    """[T, H, D] at [n, L] each -> [n, H, L, D] each; taken all at once, because each separate take would fill and add T
    rows in its backward pass."""
    taken = _take(rows, torch.cat([some.reshape(-1) for some in indices])).split([some.numel() for some in indices])
    return [own.view(*some.shape, *rows.shape[1:]).transpose(1, 2) for own, some in zip(taken, indices, strict=True)]


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    """Return rows[indices]; the backward pass is one index_add, which is fast on CPU too."""
    return torch.index_select(rows.reshape(rows.shape[0], -1), 0, indices).view(-1, *rows.shape[1:])


def packed_mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> Pattern | None:
    """Return the pattern of transformers' mask function; None if it is only causal.

    Many models express windows and chunks only in their mask. Raise ValueError for other patterns.
    """
    parts = list(_parts(mask_function))
    windows = [value for name, value in parts if name == "sliding_window_overlay" and value is not None]
    chunks = {value for name, value in parts if name == "chunked_overlay"}
    rest = {name for name, _ in parts} - {"sliding_window_overlay", "chunked_overlay", "packed_sequence_mask_function"}
    if rest != {"causal_mask_function"} or len(chunks) > 1:
        raise ValueError(f"packed attention does not implement a mask of {', '.join(name for name, _ in parts)}")
    pattern = Pattern(window=min(windows, default=None), chunk=next(iter(chunks), None))
    return None if pattern == CAUSAL else pattern


def _parts(mask_function: Any) -> Iterator[tuple[str, int | None]]:
    """Yield the names of the masks that transformers has combined by `and`, each with its length (masking_utils.py)."""
    name = getattr(mask_function, "__qualname__", repr(mask_function)).partition(".<locals>")[0]
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if name == "and_masks":
        for part in cells[0]:
            yield from _parts(part)
    else:
        yield name, next((cell for cell in cells if isinstance(cell, int)), None)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
