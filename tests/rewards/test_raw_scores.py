"""Raw scores of a model (POLAR's logits) in training: who takes their scale out, that it is once, who is warned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learner_fixture import make_groups

from algorithms.base import Advantages, Algorithm, Experience
from rewards.base import RewardContext
from rewards.combined.reward import CombinedReward
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.experience import Group, GroupScores, Score

RAW = [-0.5703, -11.0304, -6.7070, -2.0059]
"""Logits of one group of the released model, from far right to far wrong."""
SAMPLE_Z = [0.94799313, -1.25162599, -0.34247280, 0.64610566]
"""(r - mean) / std of these, with ddof 1: GRPO's."""
GROUP_Z = [1.09464815, -1.44525316, -0.39545351, 0.74605852]
"""The same with ddof 0: the step group_normalise."""
RECIPES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo", "reinforce_pp", "reinforce_pp_baseline", "remax")


def recipe(tmp_path: Path, *overrides: str) -> Algorithm:
    run = load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", *overrides])
    return run.make_algorithm()


def scored(group: Group, values: list[float]) -> Group:
    scores = tuple(Score(value) for value in values)
    judged = GroupScores(scores, greedy=Score(values[0] / 2))
    return replace(group, greedy=group.samples[0], scores=judged)


def advantages(algorithm: Algorithm, values: list[list[float]]) -> Advantages:
    groups = [scored(group, row) for group, row in zip(make_groups(len(values)), values, strict=True)]
    samples = [sample for group in groups for sample in group.samples]
    zeros = [np.zeros(len(sample), dtype=np.float32) for sample in samples]
    return algorithm.advantages(Experience(groups, 1, zeros, zeros, zeros))


def first_tokens(made: Advantages) -> list[float]:
    return [float(row[0]) for row in made.tokens]


@pytest.mark.parametrize("name", [*RECIPES, "ppo without whitening"])
def test_an_algorithm_says_whether_it_takes_the_scale_out(name: str, tmp_path: Path) -> None:
    if name == "ppo without whitening":
        algorithm = recipe(tmp_path, "algorithm=ppo", "algorithm.whiten_advantages=false")
    else:
        algorithm = recipe(tmp_path, f"algorithm={name}")
    rows = [RAW, [-3.0, -3.5, -9.0, 0.5]]
    once = first_tokens(advantages(algorithm, rows))
    tenfold = first_tokens(advantages(algorithm, [[10 * value for value in row] for row in rows]))
    assert np.ptp(once) > 0.1
    factor = 1 if algorithm.normalises() else 10
    np.testing.assert_allclose(tenfold, factor * np.array(once), rtol=1e-4, atol=1e-5)
    assert algorithm.normalises() == (name not in ("dr_grpo", "rloo", "remax", "ppo without whitening"))


def test_worked_numbers_and_nothing_is_normalised_twice(tmp_path: Path) -> None:
    grpo, rloo = recipe(tmp_path, "algorithm=grpo"), recipe(tmp_path, "algorithm=rloo")
    np.testing.assert_allclose(first_tokens(advantages(grpo, [RAW])), SAMPLE_Z, atol=2e-6)
    np.testing.assert_allclose(first_tokens(advantages(grpo, [GROUP_Z])), SAMPLE_Z, atol=2e-6)
    # leave-one-out: 4/3 of the distance from the mean, on the scale of the rewards
    centred = np.array(RAW) - np.mean(RAW)
    np.testing.assert_allclose(first_tokens(advantages(rloo, [RAW])), 4 / 3 * centred, rtol=1e-5)
    np.testing.assert_allclose(first_tokens(advantages(rloo, [GROUP_Z])), 4 / 3 * np.array(GROUP_Z), rtol=1e-5)


def test_the_step_that_the_warning_names_normalises_real_logits() -> None:
    (group,) = (replace(g, prompt=replace(g.prompt, references=("#### 42",))) for g in make_groups(1))
    texts = ("#### 42", "The answer is 7.", "", "42 42 42")
    group = replace(group, samples=tuple(replace(s, text=t) for s, t in zip(group.samples, texts, strict=True)))
    part = {"_target_": "rewards.polar.reward.PolarReward"}
    config = CombinedReward.Config(parts={"polar": part}, shaping=["group_normalise"])  # type: ignore[call-arg, arg-type]
    reward = CombinedReward(config, RewardContext())
    reward.start()
    try:
        ((*scores,),) = (made.samples for made in reward.score([group]))
    finally:
        reward.close()
    raw = np.array([score.components["polar"] for score in scores])
    np.testing.assert_allclose([score.value for score in scores], (raw - raw.mean()) / raw.std(), rtol=1e-9)
    assert raw.std() > 0.01, "the raw logit stays a component"


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (("algorithm=grpo", "reward=polar"), False),
        (("algorithm=ppo", "reward=polar"), False),
        (("algorithm=reinforce_pp", "reward=polar"), False),
        (("algorithm=rloo", "reward=polar"), True),
        (("algorithm=remax", "reward=polar"), True),
        (("algorithm=dr_grpo", "reward=polar"), True),
        (("algorithm=ppo", "reward=polar", "algorithm.whiten_advantages=false"), True),
        (("algorithm=rloo", "reward=preference", "reward.model_path=embedded:polar", "reward.layout=pair"), True),
        (("algorithm=rloo", "reward=rule"), False),
        (("algorithm=rloo", "reward=[rule,polar]"), True),
        (("algorithm=rloo", "reward=[rule,polar]", "reward.parts.polar.weight=0"), False),
        (("algorithm=rloo", "reward=[polar]", "reward.shaping=[group_normalise]"), False),
        (("algorithm=rloo", "reward=[polar]", "reward.shaping=[{kind:group_normalise,divide:false}]"), True),
        (("algorithm=remax", "reward=[polar]", "reward.shaping=[standardise]"), False),
        (("algorithm=rloo", "reward=[rule,polar]", "reward.parts.polar.shaping=[{kind:par,reference_value:0}]"), False),
    ],
)
def test_what_nobody_normalises_is_warned_about(overrides: tuple[str, ...], warned: bool, tmp_path: Path) -> None:
    run = load_config([*overrides, f"run_dir={tmp_path / 'run'}"])
    found = [problem.message for problem in run.warnings if "raw scores" in problem.message]
    assert bool(found) == warned
    if warned:
        assert "group_normalise" in found[0] and "standardise" in found[0]


ALONE = {
    "group_normalise": ("reward=[polar]", "reward.shaping=[group_normalise]"),
    "group_normalise of a part": ("reward=[rule,polar]", "reward.parts.polar.shaping=[group_normalise]"),
    "group_length": ("reward=group_length",),
    "pairwise": ("reward=judge", "reward.base_url=http://h/v1", "reward.model=m", "reward.mode=pairwise"),
}


@pytest.mark.parametrize("overrides", ALONE.values(), ids=ALONE)
def test_a_lone_response_is_not_compared(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = [*overrides, f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"needs at least 2 of them; there are 1 \(algorithm.samples_per_prompt\)"):
        load_config(["algorithm=ppo", *run], elsewhere=())
    load_config(["algorithm=ppo", "algorithm.samples_per_prompt=2", *run], elsewhere=())
    load_config(["algorithm=remax", *run], elsewhere=())  # its greedy response is the second


def test_a_lone_response_may_meet_the_reference(tmp_path: Path) -> None:
    run = ["algorithm=ppo", *ALONE["pairwise"], "reward.against=reference", f"run_dir={tmp_path / 'run'}"]
    load_config(run, elsewhere=())
