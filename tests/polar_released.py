"""A folder shaped like a released POLAR checkpoint, with random weights, and InternLM2's forward pass by the book."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

UNUSED = [f"[UNUSED_TOKEN_{n}]" for n in (0, 1, 130)]


def sentencepiece_model(file: Path) -> None:
    """A byte-fallback BPE model with user-defined slots, like InternLM2's."""
    import sentencepiece

    rng = random.Random(0)
    words = ["What", "is", "the", "capital", "of", "China", "Beijing", "Shanghai", "times", "plus", "answer", "42", "7"]
    lines = [" ".join(rng.choices(words, k=8)) + rng.choice(".?!") for _ in range(400)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=UNUSED,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(written.getvalue())


def released_checkpoint(folder: Path, pickled: bool = True, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Write the folder; returns its config.json."""
    import sentencepiece

    folder.mkdir(parents=True)
    sentencepiece_model(folder / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    separator = pieces.piece_to_id("[UNUSED_TOKEN_0]")
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": text, **token} for i, text in enumerate(["<unk>", "<s>", "</s>"])}
    added[str(separator)] = {"content": "<|reward|>", **token}
    settings = {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": added}))
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('remote code must not run')\n")
    config = {
        "architectures": ["InternLM2ForRewardModel"],
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
        "model_type": "internlm2",
        "vocab_size": 448,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "reward_token_id": pieces.piece_to_id("[UNUSED_TOKEN_130]"),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for number, half in enumerate(halves, 1):
        part = {name: tensors[name] for name in half}
        if pickled:
            torch.save(part, folder / f"pytorch_model-{number:05}-of-00002.bin")
        else:
            from safetensors.torch import save_file

            save_file(part, folder / f"model-{number:05}-of-00002.safetensors")
    return config


def random_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """InternLM2's tensors under its own names."""
    torch.manual_seed(3)
    width, inner, heads, kv = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head = width // heads

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape) * 0.12

    tensors = {"model.tok_embeddings.weight": drawn(config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "attention.wqkv": drawn((heads + 2 * kv) * head, width),
            "attention.wo": drawn(width, width),
            "feed_forward.w1": drawn(inner, width),
            "feed_forward.w3": drawn(inner, width),
            "feed_forward.w2": drawn(width, inner),
            "attention_norm": 1 + drawn(width),
            "ffn_norm": 1 + drawn(width),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return tensors | {"model.norm.weight": 1 + drawn(width), "v_head.weight": drawn(1, width)}


def internlm2_score(tensors: dict[str, Tensor], config: dict[str, Any], ids: list[int]) -> float:
    """The score of one sequence, in float64, from the architecture's description; shares no code with the project."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head, length = config["hidden_size"] // heads, len(ids)
    frequencies = config["rope_theta"] ** (-torch.arange(0, head, 2).double() / head)
    angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    def turned(x: Tensor) -> Tensor:
        low, high = x[..., : head // 2], x[..., head // 2 :]
        return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()

    x = weights["model.tok_embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = {name.split(".")[-2]: t for name, t in weights.items() if name.startswith(f"model.layers.{i}.")}
        packed = norm(x, w["attention_norm"]) @ w["wqkv"].T
        packed = packed.view(length, kv, heads // kv + 2, head)
        mixed = []
        for group in range(kv):
            key, value = turned(packed[:, group, -2]), packed[:, group, -1]
            for j in range(heads // kv):
                scores = turned(packed[:, group, j]) @ key.T / math.sqrt(head)
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
                mixed.append(scores.softmax(-1) @ value)
        x = x + torch.cat(mixed, -1) @ w["wo"].T
        y = norm(x, w["ffn_norm"])
        x = x + (silu(y @ w["w1"].T) * (y @ w["w3"].T)) @ w["w2"].T
    return float(norm(x, weights["model.norm.weight"])[-1] @ weights["v_head.weight"][0])
