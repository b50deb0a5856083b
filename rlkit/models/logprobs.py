"""Log-probs of given tokens and the entropy of their distribution, without a rows x vocabulary block.

With logits z = h W^T / temperature, p = softmax(z), H = -sum p log p:
    d logp_y / d z = onehot(y) - p          d H / d z = -p * (log p + H)
The backward pass recomputes each chunk of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(hidden.shape[0], chunk):
            logp = _log_softmax(hidden[rows], weight, bias, temperature)
            logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -(logp.exp() * logp).sum(dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # a loss without an entropy term then skips that part of the backward pass
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad_hidden = torch.empty_like(hidden)
        # The weight's gradient sums over all chunks: accumulate it in fp32 whatever the compute type.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            logp = _log_softmax(hidden[rows], weight, bias, ctx.temperature)
            p = logp.exp()
            grad = p * -grad_logprobs[rows, None]
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            if grad_entropy is not None:
                grad -= grad_entropy[rows, None] * p * (logp + entropy[rows, None])
            grad = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += (grad.T @ hidden[rows]).float()
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0).float()
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=1)


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    elements_per_chunk: int = 2**24,
) -> tuple[Tensor, Tensor]:
    """hidden [R, D], weight [V, D], targets [R] -> log-probs [R] and entropies [R], fp32, differentiable in both."""
    chunk = max(1, elements_per_chunk // weight.shape[0])
    logprobs, entropy = _ChunkedLogProbs.apply(hidden, weight, bias, targets, temperature, chunk)
    return logprobs, entropy


class LogProbLinear(nn.Linear):
    """A language-model head that can return log-probs of given tokens instead of logits.

    An existing head becomes one by `head.__class__ = LogProbLinear`: parameters, names and ties stay, and ZeRO-3's
    hooks still gather the weight around the call.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, targets: Tensor | None = None, temperature: float = 1.0, elements_per_chunk: int = 2**24
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V] without targets; log-probs and entropies [R] with targets [R] and input [R, D]."""
        if targets is None:
            return super().forward(input)
        return selected_logprobs(
            input,
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature,
            elements_per_chunk=elements_per_chunk,
        )
