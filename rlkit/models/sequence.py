"""One packed batch over several ranks: Ulysses' sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509).

Of s ranks, rank r holds the packed tokens r, r + s, r + 2 s, ... in all layers. Only attention sees several tokens:
before it ranks exchange tokens for heads, so that each has 1/s of the heads for all tokens, and afterwards they change
back. What attends to what is the whole batch's, a shared prefix included. Each rank has the logits of its own tokens.
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
    """Those that compute one batch together. All of them call every method alike."""

    group: Any
    """torch's process group."""
    rank: int
    count: int

    def held(self, tokens: int) -> int:
        """Of that many packed tokens every rank holds as many; what is beyond the last attends to nothing."""
        return -(-tokens // self.count)

    def share(self, rows: Tensor) -> Tensor:
        """[T] -> this rank's [held]; the last one is repeated where there is none."""
        places = torch.arange(self.held(len(rows)), device=rows.device) * self.count + self.rank
        return rows[places.clamp(max=len(rows) - 1)]

    def mine(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of packed indices [N] those that this rank holds: their places [n] in `tokens`, and among its own tokens."""
        places = (tokens % self.count == self.rank).nonzero()[:, 0]
        return places, tokens[places] // self.count

    def joined(self, values: Tensor, places: Tensor, count: int) -> Tensor:
        """[n] of each rank, at its `places`, -> [count] on all of them.

        Every rank goes on to the same loss and takes the gradient of its own values back, so gradients of parameters
        add up over the ranks.
        """
        joined: Tensor = _Joined.apply(values, places, count, self.group)
        return joined

    def tokens_to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[held, H, D] each -> [held x ranks, H / ranks, D], in packed order. One exchange for all."""
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
        """[H] -> those of this rank's heads."""
        return values.unflatten(0, (self.count, -1))[self.rank]

    def _split(self, tensor: Tensor) -> Tensor:
        """[n, H, D] -> [n, ranks, H / ranks, D]; where there are fewer heads than ranks, neighbours get the same."""
        heads = tensor.shape[1]
        if heads < self.count and self.count % heads == 0:
            tensor = tensor.repeat_interleave(self.count // heads, dim=1)
        elif heads % self.count:
            raise ValueError(f"{heads} attention heads cannot be shared by {self.count} ranks")
        return tensor.unflatten(1, (self.count, -1))


class _Exchange(torch.autograd.Function):
    """[ranks, ...]: row i goes to rank i; its own inverse, also for gradients."""

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
