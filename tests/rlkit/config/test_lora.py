"""Options of adapters: how many parameters they train, how they are published, what they need of a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from adapter_fixture import need

from benchmarks.memory import SHAPES, write_model
from rlkit.config.loading import load_config
from rlkit.config.lora import AdapterConfig, LoraConfig, adapted_names, adapter_parameters
from rlkit.config.memory import GIB, gpu_phases, total
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun
from rlkit.config.plan import published_adapter, sleep_level, weight_route
from rlkit.config.report import plan
from rlkit.config.store import bundle_elements
from rlkit.learner.adapter import add_adapter, is_factor
from rlkit.models.policy import load_causal_lm

ADAPTER = "model.lora.rank=8"


def load(tmp_path: Path, *overrides: str) -> ResolvedRun:
    return load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", "dry_run=true", *overrides])


def refused(tmp_path: Path, *overrides: str) -> str:
    need("peft", "lora")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, ADAPTER, *overrides)
    return str(error.value)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_files_say_what_peft_trains(targets: tuple[str, ...] | str) -> None:
    need("peft", "lora")
    import torch

    from rlkit.models.folder import model_folder

    lora = AdapterConfig(rank=3, target_modules=targets)  # type: ignore[arg-type]
    model = load_causal_lm(model_folder("embedded:policy"), torch.float32).model
    add_adapter(model, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(map(is_factor, trained))
    assert sum(p.numel() for p in trained.values()) == adapter_parameters("embedded:policy", lora)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == set(
        adapted_names("embedded:policy", lora)
    )


def test_the_factor_is_alpha_over_rank() -> None:
    assert LoraConfig(rank=16).scale == 2
    assert LoraConfig(rank=16, alpha=4).scale == 0.25


@pytest.mark.parametrize(
    ("overrides", "alone", "route", "level"),
    [
        ((), False, "object_store", 2),
        (("rollout.dtype=bfloat16",), True, "object_store", 1),
        (("model.lora.publish=adapter",), True, "object_store", 1),
        (("cluster.weight_transfer=gloo",), False, "gloo", 2),
        (("cluster=single_gpu",), True, "object_store", 1),
        (("cluster=single_gpu", "model.lora.publish=merged"), False, "ipc", 2),
        (("cluster=single_gpu", "rollout.dtype=float32"), False, "ipc", 2),
    ],
)
def test_weights_are_merged_where_that_loses_nothing(
    tmp_path: Path, overrides: tuple[str, ...], alone: bool, route: str, level: int
) -> None:
    need("peft", "lora")
    config = load(tmp_path, ADAPTER, *overrides).config
    assert (published_adapter(config.cluster, config.rollout, config.model) is not None) == alone
    assert weight_route(config.cluster, config.rollout, config.learner, config.model) == route
    assert sleep_level(config) == level
    if alone:
        assert bundle_elements(config) == adapter_parameters("embedded:policy", LoraConfig(rank=8))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("algorithm=dpo", "algorithm.reference_every_steps=2"),
            "is the model without its adapter, which never changes",
        ),
        (("model.lora.publish=adapter", "cluster.weight_transfer=gloo"), "an adapter goes through the object store"),
        (("model.lora.target_modules=[q_prj]",), "has no linear layer q_prj; it has "),
        (("model.lora.target_modules=[lm_head]",), "has no linear layer lm_head"),
        (("model.lora.target_modules=[]",), "the list is empty; the model has"),
        (("algorithm=sft", "model.lora.publish=adapter"), "has no effect: nothing is sampled from the policy"),
        (
            ("algorithm=prime", "reward=implicit_prm", "reward.reference=policy", "model.lora.publish=adapter"),
            "ImplicitPRM takes the policy's whole weights after each step; use model.lora.publish=merged",
        ),
        (("reward=implicit_prm", "algorithm=prime", "reward.lora.rank=2", "reward.reference=policy"), "with lora the"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused(tmp_path: Path, overrides: tuple[str, ...], words: str) -> None:
    assert words in refused(tmp_path, *overrides)


@pytest.mark.parametrize("key", ["model.lora.rank", "reward.lora.rank"])
def test_without_peft_the_extra_is_named(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.experience.extras.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft is not installed: pip install 'rlkit\[lora\]'"):
        load(tmp_path, "algorithm=prime", "reward=implicit_prm", f"{key}=8")


@pytest.mark.parametrize(("size", "fits_without"), [("3B", True), ("7B", False), ("14B", False)])
def test_a_large_model_s_adapter_fits_one_gpu(tmp_path: Path, size: str, fits_without: bool) -> None:
    need("peft", "lora")
    write_model(SHAPES[size], tmp_path / "model", random=False)
    arguments = (
        "cluster=single_gpu",
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "cluster.gpu_memory_gib=80",
        "cluster.host_memory_gib=200",
    )
    run = load(tmp_path, *arguments, ADAPTER)
    assert max(map(total, gpu_phases(run, 80 * GIB).values())) < 75 * GIB
    lines = "\n".join(f"{line.what} {line.amount}" for line in plan(run))
    assert re.search(r"; an adapter of [\d,]+ is trained", lines)
    assert "only the adapter, through Ray's object store" in lines
    assert "the policy with its adapter off, no extra model" in lines
    if not fits_without:
        with pytest.raises(ConfigError, match=r"model\.lora\.rank=16"):
            load(tmp_path, *arguments)
