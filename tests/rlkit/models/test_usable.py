"""A folder that cannot be trained is refused before anything is loaded, with the cause and the remedy."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from rlkit.models.folder import check_model_folder, model_folder
from rlkit.models.usable import architectures, known_run, refusals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("embedded:policy"), tmp_path / "model"))


def refused(folder: Path, **options: Any) -> list[str]:
    return list(refusals(folder, **{"device": "cpu", "longest": 64, "chat_template": False, **options}))


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00\x01")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, r"model\.safetensors is truncated \([\d,]+ bytes of [\d,]+\); fetch it again"),
        (without_header, r"truncated \(2 bytes of \?\)"),
        (without_weights, r"no weights as \*\.safetensors, only pytorch_model\.bin; convert it"),
        (without_shard, r"lacks 1 of the 2 weight files .* model-00002-of-00002\.safetensors"),
        (without_template, r"no chat template.*model\.chat_template=FILE"),
        (configured(architectures=["LlamaForSequenceClassification"]), "a classifier, which does not write text"),
        (configured(head_dim=16), "16 dimensions, which vLLM on CPU cannot run"),
        (configured(num_local_experts=8), "mixture of experts, and vLLM 0.32 on CPU"),
        (configured(model_type="roberta"), r"model type roberta would be trained on wrong numbers \(.*differ by"),
        (configured(model_type="qwen99"), "does not know the model type qwen99 of config.json; correct it"),
        (
            configured(model_type="qwen99", auto_map={"AutoModelForCausalLM": "own.Model"}),
            "does not know the model type qwen99 of config.json; model.trust_remote_code=true runs",
        ),
        (
            configured(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 32}),
            r"longrope RoPE\) change for all tokens once a sequence is longer than 32",
        ),
        (configured(rope_parameters={"rope_type": "dynamic"}, max_position_embeddings=32), "dynamic RoPE"),
    ],
)
def test_what_is_wrong_with_a_folder(folder, change, message):
    assert refused(folder) == []
    change(folder)
    (found,) = refused(folder)
    assert re.search(message, found)


def test_a_type_that_only_its_own_code_knows(folder):
    configured(model_type="qwen99", auto_map={"AutoModelForCausalLM": "own.Model"})(folder)
    assert refused(folder, trust_remote_code=True) == []


def test_what_is_no_fault(folder):
    without_template(folder)
    assert refused(folder, chat_template=True) == []
    configured(head_dim=16)(folder)
    assert refused(folder, chat_template=True, device="cuda") == []


def test_gpt2_names_its_sizes_differently(folder):
    config = {"model_type": "gpt2", "n_head": 4, "n_layer": 3, "n_embd": 128, "n_positions": 256, "vocab_size": 486}
    (folder / "config.json").write_text(json.dumps(config))
    shape = check_model_folder(str(folder))
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.max_positions) == (3, 4, 32, 256)


def test_known_architectures(folder):
    assert known_run(folder) == "packed"
    configured(model_type="qwen3_5_text")(folder)
    assert known_run(folder) == "rows"
    configured(auto_map={"AutoModelForCausalLM": "own.Model"})(folder)
    assert known_run(folder) is None


def test_the_table_has_what_people_train():
    table = architectures()
    assert len(table) >= 60
    exact = (
        "qwen2 qwen3 qwen3_moe qwen3_5_text llama gemma2 gemma3_text gemma4_text mistral ministral "
        "ministral3 phi3 olmo2 olmo3 glm4 granite smollm3 lfm2 deepseek_v3 gpt_oss"
    )
    assert [name for name in exact.split() if table[name]["run"] not in ("packed", "rows")] == []


@pytest.mark.slow
def test_the_table_is_what_the_self_test_says():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import architectures as script

    for result in map(script.judge, script.ROWS):
        run = {"": "refused", "rlkit_packed": "packed"}.get(result.attention, "rows")
        known = architectures()[result.row.model_type]["run"]
        assert run == known or known != "packed", result
