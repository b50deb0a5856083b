"""Converts POLAR checkpoints (`InternLM2ForRewardModel`) to `LlamaForSequenceClassification` and back, exactly.

Only names differ, and InternLM2 fuses queries, keys and values per key-value head. The code in a released folder is
not run, because it gives wrong scores under transformers 5. At most one shard is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.polar.backends import RELEASED_ARCHITECTURE, DiscriminatorError
from rewards.polar.serialise import MARKER, SEPARATOR

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


SHARD_BYTES = 4 * 2**30
PICKLED = ("pytorch_model*.bin", "model*.bin")


class WeightReader:
    """Tensors of a folder by name, from safetensors or from pickles; the pickles' code is not run."""

    def __init__(self, folder: Path) -> None:
        """Raise DiscriminatorError if the folder has no weights or has a name twice."""
        from safetensors import SafetensorError, safe_open

        self._file_of: dict[str, Path] = {}
        self._opened: tuple[Path, Any] | None = None
        files = sorted(folder.glob("*.safetensors")) or sorted({f for p in PICKLED for f in folder.glob(p)})
        if not files:
            raise DiscriminatorError(f"{folder} holds no weights (*.safetensors, or pytorch_model*.bin)")
        for file in files:
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, "pt") as tensors:
                        names = list(tensors.keys())
                except SafetensorError as error:
                    raise DiscriminatorError(f"{file} cannot be read; is it complete? {error}") from error
            else:
                names = list(self._unpickled(file))
            for name in names:
                if name in self._file_of:
                    raise DiscriminatorError(f"{folder}: {name} is in {self._file_of[name].name} and in {file.name}")
                self._file_of[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        """Raise DiscriminatorError if there is no such tensor."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise DiscriminatorError(f"the weights have no {name}")
        file = self._file_of[name]
        tensor: Tensor
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                tensor = tensors.get_tensor(name)
        else:
            tensor = self._unpickled(file)[name]
        return tensor

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        import pickle

        import torch

        if self._opened is None or self._opened[0] != file:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError) as error:
                raise DiscriminatorError(
                    f"{file} cannot be loaded as plain tensors, and is not loaded any other way: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            self._opened = (file, loaded)
        tensors: dict[str, Tensor] = self._opened[1]
        return tensors


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors under transformers' file names: one file, or shards with an index."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    held, total = 0, 0

    def flush() -> None:
        nonlocal pending, held
        shards.append(list(pending))
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        pending, held = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > shard_bytes:
            flush()
        pending[name] = tensor.contiguous().clone()  # safetensors cannot save views of a larger tensor
        held += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "shard-1.safetensors").rename(folder / "model.safetensors")
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files, 1):
        (folder / f"shard-{number}.safetensors").rename(folder / file)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


RENAMED = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "v_head.weight": "score.weight",
}
RENAMED_IN_LAYER = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
"""InternLM2's name -> Llama's."""
FUSED = "attention.wqkv.weight"
SPLIT = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
COMPUTED = "rotary_emb.inv_freq"
"""A buffer that some files contain, although the configuration determines it."""
LAYER = re.compile(r"(model\.layers\.(?P<number>\d+)\.)(?P<rest>.+)")
_NAMED = 5
SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert config.json. Raise DiscriminatorError for what Llama cannot express."""
    if config.get("architectures") != [RELEASED_ARCHITECTURE]:
        raise DiscriminatorError(f"config.json names {config.get('architectures')}, not {RELEASED_ARCHITECTURE}")
    if config.get("bias"):
        raise DiscriminatorError("config.json has bias=true; only models without biases can be converted")
    if config.get("hidden_act", "silu") != "silu":
        raise DiscriminatorError(f"config.json has hidden_act={config['hidden_act']}; only silu can be converted")
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling.get("type", scaling.get("rope_type")) != "dynamic":
        # Dynamic scaling starts beyond max_position_embeddings, which no input reaches.
        raise DiscriminatorError(f"config.json has rope_scaling={scaling}; only none and dynamic can be converted")
    missing = [name for name in SAME_FIELDS if name not in config and name != "initializer_range"]
    if missing:
        raise DiscriminatorError(f"config.json lacks {', '.join(missing)}")
    return {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        **{name: config[name] for name in SAME_FIELDS if name in config},
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",  # makes vLLM's classify return the raw score
        "dtype": config.get("torch_dtype", config.get("dtype", "float16")),
    }


def to_llama(weights: WeightReader, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield InternLM2's tensors under Llama's names. Raise DiscriminatorError for a missing or unknown tensor."""
    _check_complete(weights, config, [*RENAMED], [*RENAMED_IN_LAYER, FUSED])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name in weights.names:
        prefix, rest = _layer(name)
        if name in RENAMED:
            yield RENAMED[name], weights[name]
        elif rest in RENAMED_IN_LAYER:
            yield prefix + RENAMED_IN_LAYER[rest], weights[name]
        elif rest == FUSED:
            parts = split_wqkv(weights[name], heads, kv_heads)
            yield from ((prefix + part, tensor) for part, tensor in zip(SPLIT, parts, strict=True))
        elif not name.endswith(COMPUTED):
            raise DiscriminatorError(f"{name} is not a tensor of an {RELEASED_ARCHITECTURE}")


def from_llama(weights: WeightReader, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    _check_complete(weights, config, [*RENAMED.values()], [*RENAMED_IN_LAYER.values(), *SPLIT])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    top = {new: old for old, new in RENAMED.items()}
    layer = {new: old for old, new in RENAMED_IN_LAYER.items()}
    for name in weights.names:
        prefix, rest = _layer(name)
        if name in top:
            yield top[name], weights[name]
        elif rest in layer:
            yield prefix + layer[rest], weights[name]
        elif rest == SPLIT[0]:
            query, key, value = (weights[prefix + part] for part in SPLIT)
            yield prefix + FUSED, join_wqkv(query, key, value, heads, kv_heads)
        elif rest not in SPLIT:
            raise DiscriminatorError(f"{name} has no counterpart in an {RELEASED_ARCHITECTURE}")


def _check_complete(
    weights: WeightReader, config: Mapping[str, Any], top: Sequence[str], in_layer: Sequence[str]
) -> None:
    layers = config["num_hidden_layers"]
    expected = [*top, *(f"model.layers.{i}.{name}" for i in range(layers) for name in in_layer)]
    missing = sorted(set(expected) - set(weights.names))
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise DiscriminatorError(f"the weights lack {', '.join(missing[:_NAMED])}{more}: is the folder complete?")
    beyond = sorted(
        name for name in weights.names if (match := LAYER.fullmatch(name)) and int(match["number"]) >= layers
    )
    if beyond:
        raise DiscriminatorError(f"{beyond[0]} is beyond the {layers} layers in config.json")


def split_wqkv(fused: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split InternLM2's fused matrix, which holds the queries, key and value of each key-value head."""
    queries = heads // kv_heads
    hidden = fused.shape[1]
    grouped = fused.view(kv_heads, queries + 2, -1, hidden)
    return (
        grouped[:, :queries].reshape(-1, hidden),
        grouped[:, queries].reshape(-1, hidden),
        grouped[:, queries + 1].reshape(-1, hidden),
    )


def join_wqkv(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int) -> Tensor:
    import torch

    queries = heads // kv_heads
    hidden = query.shape[1]
    parts = [
        query.view(kv_heads, queries, -1, hidden),
        key.view(kv_heads, 1, -1, hidden),
        value.view(kv_heads, 1, -1, hidden),
    ]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def _layer(name: str) -> tuple[str, str]:
    match = LAYER.fullmatch(name)
    return (match[1], match["rest"]) if match else ("", "")


SPACE = "▁"
BPE_MODEL = 2
CONTROL, USER_DEFINED = 3, 4
"""Types of pieces in a SentencePiece model."""


def released_tokenizer(folder: Path, reward_token_id: int | None) -> PreTrainedTokenizerFast:
    """Return the folder's tokenizer as a plain fast one. Raise DiscriminatorError if that fails or lacks a marker."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings: dict[str, Any] = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").is_file():
        backend = from_sentencepiece(folder / "tokenizer.model", settings.get("added_tokens_decoder", {}))
        _add_bos_and_eos(backend, settings)
    else:
        raise DiscriminatorError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: _text(settings.get(name, default)) for name, default in _SPECIAL.items()},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    for marker in (SEPARATOR, MARKER):
        ids = tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) != 1:
            raise DiscriminatorError(f"{folder}: the tokenizer splits {marker} into {len(ids)} tokens")
        if marker == MARKER and reward_token_id is not None and ids[0] != reward_token_id:
            raise DiscriminatorError(f"{folder}: {MARKER} is token {ids[0]}, but config.json names {reward_token_id}")
    return tokenizer


_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def from_sentencepiece(file: Path, added: dict[str, Any]) -> Any:
    """Return a byte-fallback BPE `tokenizers.Tokenizer`.

    `added` (id -> token) renames pieces: `<|reward|>` reuses the slot of an older one. Raise DiscriminatorError for any
    other kind of SentencePiece model.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    if proto.trainer_spec.model_type != BPE_MODEL:
        raise DiscriminatorError(f"{file} is not a BPE model")
    names = {int(index): token for index, token in added.items()}
    pieces = [names[i]["content"] if i in names else piece.piece for i, piece in enumerate(proto.pieces)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise DiscriminatorError(f"{file}: added_tokens_decoder gives two pieces the same name")
    whole = {i for i, piece in enumerate(proto.pieces) if piece.type in (CONTROL, USER_DEFINED)} | set(names)
    scores = {piece: proto.pieces[i].score for i, piece in enumerate(pieces)}
    merges = generate_merges(ids, scores, skip_tokens={pieces[i] for i in whole})
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    for i in sorted(whole):
        special = names[i].get("special", True) if i in names else proto.pieces[i].type == CONTROL
        token = AddedToken(pieces[i], normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    prefixed = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if prefixed else [spaces])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*decoding, decoders.Strip(content=" ", left=1)] if prefixed else decoding  # removes the prepended space
    )
    return tokenizer


def _add_bos_and_eos(tokenizer: Any, settings: dict[str, Any]) -> None:
    from tokenizers import processors

    before = [_text(settings.get("bos_token", "<s>"))] if settings.get("add_bos_token", True) else []
    after = [_text(settings.get("eos_token", "</s>"))] if settings.get("add_eos_token", False) else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*before, *after)],
    )


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DiscriminatorError(f"{file} is not JSON: {error}") from error
    return values
