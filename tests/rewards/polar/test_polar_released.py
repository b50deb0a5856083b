"""Released POLAR checkpoints: exact conversion and export, the tokenizer without remote code, golden values."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentencepiece")

import torch
from polar_released import UNUSED, internlm2_score, random_tensors, released_checkpoint
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.polar import convert as convert_polar
from rewards.polar.backends import DiscriminatorError, check_folder, plain_scores
from rewards.polar.internlm2 import WeightReader, join_wqkv, llama_config, split_wqkv, write_weights
from rewards.polar.reward import PolarReward
from rewards.polar.serialise import Limits, Serialiser
from rlkit.models.forward import ModelLoadError
from rlkit.models.policy import load_scorer

CHINA = ("What is the capital of China?", "Beijing.", "Shanghai.")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("released") / "POLAR-tiny"
    return folder, released_checkpoint(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def converted(released: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "POLAR-tiny-llama"
    assert convert_polar.main([str(released[0]), str(target)]) == 0
    return target


def test_logits_are_those_of_internlm2(released: tuple[Path, dict[str, Any]], converted: Path) -> None:
    _, config = released
    tensors = random_tensors(config)
    sequences = [[1, 5, 300, 301, 77, 9], [1, *range(40, 120)], [1, 9]]
    expected = [internlm2_score(tensors, config, ids) for ids in sequences]
    found = plain_scores(converted, "cpu", "float32", sequences)
    assert found == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 0.2, "the scores must differ for this to prove anything"


def test_a_wrong_order_of_queries_would_be_noticed(released: tuple[Path, dict[str, Any]]) -> None:
    _, config = released
    tensors = random_tensors(config)
    right = internlm2_score(tensors, config, [1, 5, 300, 301, 77, 9])
    name = "model.layers.0.attention.wqkv.weight"
    heads, kv, head = 4, 2, 32
    plain = tensors[name].view(heads + 2 * kv, head, -1)[[0, 1, 4, 6, 2, 3, 5, 7]]  # read as all q, all k, all v
    assert (
        abs(
            internlm2_score({**tensors, name: plain.reshape(tensors[name].shape)}, config, [1, 5, 300, 301, 77, 9])
            - right
        )
        > 1e-2
    )


@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (6, 1), (3, 3)])
def test_splitting_and_joining_are_inverse(heads: int, kv: int) -> None:
    fused = torch.randn((heads + 2 * kv) * 8, 24)
    query, key, value = split_wqkv(fused, heads, kv)
    assert (query.shape, key.shape, value.shape) == ((heads * 8, 24), (kv * 8, 24), (kv * 8, 24))
    assert torch.equal(join_wqkv(query, key, value, heads, kv), fused)


@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "safetensors"])
def test_the_round_trip_is_exact_bit_by_bit(tmp_path: Path, pickled: bool) -> None:
    source, there, back = (tmp_path / name for name in ("released", "llama", "again"))
    config = released_checkpoint(source, pickled)
    assert convert_polar.main([str(source), str(there)]) == 0
    assert json.loads((there / "config.json").read_text())["dtype"] == "float16"
    assert convert_polar.main([str(there), str(back), f"like={source}"]) == 0
    again, original = WeightReader(back), random_tensors(config)
    assert sorted(again.names) == sorted(original)
    for name, tensor in original.items():
        assert again[name].dtype == torch.float16 and torch.equal(again[name], tensor.half()), name
    for file in ("tokenizer.model", "tokenizer_config.json", "modeling_internlm2.py"):
        assert (back / file).read_bytes() == (source / file).read_bytes()
    assert json.loads((back / "config.json").read_text()) == config


def test_the_tokenizer_is_sentencepieces(released: tuple[Path, dict[str, Any]], converted: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    folder, config = released
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=False)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = ["What is the capital of China?", "  two  spaces\n\nand\tlines ", "42 times 7", "数学 😀 é", "", "Beijing."]
    for text in texts:
        assert tokenizer.encode(text) == [1, *pieces.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.encode("a[UNUSED_TOKEN_1]b") == [1, *pieces.encode("a[UNUSED_TOKEN_1]b")]
    separator = pieces.piece_to_id(UNUSED[0])
    assert tokenizer.encode("<|reward|>") == [1, separator], "the separator has the first unused slot"
    serialiser = Serialiser(tokenizer, Limits())
    ids = serialiser.token_ids(serialiser.text(*CHINA))
    assert (ids[0], ids[-1], ids.count(separator)) == (1, config["reward_token_id"], 1)


def test_a_converted_checkpoint_is_a_reward(converted: Path) -> None:
    assert PolarReward.check(PolarReward.Config(model_path=str(converted))) == []  # type: ignore[call-arg]
    reward = PolarReward(PolarReward.Config(model_path=str(converted), dtype="float32"), RewardContext(threads=1))  # type: ignore[call-arg]
    reward.start()
    values = [score.value for score in reward.score([make_group("a", ["42", "41", ""])])[0].samples]
    assert len(set(values)) == 3
    reward.close()


def test_a_released_folder_is_recognised_and_the_command_is_named(released: tuple[Path, dict[str, Any]]) -> None:
    (message,) = PolarReward.check(PolarReward.Config(model_path=str(released[0])))  # type: ignore[call-arg]
    assert f"python -m rewards.polar.convert {released[0]} {released[0]}-llama" in message


def test_tokenizer_and_configuration_suffice_for_a_server(
    released: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert convert_polar.main([str(released[0]), str(tmp_path / "bare"), "weights=false"]) == 0
    assert check_folder(tmp_path / "bare")["model_type"] == "llama"
    assert not list((tmp_path / "bare").glob("*.safetensors"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/polar_pickle_ran",)


def test_pickles_are_read_as_tensors_only(released: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(released[0], bad)
    (bad / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"x": Evil()}))
    assert convert_polar.main([str(bad), str(tmp_path / "out")]) == 1
    assert "cannot be loaded as plain tensors" in capsys.readouterr().err
    assert not Path("/tmp/polar_pickle_ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, "bias=true"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "only none and dynamic"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"architectures": ["InternLM2ForCausalLM"]}, "not InternLM2ForRewardModel"),
    ],
)
def test_what_llama_cannot_express_is_refused(
    released: tuple[Path, dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    config = {key: value for key, value in {**released[1], **change}.items() if value is not None}
    with pytest.raises(DiscriminatorError, match=message):
        llama_config(config)


def test_weights_that_do_not_belong_are_named(tmp_path: Path, capsys: Any) -> None:
    released_checkpoint(tmp_path / "r", pickled=False)
    from safetensors.torch import save_file

    save_file({"model.layers.0.attention.surprise": torch.ones(2)}, tmp_path / "r" / "model-extra.safetensors")
    assert convert_polar.main([str(tmp_path / "r"), str(tmp_path / "out")]) == 1
    assert "model.layers.0.attention.surprise is not a tensor of an InternLM2ForRewardModel" in capsys.readouterr().err
    with pytest.raises(DiscriminatorError, match="holds no weights"):
        WeightReader(tmp_path)


def without_tensors(folder: Path, lost: set[str]) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if k not in lost}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("lost", "exported"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("v_head.weight", "score.weight"),
        ("model.layers.1.attention.wqkv.weight", "model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, capsys: Any, lost: str, exported: str) -> None:
    source, target, back = (tmp_path / name for name in ("r", "out", "back"))
    released_checkpoint(source, pickled=False)
    shutil.copytree(source, tmp_path / "broken")
    without_tensors(tmp_path / "broken", {lost})
    assert convert_polar.main([str(tmp_path / "broken"), str(target)]) == 1
    assert f"the weights lack {lost}: is the folder complete?" in capsys.readouterr().err
    assert convert_polar.main([str(source), str(target)]) == 0, "the failed conversion must not block the next one"
    without_tensors(target, {exported})
    assert convert_polar.main([str(target), str(back), f"like={source}"]) == 1
    assert f"the weights lack {exported}: " in capsys.readouterr().err
    assert not list(back.iterdir())
    with pytest.raises(DiscriminatorError, match=f"lacks {exported}: they would be random"):
        plain_scores(target, "cpu", "float32", [[1, 5, 9]])
    with pytest.raises(ModelLoadError, match=f"lacks {exported}: they would be random"):
        load_scorer(target, torch.float32)


def test_layers_beyond_the_configured_ones_are_refused(tmp_path: Path, capsys: Any) -> None:
    config = released_checkpoint(tmp_path / "r", pickled=False)
    (tmp_path / "r/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert convert_polar.main([str(tmp_path / "r"), str(tmp_path / "out")]) == 1
    assert "is beyond the 1 layers in config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{broken"),
        ("config.json", "[]"),
        ("tokenizer_config.json", "{broken"),
        ("model-00002-of-00002.safetensors", "cut off"),
    ],
)
def test_a_broken_file_is_one_message(tmp_path: Path, capsys: Any, name: str, content: str) -> None:
    released_checkpoint(tmp_path / "r", pickled=False)
    (tmp_path / "r" / name).write_text(content)
    assert convert_polar.main([str(tmp_path / "r"), str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("rlkit: ") and message.count("\n") == 1 and str(tmp_path / "r" / name) in message
    if name == "config.json":
        (problem,) = PolarReward.check(PolarReward.Config(model_path=str(tmp_path / "r")))  # type: ignore[call-arg]
        assert problem.startswith("reward.model_path: ") and name in problem


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.arange(100.0) + i for i in range(5)}
    write_weights(tensors.items(), tmp_path, shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and len(set(index["weight_map"].values())) == 3
    reader = WeightReader(tmp_path)
    assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["one"], 2), (["a", "b", "wieghts=true"], 2), (["a", "b", "weights=no"], 2), (["a", "b"], 1)],
)
def test_wrong_arguments_end_with_a_sentence(arguments: list[str], code: int, capsys: Any, tmp_path: Path) -> None:
    assert convert_polar.main(arguments) == code
    assert capsys.readouterr().err.startswith("rlkit: ")


# ---- the real weights ------------------------------------------------------------------------------------------------

POLAR_7B = os.environ.get("POLAR_7B", "")
HALF_PRECISION = 0.05
"""fp16 kernels differ by as much."""


@pytest.mark.slow
@pytest.mark.skipif(not POLAR_7B, reason="set POLAR_7B to the folder of the released internlm/POLAR-7B")
def test_golden_values_of_polar_7b(tmp_path: Path) -> None:
    assert convert_polar.main([POLAR_7B, str(tmp_path / "polar")]) == 0
    from transformers import AutoTokenizer

    serialiser = Serialiser(AutoTokenizer.from_pretrained(tmp_path / "polar"), Limits())
    assert (serialiser.separator_id, serialiser.marker_id) == (92397, 92527)
    question, reference, wrong = CHINA
    inputs = [serialiser.token_ids(serialiser.text(question, reference, text)) for text in (reference, wrong)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = plain_scores(tmp_path / "polar", device, "float16" if device == "cuda" else "bfloat16", inputs)
    golden = [-0.5702977776527405, -11.030370712280273]
    assert found == pytest.approx(golden, abs=HALF_PRECISION if device == "cuda" else 0.3)
