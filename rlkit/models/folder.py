"""Where a model is (a folder, or one of the tiny models in the package), its shape and size, without loading it."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.experience import UserError

EMBEDDED = Path(__file__).parents[1] / "embedded"
PREFIX = "embedded:"
WORKING_FOLDER = "RLKIT_WORKING_FOLDER"
"""Environment variable of a run's actors that names the driver's working folder."""


def enter_working_folder() -> None:
    """In an actor, before it reads a file: resolve relative paths as the driver does, if this machine has its
    folder."""
    folder = os.environ.get(WORKING_FOLDER)
    if folder and Path(folder).is_dir():
        os.chdir(folder)


def model_folder(path: str) -> Path:
    """Return the folder of a model; `embedded:<name>` is a tiny one in the package. Raise ValueError for an unknown
    name."""
    if not path.startswith(PREFIX):
        return Path(path).expanduser().absolute()
    folder = EMBEDDED / path.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(f"{PREFIX}{config.parent.name}" for config in EMBEDDED.glob("*/config.json")))
        raise ValueError(f"there is no embedded model {path!r}; the package has: {known or 'none'}")
    return folder


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ModelFolderError(UserError, ValueError):
    """A folder is not a usable model; the message names what is missing and the remedy."""


@dataclass(frozen=True)
class ModelShape:
    parameters: int | None
    """Number of parameters, from the safetensors headers; None if the weights are in another format."""
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int | None
    hidden: int
    heads: int
    intermediate: int
    """Width of the MLP that a token goes through; in a mixture of experts, over all experts chosen for it."""
    largest: int
    """Elements of the largest tensor: the embedding, or a layer's fused experts."""
    tied: bool
    """Whether the head is the embedding."""
    adapter: int | None = None
    """Parameters of an adapter that is trained instead of the model's own."""

    @property
    def whole(self) -> float:
        """Number of parameters; 0 if it is not known."""
        return float(self.parameters or 0)

    @property
    def trained(self) -> float:
        return self.whole if self.adapter is None else float(self.adapter)

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of the key-value cache for one token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_element

    def shares_heads(self, count: int) -> bool:
        """Whether `count` processes can divide the attention heads between them; key-value heads may also be
        repeated."""
        return self.heads % count == 0 and (self.kv_heads % count == 0 or count % self.kv_heads == 0)


def check_model_folder(path: str) -> ModelShape:
    """Return the shape of the model at `path`. Raises ModelFolderError if it is not a usable model."""
    try:
        folder = model_folder(path).expanduser()
    except ValueError as error:
        raise ModelFolderError(str(error)) from error
    if not folder.is_dir():
        raise ModelFolderError(_no_folder(path, folder))
    file = folder / "config.json"
    if not file.is_file():
        raise ModelFolderError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelFolderError(f"{folder} has no tokenizer ({' or '.join(_TOKENIZERS)}); save it in the same folder")
    try:
        return _shape(json.loads(file.read_text()), folder)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelFolderError(
            f"{file} does not describe a causal language model ({type(error).__name__}: {error})"
        ) from error


def _no_folder(path: str, folder: Path) -> str:
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return f"no such folder; to use a model of the Hub, fetch it first: hf download {path} --local-dir {path}"
    return f"no such folder: {folder.absolute()}"


def _shape(config: dict[str, Any], folder: Path) -> ModelShape:
    text = _usual_names(config.get("text_config", config))
    heads = int(text["num_attention_heads"])
    positions = text.get("max_position_embeddings")
    hidden, vocabulary = int(text["hidden_size"]), int(text["vocab_size"])
    sizes = _tensor_sizes(folder)
    return ModelShape(
        parameters=sum(sizes.values()) if sizes else None,
        layers=int(text["num_hidden_layers"]),
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        vocabulary=vocabulary,
        max_positions=None if positions is None else int(positions),
        hidden=hidden,
        heads=heads,
        intermediate=_intermediate(text, hidden),
        largest=max([*sizes.values(), vocabulary * hidden]),
        tied=bool(text.get("tie_word_embeddings")) if not sizes else not any("lm_head" in name for name in sizes),
    )


_OTHER_NAMES = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}
"""Names used by GPT-2, GPT-J, GPT-Neo, Bloom and MPT: transformers' `attribute_map`."""


def _usual_names(text: dict[str, Any]) -> dict[str, Any]:
    others = {
        usual: text[name]
        for usual, names in _OTHER_NAMES.items()
        for name in names
        if usual not in text and name in text
    }
    return {**others, **text}


def _intermediate(text: dict[str, Any], hidden: int) -> int:
    width = text.get("intermediate_size") or text.get("ffn_dim") or text.get("n_inner") or 4 * hidden
    chosen = text.get("num_experts_per_tok")
    if not chosen:
        return int(width)
    shared = text.get("shared_expert_intermediate_size") or 0
    return int(chosen) * int(text.get("moe_intermediate_size") or width) + int(shared)


def _tensor_sizes(folder: Path) -> dict[str, int]:
    """Number of elements of every tensor; empty if the weights are in another format."""
    return {
        name: math.prod(shape) for file in sorted(folder.glob("*.safetensors")) for name, shape in _tensor_shapes(file)
    }


NOT_LINEAR = ("embed", "wte", "wpe", "lm_head")
"""Parts of the names of matrices that are embeddings or the head."""


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Linear layer -> shape of its weight, for all but the head; empty if the weights are in another format."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for file in sorted(folder.glob("*.safetensors"))
        for name, shape in _tensor_shapes(file)
        if name.endswith(".weight") and len(shape) == 2 and not any(part in name for part in NOT_LINEAR)
    }


def _tensor_shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Read names and shapes from the header: 8 bytes of length, then JSON. Raises ValueError for a truncated file."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if size is None or size > file.stat().st_size:
            raise ValueError(f"{file.name} is truncated")
        header = json.loads(stream.read(size))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, tensor["shape"]
