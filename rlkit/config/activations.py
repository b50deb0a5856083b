"""Predicted memory of the activations that a micro-batch keeps for its backward pass, on one rank."""

from __future__ import annotations

from rlkit.config.schema import LearnerConfig
from rlkit.models.folder import ModelShape

Parts = dict[str, float]
"""What the bytes hold -> how many."""
MALLOC_KEEPS = 32 * 2**20
"""glibc gives larger blocks their own mapping (DEFAULT_MMAP_THRESHOLD_MAX) and returns them when they are freed."""
LAYERS_UNDER_WAY = 2
"""Number of layers whose inputs are on the GPU while those of the others are in host memory."""


def held_tokens(section: LearnerConfig) -> int:
    """Return one rank's tokens of a micro-batch, which ranks that share sequences divide among them."""
    return -(-section.tokens_per_microbatch // section.sequence_parallel)


def activations(shape: ModelShape, section: LearnerConfig, width: int) -> Parts:
    """Return the bytes saved for the backward pass: the tensors of Llama-like layers, per token.

    Both norms save their input in fp32 (with fp32 this is the residual stream itself), the normalised and the scaled
    state; attention saves its inputs and its output; the MLP saves the inputs of its four products. Ranks that share
    sequences hold three copies of what they exchange.
    """
    tokens, together = held_tokens(section), section.sequence_parallel
    queries, keys = shape.heads * shape.head_dim, max(shape.kv_heads, together if together > 1 else 0) * shape.head_dim
    norms = 2 * shape.hidden * (4 + 2 * width)
    attention = width * (2 * queries + 2 * max(keys, queries if width == 4 else keys) + queries)
    layer = tokens * (norms + attention + 4 * width * shape.intermediate)
    exchanged: Parts = {"exchange of heads": 3.0 * tokens * width * (queries + 2 * keys)} if together > 1 else {}
    if not section.gradient_checkpointing:
        return {"activations": layer * shape.layers, **exchanged}
    inputs = layer_inputs(shape, section, width)
    if section.offload_activations:
        inputs *= min(1, LAYERS_UNDER_WAY / shape.layers)
    gradients = tokens * width * (2 * shape.intermediate + 2 * shape.hidden)
    return {"activations": inputs + layer + gradients, **exchanged}


def layer_inputs(shape: ModelShape, section: LearnerConfig, width: int) -> float:
    """Return the bytes that gradient checkpointing keeps: the layers' inputs."""
    return float(held_tokens(section) * width * shape.hidden * shape.layers)


def head(shape: ModelShape, section: LearnerConfig) -> Parts:
    """Chunks of fp32 logits, and the head's gradient with the product of one chunk (`rlkit/models/logprobs.py`)."""
    weight = shape.vocabulary * shape.hidden if shape.adapter is None else 0
    elements = min(section.logit_elements_per_chunk, shape.vocabulary * held_tokens(section))
    return {"logits": 5.0 * 4 * elements, "gradient of the head": weight * (4.0 + 4)}


def kept(shape: ModelShape, section: LearnerConfig) -> float:
    """Bytes that malloc keeps after an update on a CPU: activations and gradients in blocks below `MALLOC_KEEPS`."""
    widest = 4 * held_tokens(section) * max(shape.intermediate, shape.hidden)
    ends = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    layers = shape.whole - ends if shape.adapter is None else shape.trained
    block = 4 * shape.hidden * max(shape.intermediate, shape.hidden)
    passing = activations(shape, section, 4)["activations"] if widest < MALLOC_KEEPS else 0.0
    return passing + (4 * layers if block < MALLOC_KEEPS else 0.0)
