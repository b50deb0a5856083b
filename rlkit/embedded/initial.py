"""Untrained models of the embedded size, saved as plain Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 128, 3, 4, 256
"""Heads of 32: vLLM's CPU attention takes no smaller ones."""
INITIALIZER_RANGE = 0.07
"""About hidden ** -0.5. The usual 0.02 suits wide models; a narrow one takes twice as many steps from there."""


def model_config(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    """A Llama configuration; `model_type: llama` keeps transformers from replacing the tokenizer."""
    from transformers import LlamaConfig

    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": tokenizer.model_max_length,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**(shape | changes))


def save_untrained_policy(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, **changes: Any) -> None:
    """A language model with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(model_config(tokenizer, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_untrained_scorer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, body: Path | None = None, **changes: Any
) -> None:
    """A one-label classifier with a zero head (so that its first pair loss is ln 2), and its tokenizer.

    `body` is a language model of the same shape whose decoder it starts from; without one it starts at random.
    """
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = model_config(tokenizer, num_labels=1, problem_type="regression", tie_word_embeddings=False, **changes)
    model = LlamaForSequenceClassification(config)
    if body is not None:
        model.model.load_state_dict(LlamaForCausalLM.from_pretrained(body).model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
