"""An untrained policy of the embedded size, saved as a plain Hugging Face folder."""

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
