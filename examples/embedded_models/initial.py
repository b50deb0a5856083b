"""Makes byte-level BPE tokenizers for numbers and a few words, and an untrained policy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


VOCABULARY_SIZE = 512
PAD, EOS = "<pad>", "<eos>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
REWARD_SEPARATOR, REWARD_MARKER = "<|reward|>", "[UNUSED_TOKEN_130]"
"""POLAR's marks: between the halves of its input, and at its end, where the score is read."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': this template has system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Puts each role's marker before its text, and `<eos>` after the assistant's. No BOS token, which might be doubled."""

CALL = ("<tool_call>", "</tool_call>")
"""Not special tokens, so that decoded texts keep them for whatever parses the calls."""

AGENT_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' }}{% for tool in tools %}"
    "{{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}){{ '' if loop.last else ' ' }}"
    "{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': this template has system, user, assistant and tool') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>{\"name\": ' + call.function.name | tojson + ', \"arguments\": ' }}"
    "{{ call.function.arguments | tojson }}{{ '}</tool_call>' }}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The same, with a line of tools, tool calls in Hermes' form, and the tools' answers."""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a deterministic tokenizer for any UTF-8 text, with one token per digit."""
    return _trained(texts, [*ROLES, REWARD_SEPARATOR, REWARD_MARKER], CHAT_TEMPLATE, r"\p{N}")


def train_agent_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer with one token for up to two digits and for a call's marks. Texts may be conversations."""
    special = [*ROLES, "<|tool|>"]
    marks = "|".join(map(re.escape, (PAD, EOS, *special, *CALL)))
    pieces = (piece for text in texts for piece in re.split(marks, text))
    tokenizer = _trained(pieces, special, AGENT_TEMPLATE, r"\p{N}{1,2}")
    tokenizer.add_tokens(list(CALL))
    return tokenizer


def _trained(texts: Iterable[str], special: Sequence[str], template: str, number: str) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A word keeps the space before it; other characters form runs.
    pieces = Regex(number + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, *special)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(special),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


HIDDEN, LAYERS, HEADS, FEED_FORWARD = 128, 3, 4, 256
"""Heads have width 32, the smallest in vLLM's CPU attention."""
INITIALIZER_RANGE = 0.07
"""About hidden ** -0.5. The usual 0.02 suits wide models; with it a narrow one takes twice as many steps."""


def model_config(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Any:
    """Return the configuration; `model_type: llama` keeps transformers from replacing the tokenizer."""
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
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(model_config(tokenizer, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
