"""Surrogate losses by name and by dotted path: what is chosen acts, and what cannot work is refused at the start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_grpo import Rows, aggregate_by_hand, finite_differences

from algorithms.grpo import GRPO
from algorithms.rloo import RLOO
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError

NO_KL: dict[str, Any] = {"kl_coefficient": 0.0, "aggregation": "token_mean"}


@pytest.mark.parametrize(
    ("options", "rows_by_hand"),
    [
        ({"loss": "own_surrogates.reinforce"}, lambda a, new, old: -a * new),
        ({"loss": "own_surrogates.NoConfig"}, lambda a, new, old: -a * new),
        (
            {"loss": "own_surrogates.SoftClip", "loss_options": {"sharpness": 3}, "clip_high": 0.1},
            lambda a, new, old: -a * (1 + np.tanh(3 * (np.exp(new - old) - 1)) / 3),
        ),
    ],
    ids=lambda value: value["loss"] if isinstance(value, dict) else "",
)
def test_a_surrogate_of_ones_own_is_the_loss(options: dict[str, Any], rows_by_hand: Any) -> None:
    rows = Rows()
    algorithm = GRPO(GRPO.Config(**options, **NO_KL))
    inputs = rows.inputs()
    output = algorithm.loss(inputs)
    output.loss.backward()

    def by_hand(logprobs: np.ndarray) -> float:
        counts = rows.denominators
        losses = rows_by_hand(rows.advantages, logprobs, rows.old)
        return aggregate_by_hand(losses, rows.mask, rows.sequence, counts.tokens, counts.sequences, "token_mean")

    assert output.loss.item() == pytest.approx(by_hand(rows.logprobs), abs=1e-12)
    assert inputs.logprobs.grad is not None
    np.testing.assert_allclose(inputs.logprobs.grad, finite_differences(by_hand, rows.logprobs), atol=1e-7)
    if "clip_high" in options:
        high = (np.exp(rows.logprobs - rows.old) > 1.1) & (rows.mask > 0)
        assert output.sums["policy/clip_share"].item() == pytest.approx(high.sum() / rows.denominators.tokens)


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["algorithm.loss=cliped"],
            ["algorithm.loss=cliped: did you mean clipped? must be one of clipped, gspo, cispo"],
        ),
        (["algorithm.loss=my_losses.soft"], ["algorithm.loss=my_losses.soft: cannot be imported", "my_losses"]),
        (["algorithm.loss=own_surrogates.reinforced"], ["did you mean own_surrogates.reinforce?"]),
        (["algorithm.loss=own_surrogates.NUMBER"], ["is of type int, not a function or class"]),
        (["algorithm.loss=own_surrogates.NoCall"], ["is a class without __call__"]),
        (["algorithm.loss=own_surrogates.wants_too_much"], ["takes advantage", "did you mean advantages?"]),
        (["algorithm.loss_options.sharpness=3"], ["algorithm.loss_options", "clipped takes no options"]),
        (
            ["algorithm.loss=own_surrogates.SoftClip", "algorithm.loss_options.sharpnes=3"],
            ["sharpnes is not an option of own_surrogates.SoftClip; did you mean sharpness?"],
        ),
        (
            ["algorithm.loss=own_surrogates.SoftClip", "algorithm.loss_options.sharpness=0"],
            ["sharpness: Input should be greater than 0"],
        ),
        (
            ["algorithm.loss=own_surrogates.reinforce", "algorithm.clip_low=0.1"],
            ["clip_low has no effect with loss=own_surrogates.reinforce"],
        ),
        (
            ["algorithm.loss=own_surrogates.SoftClip", "algorithm.dual_clip=3"],
            ["dual_clip has no effect with loss=own_surrogates.SoftClip"],
        ),
        (["algorithm.loss=gspo", "algorithm.dual_clip=3"], ["dual_clip has no effect with loss=gspo"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    overrides: list[str], messages: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["algorithm=grpo", "reward=rule", *overrides, f"run_dir={tmp_path / 'run'}"])
    for message in messages:
        assert message in str(error.value)


def test_options_of_a_surrogate_come_from_the_command_line(tmp_path: Path) -> None:
    run = load_config(
        [
            "algorithm=rloo",
            "reward=rule",
            "algorithm.loss=own_surrogates.SoftClip",
            "algorithm.loss_options.sharpness=3",
            f"run_dir={tmp_path / 'run'}",
        ]
    )
    algorithm = run.make_algorithm()
    assert isinstance(algorithm, RLOO)
    assert algorithm._surrogate.sharpness == 3.0  # type: ignore[attr-defined]


def test_a_loss_of_the_wrong_shape_is_an_error_that_says_so() -> None:
    algorithm = GRPO(GRPO.Config(loss="own_surrogates.mean_already", **NO_KL))
    with pytest.raises(ValueError, match=r"loss=own_surrogates.mean_already must return two tensors of shape"):
        algorithm.loss(Rows().inputs(torch.float32))


def test_choosing_a_built_in_surrogate_does_not_load_torch() -> None:
    script = (
        "import sys; from algorithms.grpo import GRPO; "
        "[GRPO(GRPO.Config(loss=name)) for name in ('clipped', 'gspo', 'cispo')]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
