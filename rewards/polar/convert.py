"""`python -m rewards.polar.convert SOURCE TARGET [like=RELEASED] [weights=true|false]`: exact conversion of POLAR.

A released checkpoint (`InternLM2ForRewardModel`, e.g. POLAR-7B) becomes a `LlamaForSequenceClassification` that
transformers, vLLM and `reward=polar` load without remote code. The reverse takes configuration, tokenizer and code from
`like=RELEASED`. `weights=false` converts only configuration and tokenizer, which is enough for
`reward.backend=http_...`. Weights stay bit-identical. No code is run; pickles are read as plain tensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.polar.backends import RELEASED_ARCHITECTURE, DiscriminatorError, read_config
from rewards.polar.internlm2 import (
    WeightReader,
    from_llama,
    llama_config,
    released_tokenizer,
    to_llama,
    write_weights,
)
from rlkit.config.command import asks_for_help, exit_code, print_error

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 for success, 1 if the folder cannot be converted, 2 for wrong arguments."""
    return exit_code(_convert, arguments)


def _convert(words: list[str]) -> int:
    if asks_for_help(words):
        print(__doc__)
        return 0
    folders = [word for word in words if "=" not in word]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = sorted(set(options) - {"like", "weights"})
    if len(folders) != 2 or unknown or options.get("weights", "true") not in ("true", "false"):
        cause = f"unknown: {', '.join(unknown)}; " if unknown else ""
        print(f"rlkit: {cause}usage: {(__doc__ or '').partition('`:')[0].strip('`')}", file=sys.stderr)
        return USAGE_ERROR
    try:
        convert(
            Path(folders[0]).expanduser(),
            Path(folders[1]).expanduser(),
            Path(options["like"]).expanduser() if "like" in options else None,
            weights=options.get("weights", "true") == "true",
        )
    except OSError as error:
        return print_error(error)
    return 0


def convert(source: Path, target: Path, like: Path | None = None, *, weights: bool = True) -> None:
    """Convert a folder; its architecture determines the direction. A failure leaves `target` empty.

    Raise DiscriminatorError.
    """
    config = read_config(source)
    if target.exists() and any(target.iterdir()):
        raise DiscriminatorError(f"{target} is not empty; name a new or empty folder")
    released = config.get("architectures") == [RELEASED_ARCHITECTURE]
    if released and like is not None:
        raise DiscriminatorError(f"like= has no effect: {source} is already a released checkpoint")
    if not released and like is None:
        architecture = (config.get("architectures") or ["(none)"])[0]
        raise DiscriminatorError(
            f"{source} holds a {architecture}, not a {RELEASED_ARCHITECTURE}; to export a converted model, name the "
            "released folder that it came from: like=RELEASED"
        )
    target.mkdir(parents=True, exist_ok=True)
    try:
        if like is None:
            _import(source, target, config, weights)
        else:
            _export(source, target, config, like, weights)
    except BaseException:  # also on an interrupt: partial output must not look like a model or block a retry
        for written in target.iterdir():  # empty before
            shutil.rmtree(written) if written.is_dir() else written.unlink()
        raise
    print(f"wrote {target}")


def _import(source: Path, target: Path, config: Mapping[str, Any], weights: bool) -> None:
    converted = llama_config(config)
    tokenizer = released_tokenizer(source, config.get("reward_token_id"))
    (target / "config.json").write_text(json.dumps(converted, indent=2) + "\n")
    tokenizer.save_pretrained(target)
    if weights:
        write_weights(to_llama(WeightReader(source), config), target)


def _export(source: Path, target: Path, config: Mapping[str, Any], like: Path, weights: bool) -> None:
    released = read_config(like)
    expected = llama_config(released)
    shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    different = [name for name in shape if config.get(name) != expected[name]]
    if different:
        raise DiscriminatorError(f"{source} and {like} differ in {', '.join(different)}")
    for file in sorted(like.iterdir()):
        if file.is_file() and not file.match("*.safetensors") and not file.match("*.bin") and "index" not in file.name:
            shutil.copyfile(file, target / file.name)
    saved_as = config.get("dtype", config.get("torch_dtype", "float16"))
    (target / "config.json").write_text(json.dumps({**released, "torch_dtype": saved_as}, indent=2) + "\n")
    if weights:
        write_weights(from_llama(WeightReader(source), config), target)


if __name__ == "__main__":
    sys.exit(main())
