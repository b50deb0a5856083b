"""One packed batch over several ranks: Ulysses' sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509).

Of s ranks, rank r holds the packed tokens r, r + s, r + 2 s, ... in all layers. Only attention needs several tokens:
before it, ranks exchange tokens for heads, so that each has 1/s of the heads for all tokens; afterwards they exchange
back. Attention covers the whole batch, including shared prefixes. Each rank has the logits of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SequenceRanks:
    """The ranks that compute one batch together. All of them make the same calls."""

    group: Any
    """torch's process group."""
    rank: int
    count: int

    def held(self, tokens: int) -> int:
        """Number of rows that every rank holds for that many packed tokens; rows beyond the last token attend to
        nothing."""
        return -(-tokens // self.count)

    def share(self, rows: Tensor) -> Tensor:
        """[T] -> this rank's [held]; the last one is repeated as filler."""
        places = torch.arange(self.held(len(rows)), device=rows.device) * self.count + self.rank
        return rows[places.clamp(max=len(rows) - 1)]

    def mine(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Select the packed indices [N] that this rank holds: their places [n] in `tokens`, and their indices among its
        tokens."""
        places = (tokens % self.count == self.rank).nonzero()[:, 0]
        return places, tokens[places] // self.count

    def joined(self, values: Tensor, places: Tensor, count: int) -> Tensor:
        """Join [n] of each rank, at its `places`, into [count] on all ranks.

        Every rank then computes the same loss and gets back the gradient of its own values, so that gradients of
        parameters add up over the ranks.
        """
        joined: Tensor = _Joined.apply(values, places, count, self.group)
        return joined

    def tokens_to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[held, H, D] each -> [held x ranks, H / ranks, D], in packed order, in a single exchange."""
        rows = [self._split(tensor) for tensor in tensors]
        widths = [row.shape[2:] for row in rows]
        sent = torch.cat([row.flatten(2) for row in rows], dim=2).transpose(0, 1)
        received = _Exchange.apply(sent, self.group).transpose(0, 1).flatten(0, 1)
        parts = received.split([width.numel() for width in widths], dim=1)
        return [part.unflatten(1, width) for part, width in zip(parts, widths, strict=True)]

    def heads_to_tokens(self, tensor: Tensor) -> Tensor:
        """[at most held x ranks, h, E] -> [held, h x ranks, E]; tokens beyond the last get zeros."""
        beyond = -len(tensor) % self.count
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, beyond))
        sent = padded.unflatten(0, (-1, self.count)).transpose(0, 1)
        received: Tensor = _Exchange.apply(sent, self.group)
        return received.transpose(0, 1).flatten(1, 2)

    def of_heads(self, values: Tensor) -> Tensor:
        """[H] -> the values of this rank's heads."""
        return values.unflatten(0, (self.count, -1))[self.rank]

    def _split(self, tensor: Tensor) -> Tensor:
        """[n, H, D] -> [n, ranks, H / ranks, D]; with fewer heads than ranks, neighbouring ranks get the same head."""
        heads = tensor.shape[1]
        if heads < self.count and self.count % heads == 0:
            tensor = tensor.repeat_interleave(self.count // heads, dim=1)
        elif heads % self.count:
            raise ValueError(f"{heads} attention heads cannot be shared by {self.count} ranks")
        return tensor.unflatten(1, (self.count, -1))


class _Exchange(torch.autograd.Function):
    """Send row i of [ranks, ...] to rank i; this is its own inverse, also for gradients."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        ctx.group = group
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.group), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, count: int, group: Any) -> Tensor:
        ctx.save_for_backward(places)
        joined = values.new_zeros(count)
        joined[places] = values
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grads[0][places], None, None, None
