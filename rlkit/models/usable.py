"""What can be known about a policy's folder before loading anything: from config.json and the headers of its files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ARCHITECTURES = Path(__file__).with_name("architectures.json")
"""By model type: how it runs (packed, rows, refused), and why it is refused. Written by benchmarks/architectures.py."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM 0.32's CPU attention supports (vllm/v1/attention/backends/cpu_attn.py)."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of RoPE that rotate all positions differently once a sequence is longer than the original positions."""


@cache
def architectures() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    return table


def known_run(folder: Path) -> str | None:
    """Look up the folder in the table: packed, rows or refused; None for a model type, or code, that is not in it."""
    config = _config(folder)
    known = architectures().get(str(config.get("model_type")))
    return None if known is None or "auto_map" in config else str(known["run"])


def refusals(
    folder: Path, *, device: str, longest: int, chat_template: bool, trust_remote_code: bool = False
) -> Iterator[str]:
    """Yield the reasons why the folder's model cannot be trained.

    `longest`: tokens of the longest sequence. `chat_template`: whether one is set elsewhere.
    """
    config = _config(folder)
    yield from _architecture(config, trust_remote_code)
    yield from _weights(folder)
    if not chat_template and default_template(folder) is None:
        yield (
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so it is "
            "a base model; name an instruction-tuned one, or a template with model.chat_template=FILE"
        )
    text = config.get("text_config", config)
    size = _head_size(text)
    if device == "cpu" and size is not None and size not in CPU_HEAD_SIZES and "kv_lora_rank" not in text:
        yield (
            f"its attention heads have {size} dimensions, which vLLM on CPU cannot run (it supports "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}); choose another model, or cluster.device=cuda"
        )
    if device == "cpu" and any((text.get(name) or 0) > 1 for name in EXPERTS):
        yield (
            "it is a mixture of experts, and vLLM 0.32 on CPU computes different log-probs once the experts' weights "
            "are reloaded, even the same ones: the first check of weights would end the run; use cluster.device=cuda"
        )
    yield from _positions(text, longest)


def _architecture(config: dict[str, Any], trust_remote_code: bool) -> Iterator[str]:
    names = config.get("architectures") or [""]
    model_type = str(config.get("model_type"))
    if "Classification" in names[0]:
        yield f"config.json says {names[0]}, a classifier, which does not write text; name the language model instead"
    known = architectures().get(model_type, {})
    if not known and not trust_remote_code and not _in_transformers(model_type):
        remedy = (
            "model.trust_remote_code=true runs the code that comes with the model"
            if "auto_map" in config
            else "correct it, or install a version that does"
        )
        yield f"the installed transformers does not know the model type {model_type} of config.json; {remedy}"
    if known.get("run") == "refused" and "auto_map" not in config:
        yield f"model type {model_type} would be trained on wrong numbers ({known['why']}); see docs/models.md"


def _in_transformers(model_type: str) -> bool:
    """Search the source of transformers, because importing it takes seconds."""
    spec = find_spec("transformers")
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or () for file in Path(place, "models", "auto").glob("*.py")]
    return not files or any(f'"{model_type}"' in file.read_text(encoding="utf-8") for file in files)


def _weights(folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            yield (
                f"{folder} lacks {len(missing)} of the {len(named)} weight files in {index.name}, first {missing[0]}; "
                "fetch the model again: hf download resumes"
            )
            return
    elif not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.gguf") for file in folder.glob(pattern))
        yield f"{folder} has no weights as *.safetensors" + (
            f", only {others[0]}; convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            if others
            else "; fetch the model again: hf download resumes"
        )
    for file in files:
        size, needed = file.stat().st_size, _needed_bytes(file)
        if needed is None or size < needed:
            yield f"{file} is truncated ({size:,} bytes of {'?' if needed is None else f'{needed:,}'}); fetch it again"


def _needed_bytes(file: Path) -> int | None:
    """File size according to the header of a safetensors file; None if the header is incomplete."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return None
        length = struct.unpack("<Q", prefix)[0]
        if length > file.stat().st_size:
            return None
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return int(8 + length + max(ends, default=0))


def default_template(folder: Path) -> str | None:
    """Read the chat template of a model's folder from where transformers looks for it; None if there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, list):  # several templates, each with a name
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            if template:
                return str(template)
    return None


def _head_size(text: dict[str, Any]) -> int | None:
    heads = text.get("num_attention_heads") or text.get("n_head")
    hidden = text.get("hidden_size") or text.get("n_embd")
    size = text.get("head_dim") or (hidden // heads if heads and hidden else None)
    return None if size is None else int(size)


def _positions(text: dict[str, Any], longest: int) -> Iterator[str]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    original = original or text.get("max_position_embeddings")
    if kind in LENGTH_DEPENDENT and original and longest > original:
        yield (
            f"its positions ({kind} RoPE) change for all tokens once a sequence is longer than {original}, so a "
            f"packed batch, a single sequence and vLLM disagree; sequences may have {longest} tokens: lower "
            "rollout.max_prompt_tokens or rollout.max_response_tokens"
        )


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
