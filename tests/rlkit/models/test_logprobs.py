"""Chunked log-probs and entropies equal autograd through the whole block of logits."""

from __future__ import annotations

import pytest
import torch

from rlkit.models.logprobs import LogProbLinear, selected_logprobs


def block(hidden, weight, bias, targets, temperature, scale, softcap):
    logits = (hidden @ weight.T + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, dim=1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


@pytest.mark.parametrize("elements", [1, 14, 10_000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_equal_those_of_the_whole_block(elements, scale, softcap, with_entropy):
    torch.manual_seed(1)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])

    def loss(values):
        logprobs, entropy = values
        total = (logprobs * torch.tensor([1, 2, 0, 4, 5])).sum()
        return total + (entropy * torch.tensor([5, 4, 0, 2, 1])).sum() if with_entropy else total

    ours = selected_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=1.3,
        scale=scale,
        softcap=softcap,
        elements_per_chunk=elements,
    )
    expected = block(hidden, weight, bias, targets, 1.3, scale, softcap)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(loss(ours), (hidden, weight, bias))
    expected = torch.autograd.grad(loss(expected), (hidden, weight, bias))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # ours are computed in fp32


def test_head_scales_and_caps_log_probs_but_not_its_own_logits():
    torch.manual_seed(2)
    head = torch.nn.Linear(8, 20)
    hidden, targets = torch.randn(6, 8), torch.randint(20, (6,))
    plain = head(hidden)
    head.__class__ = LogProbLinear
    head.scale, head.softcap = 0.5, 0.8
    logprobs, entropy = head(hidden, targets, temperature=0.7)
    expected = block(hidden, head.weight, head.bias, targets, 0.7, 0.5, 0.8)
    torch.testing.assert_close(logprobs, expected[0])
    torch.testing.assert_close(entropy, expected[1])
    assert torch.equal(head(hidden), plain)


def test_logits_are_never_one_block(monkeypatch):
    rows = []
    real = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, **k: rows.append(len(x)) or real(x, **k))
    hidden, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    logprobs, _ = selected_logprobs(hidden, weight, torch.zeros(1000, dtype=torch.int64), elements_per_chunk=6400)
    logprobs.sum().backward()
    assert max(rows) == 100
    assert sum(rows) == 2000  # once forward, once backward


def test_rows_without_a_gradient_are_not_computed_again(monkeypatch):
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    logprobs, entropy = selected_logprobs(hidden, weight, torch.arange(10))
    rows = []
    real = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, **k: rows.append(len(x)) or real(x, **k))
    mask = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0, 0, 0])
    (logprobs * mask).sum().backward(retain_graph=True)
    assert rows == [3]
    assert hidden.grad[mask == 0].eq(0).all()
    assert hidden.grad[mask == 1].ne(0).any(dim=1).all()
    ((logprobs * mask).sum() + (entropy * mask.roll(1)).sum()).backward()
    assert rows == [3, 6]


def test_a_loss_without_any_gradient_has_zero_gradients():
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    logprobs, _ = selected_logprobs(hidden, weight, torch.arange(10))
    gradients = torch.autograd.grad((logprobs * 0).sum(), (hidden, weight))
    assert not any(gradient.any() for gradient in gradients)


def test_half_precision_sums_the_weight_gradient_in_fp32():
    """With a chunk per row, bf16 sums would lose what is smaller than 2^-8 of the total."""
    torch.manual_seed(3)
    hidden = torch.randn(400, 16).bfloat16().requires_grad_()
    weight = torch.randn(30, 16).bfloat16().requires_grad_()
    targets = torch.randint(30, (400,))
    logprobs, _ = selected_logprobs(hidden, weight, targets, elements_per_chunk=30)
    (ours,) = torch.autograd.grad(logprobs.sum(), weight)
    logits = torch.nn.functional.linear(hidden, weight).float()
    p = torch.nn.functional.one_hot(targets, 30) - torch.softmax(logits, dim=1)
    torch.testing.assert_close(ours, (p.T @ hidden.float()).bfloat16(), atol=0, rtol=2**-7)
