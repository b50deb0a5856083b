"""What the paper's fits say about POLAR pre-training: learning rate, batch size and loss (arXiv 2507.05197, 3.4).

The paper says all quantities are in millions, which gives nonsense (a batch of 78,607). With parameters in millions and
tokens in billions the formulas give what the paper used, within 5 %:

    >>> f"{learning_rate(1800, 2500, 940):.3e}", round(batch_size(1800, 940))
    ('1.397e-05', 2021)

Fitted for 100 to 924 million parameters, batches of 128 to 1024: beyond that they are extrapolations.
"""

from __future__ import annotations


def learning_rate(parameters_millions: float, language_tokens_billions: float, reward_tokens_billions: float) -> float:
    """Peak learning rate of reward pre-training (not rescaled with the batch, as the paper's own runs).

    `language_tokens_billions`: what the language model that it starts from was trained on.
    """
    rate = 0.0002306 * parameters_millions**0.01125
    return float(rate * language_tokens_billions**-0.66587 * reward_tokens_billions**0.33916)


def batch_size(parameters_millions: float, reward_tokens_billions: float) -> float:
    """Triplets per optimizer step of reward pre-training."""
    return float(31.9032 * parameters_millions**0.06944 * reward_tokens_billions**0.52997)


def loss_by_parameters(parameters: float) -> float:
    """Validation loss that a model of so many parameters reaches."""
    return float(0.9 * parameters**-0.0425)


def loss_by_compute(flops: float) -> float:
    """Validation loss that so many floating-point operations reach (the paper's axis names another unit)."""
    return float(2.4 * flops**-0.0342)
