"""Safetensors files, written tensor by tensor and hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from learner_fixture import write_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlkit.learner.policy_folder import parameter_metas, save_policy
from rlkit.weights import tensor_file
from rlkit.weights.bundle import TensorMeta
from rlkit.weights.tensor_file import TensorFile, file_bytes, write_tensors

TENSORS = {
    "step": torch.tensor(7),
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}
METAS = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def bits(tensor: torch.Tensor) -> list[int]:
    flat: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return flat


def test_the_library_reads_what_was_written_and_the_hash_is_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 16)  # several pieces per tensor
    written = write_tensors(tmp_path / "a", METAS, TENSORS.items())
    data = (tmp_path / "a").read_bytes()
    assert written.bytes == len(data) == file_bytes(METAS)
    assert written.blake2b == hashlib.blake2b(data, digest_size=16).hexdigest()
    for read in (load_file(tmp_path / "a"), TensorFile(tmp_path / "a")):
        assert set(read) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert bits(read[name]) == bits(tensor)
    assert "nothing" not in TensorFile(tmp_path / "a")


@pytest.mark.parametrize(
    "tensors", [list(TENSORS.items())[::-1], list(TENSORS.items())[:-1], [("step", torch.ones(1))]]
)
def test_only_what_was_announced_is_written(tmp_path: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, but .* arrived"):
        write_tensors(tmp_path / "a", METAS, tensors)
    with pytest.raises(ValueError, match="arrived after the last announced tensor"):
        write_tensors(tmp_path / "a", METAS, [*TENSORS.items(), ("more", torch.ones(1))])


def test_a_full_disk_is_the_systems_error() -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        write_tensors(Path("/dev/full"), METAS, TENSORS.items())
    assert raised.value.errno == errno.ENOSPC


def test_a_large_policy_is_written_in_shards_that_transformers_reads(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    weights = list(model.named_parameters())
    written = save_policy(model, parameter_metas(model), iter(weights), tmp_path / "saved", shard_bytes=100_000)
    names = [file.path.name for file in written]
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all(file.bytes == file.path.stat().st_size for file in written)
    back = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").named_parameters())
    assert back.keys() == {name for name, _ in weights}
    assert all(torch.equal(back[name], tensor) for name, tensor in weights)
    with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight"):
        save_policy(model, parameter_metas(model)[:-1], iter(weights), tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_model_s_own_code_comes_along(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}, "architectures": ["Mine"]}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    save_policy(model, parameter_metas(model), model.named_parameters(), tmp_path / "saved")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(back).__name__ == "Mine" and type(back) is not type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_the_folder_is_what_save_pretrained_writes(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model")).bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    save_policy(model, parameter_metas(model), model.named_parameters(), tmp_path / "ours")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    ours, theirs = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
