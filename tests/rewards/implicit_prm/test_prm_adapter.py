"""The implicit PRM as an adapter: its reference is itself with the adapter off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_fixture import need
from learner_fixture import write_tiny_model, write_tokenizer
from test_implicit_prm import LN2, labelled, prm, rescored
from transformers import AutoModelForCausalLM

from rlkit.learner.adapter import is_factor

need("peft", "lora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_tiny_model(tmp_path_factory.mktemp("prm") / "model"))


def test_an_adapter_learns_and_its_reference_stays(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, object] = {"lora": {"rank": 8}, "learning_rate": 1e-2, "beta": 0.5}
    reward = prm(model, **options)
    groups = labelled(99)
    start = rescored(reward, groups)
    assert max(np.abs(score.token_rewards).max() for g in start for _, score in g.scored()) == 0
    losses = [reward.update(rescored(reward, labelled(seed)))["prm/loss"] for seed in range(6)]
    assert losses[0] == pytest.approx(LN2, abs=1e-5) and losses[-1] < LN2 - 0.05
    base = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    for name, parameter in reward.model.engine.module.model.named_parameters():
        if not is_factor(name):
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])
    state = reward.model.state_dict()
    assert all(is_factor(name) for name in state["engine"] if name != "optimizer_step")

    other = prm(model, **options)
    other.model.load_state_dict(state)
    reward.model.save(tmp_path / "prm")
    whole = prm(tmp_path / "prm", reference_path=str(model), beta=0.5)
    for mine, its, merged in zip(*(one.rescore(groups) for one in (reward, other, whole)), strict=True):
        for a, b, c in zip(mine.samples, its.samples, merged.samples, strict=True):
            assert np.array_equal(a.token_rewards, b.token_rewards)
            np.testing.assert_allclose(c.token_rewards, a.token_rewards, atol=2e-5)
