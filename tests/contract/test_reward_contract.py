"""What every reward must keep to. Run it against your own:

    REWARD=my_module.MyReward REWARD_OPTIONS='{"my_key": 3}' python -m pytest tests/contract

Without the variable it checks `reward=math`. The prompts ask for 6 times 7 and carry a gold answer and references;
a reward that needs other columns finds them as empty strings.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from ray_fixture import ray_session, run  # noqa: F401
from reward_samples import make_group, make_sample

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits, TrainableReward
from rlkit.config.parts import import_part
from rlkit.experience import Group, GroupScores, Score
from rlkit.serving.pool import RewardPool

TARGET = os.environ.get("REWARD", "rewards.verifiers.math.MathReward")
OPTIONS: dict[str, Any] = json.loads(os.environ.get("REWARD_OPTIONS", "{}"))

TEXTS = [
    "6 * 7 = 42\n#### 42",
    "6 * 7 = 41\n#### 41",
    "",
    "I do not know.",
    "#### 42 " + "and more words " * 200,
    "数学 😀 \x00 \u202e ### ####",
    r"\boxed{",
]


@pytest.fixture(scope="module")
def reward() -> Iterator[Reward]:
    kind = import_part("reward", TARGET)
    reward: Reward = kind(kind.Config(**OPTIONS), RewardContext())
    reward.start()
    yield reward
    reward.close()


def groups() -> list[Group]:
    """Two groups that have whatever this reward says it needs."""
    kind = import_part("reward", TARGET)
    needed = dict.fromkeys(kind.traits(kind.Config(**OPTIONS)).columns, "")
    made = [make_group("first", TEXTS), make_group("second", ["#### 42", "#### 43"])]
    return [replace(group, prompt=replace(group.prompt, columns=needed)) for group in made]


def values(scores: GroupScores) -> list[float | None]:
    return [score.value for score in scores.samples]


def test_its_options_are_typed_and_documented() -> None:
    config = import_part("reward", TARGET).Config
    assert issubclass(config, RewardConfig)
    undocumented = [name for name, field in config.model_fields.items() if not field.description]
    assert undocumented == [], "write what each option means under it, as a string"
    with pytest.raises(ValueError, match="no_such_option"):
        config(**OPTIONS, no_such_option=1)


def test_what_it_says_of_itself() -> None:
    kind = import_part("reward", TARGET)
    traits = kind.traits(kind.Config(**OPTIONS))
    assert isinstance(traits, RewardTraits)
    if traits.update_when != "none" or traits.follows_policy:
        assert issubclass(kind, TrainableReward), "a reward that learns or follows the policy is a TrainableReward"


def test_importing_it_is_cheap() -> None:
    """The configuration layer imports it; heavy libraries belong into start()."""
    module = TARGET.rpartition(".")[0]
    script = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", "import these inside start() or score()"


def test_a_score_for_every_sample_in_order(reward: Reward) -> None:
    scored = reward.score(groups())
    assert isinstance(scored, list)
    assert [len(scores.samples) for scores in scored] == [len(group.samples) for group in groups()]
    for group, scores in zip(groups(), scored, strict=True):
        judged = group.with_scores(scores)  # raises if token rewards have the wrong length
        assert all(isinstance(score, Score) for score in scores.samples)
        assert all(math.isfinite(score.value) for score in scores.samples if score.valid and score.value is not None)
        for pair in scores.pairs:
            assert {pair.winner, pair.loser} <= set(range(len(group.samples)))
        assert pickle.loads(pickle.dumps(judged)).scores == judged.scores or scores.samples[0].token_rewards is not None


def test_something_can_be_scored(reward: Reward) -> None:
    assert any(score.valid for scores in reward.score(groups()) for score in scores.samples)


def test_a_group_does_not_depend_on_its_neighbours(reward: Reward) -> None:
    together = reward.score(groups())
    alone = [reward.score([group])[0] for group in groups()]
    for left, right in zip(together, alone, strict=True):
        for a, b in zip(values(left), values(right), strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)


def test_no_group_and_one_sample(reward: Reward) -> None:
    assert reward.score([]) == []
    (scores,) = reward.score([replace(groups()[0], samples=(make_sample(0, "#### 42"),))])
    assert len(scores.samples) == 1


def test_what_it_needs_and_does_not_find_is_invalid_and_not_zero(reward: Reward) -> None:
    traits = reward.traits(reward.config)
    if not (traits.references or traits.answer):
        pytest.skip("it needs neither references nor a gold answer")
    bare = groups()[0]
    bare = replace(bare, prompt=replace(bare.prompt, references=(), answer=None))
    (scores,) = reward.score([bare])
    for score in scores.samples:
        assert not score.valid
        assert ":" in score.reason, "a reason is a short class, then `: details`"


def test_close_can_be_called_without_start_and_twice() -> None:
    kind = import_part("reward", TARGET)
    idle = kind(kind.Config(**OPTIONS), RewardContext())
    idle.close()
    idle.close()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_it_works_in_its_own_process() -> None:
    async def check() -> None:
        pool = RewardPool({"_target_": TARGET, **OPTIONS}, RewardContext(), startup_timeout_seconds=120)
        await pool.start()
        scored = await pool.score([groups()])
        assert [len(own.samples) for own in scored.scores] == [len(group.samples) for group in groups()]
        assert scored.report.samples == len(TEXTS) + 2
        assert scored.report.failed < scored.report.samples, scored.report.examples
        await pool.close()

    run(check())
