"""A random discriminator with its tokenizer, made in a second: `tiny_discriminator(folder)`."""

from __future__ import annotations

from pathlib import Path

TEXTS = ["What is 6 times 7? 6 * 7 = 42\n#### 42", "What is the capital of China? Beijing. Shanghai. <think> </think>"]


def char_tokenizer(bos: bool = True, specials: tuple[str, ...] = ("<|im_end|>",)):  # type: ignore[no-untyped-def]
    """One token per character, the two markers and `specials` as special tokens, a BOS where asked."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|reward|>", "[UNUSED_TOKEN_130]", *specials]
    characters = [chr(code) for code in (10, *range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *characters])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|reward|>", "[UNUSED_TOKEN_130]", *specials],
        clean_up_tokenization_spaces=False,
    )


def tiny_discriminator(folder: Path, seed: int = 0, max_positions: int = 512, labels: int = 1) -> Path:
    """A random 2-layer LlamaForSequenceClassification whose scores spread over several units."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = char_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        num_labels=labels,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
