"""Log-probs of given tokens and the entropy of their distribution, without a full rows x vocabulary block.

With z = cap(scale * (h W^T + b)) / temperature, cap(x) = softcap * tanh(x / softcap), p = softmax(z), H = -sum p log p:
    d logp_y / d z = onehot(y) - p     d H / d z = -p * (log p + H)     d cap(x) / d x = 1 - (cap(x) / softcap)^2
The backward pass recomputes each chunk of logits, for rows with a gradient. In half precision, logits are
rounded once, as in vLLM; softmax and all sums are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ELEMENTS_PER_CHUNK = 2**25
"""Logits held at a time: 220 rows for a vocabulary of 152k. With fewer rows the head's weight is reread too often."""
WEIGHT_ROWS_PER_BLOCK = 2**14
"""Rows of the weight's gradient per block, where a product cannot be added in place."""


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(hidden.shape[0], chunk):
            logits = _logits(hidden[rows], weight, bias, scale, softcap)
            logp = torch.log_softmax(logits.div_(temperature), dim=1)
            del logits
            logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -logp.exp().mul_(logp).sum(dim=1)
            del logp  # freed before the next chunk
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.temperature, ctx.scale, ctx.softcap, ctx.chunk = temperature, scale, softcap, chunk
        ctx.set_materialize_grads(False)  # so that a loss without an entropy term skips that part of the backward pass
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad_hidden = torch.zeros_like(hidden)
        # Sums over rows are fp32 whatever the compute dtype, across all chunks. A frozen head (LoRA) has none.
        weight_trains = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if weight_trains else None
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        trained = grad_logprobs != 0 if grad_entropy is None else (grad_logprobs != 0) | (grad_entropy != 0)
        for rows in trained.nonzero()[:, 0].split(ctx.chunk):
            rows_hidden = hidden[rows]
            logits = _logits(rows_hidden, weight, bias, ctx.scale, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            logp = torch.log_softmax(logits.div_(ctx.temperature), dim=1)
            del logits
            p = logp.exp_() if grad_entropy is None else logp.exp()
            grad = p.mul_(-grad_logprobs[rows, None]) if grad_entropy is None else p * -grad_logprobs[rows, None]
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            if grad_entropy is not None:
                grad -= p.mul_(grad_entropy[rows, None]).mul_(logp.add_(entropy[rows, None]))
            del p, logp
            if slope is not None:
                grad *= slope
            if ctx.scale != 1.0:
                grad *= ctx.scale
            if ctx.temperature != 1.0:
                grad /= ctx.temperature
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            if grad_weight is not None:
                _add_product(grad_weight, grad, rows_hidden)
            grad_hidden[rows] = grad.to(hidden.dtype) @ weight
            del grad, slope  # freed before the next chunk
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            *(None,) * 5,
        )


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits [R, V], fp32, before the temperature."""
    logits = nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """Compute total [V, D] += grad [R, V]^T hidden [R, D], with fp32 sums and no second [V, D] block."""
    if not (hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)):
        total.addmm_(grad.T, hidden.float())
        return
    grad = grad.to(hidden.dtype)  # to use tensor cores
    for rows in _chunks(len(total), WEIGHT_ROWS_PER_BLOCK):
        total[rows] += torch.mm(grad[:, rows].T, hidden, out_dtype=torch.float32)


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    elements_per_chunk: int = ELEMENTS_PER_CHUNK,
) -> tuple[Tensor, Tensor]:
    """hidden [R, D], weight [V, D], targets [R] -> log-probs [R] and entropies [R], fp32, differentiable in both.

    Logits are multiplied by `scale`, then capped to (-softcap, softcap), then divided by `temperature`.
    """
    chunk = max(1, elements_per_chunk // weight.shape[0])
    logprobs, entropy = _ChunkedLogProbs.apply(hidden, weight, bias, targets, temperature, scale, softcap, chunk)
    return logprobs, entropy


class LogProbLinear(nn.Linear):
    """A language-model head that can return log-probs of given tokens instead of logits.

    Set `head.__class__ = LogProbLinear` to convert an existing head: it keeps its parameters, names and ties, and
    ZeRO-3's hooks still gather the weight around the call.
    """

    scale: float = 1.0
    """Factor of the logits behind log-probs, which the model applies after the head (Cohere, Granite: 1 / divisor)."""
    softcap: float | None = None
    """Final soft cap of the logits behind log-probs (Gemma 2)."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        elements_per_chunk: int = ELEMENTS_PER_CHUNK,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the head's own logits [..., V] without targets; log-probs and entropies [R] for targets [R] and input
        [R, D].

        `scale` and `softcap` apply only to the latter: a model applies its own to the former.
        """
        if targets is None:
            return super().forward(input)
        return selected_logprobs(
            input,
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature,
            scale=self.scale,
            softcap=self.softcap,
            elements_per_chunk=elements_per_chunk,
        )
