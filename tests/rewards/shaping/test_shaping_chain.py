"""`shaping` lists in a combined reward: order, references, groups, running statistics, and messages about mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from combination_rewards import SECOND, SPANS, TOKENS, WORD, combined, group, score

from rewards.base import RewardContext
from rewards.combined.reward import CombinedReward
from rewards.shaping.references import log_sigmoid, sigmoid
from rewards.shaping.steps import parse_steps
from rlkit.experience import Group, GroupScores, PreferencePair, Span

RUNNING = ("1", "3", "2", "6")


def values(scores: GroupScores) -> list[float | None]:
    return [score.value for score in scores.samples]


def scored(reward: CombinedReward, *groups: Group) -> list[Group]:
    return [each.with_scores(scores) for each, scores in zip(groups, reward.score(groups), strict=True)]


def test_steps_run_in_order_and_the_value_before_is_shown() -> None:
    steps = [{"kind": "length_penalty", "per_token": 1.0, "free_tokens": 1}, {"kind": "par", "reference_value": 0.5}]
    (found,) = score(combined({"a": WORD, "b": SECOND}, shaping=steps), "2 4 0")
    assert found.value == pytest.approx(float(sigmoid(np.array([2 + 4 - 2 - 0.5]))[0]))
    assert found.components["unshaped"] == 6


def test_a_part_is_shaped_before_it_is_combined() -> None:
    parts = {"a": {**WORD, "shaping": [{"kind": "clamp", "high": 3.0}]}, "b": SECOND}
    (found,) = score(combined(parts), "9 4")
    assert (found.value, found.components["a"], found.components["a/shaped"]) == (7.0, 9.0, 3.0)
    assert "unshaped" not in found.components


def test_lsc_of_each_part_and_their_sum() -> None:
    lsc = [{"kind": "lsc", "reference_value": 0.0}]
    (found,) = score(combined({"a": {**WORD, "shaping": lsc}, "b": {**SECOND, "shaping": lsc}}), "2 -1")
    assert found.value == pytest.approx(-1.440190, abs=1e-6)
    assert score(combined({"a": WORD, "b": SECOND}, combine="logical_and"), "2 -1")[0].value == found.value


def test_reference_rewards_of_a_column() -> None:
    step = {"kind": "par", "reference_rewards": "base"}
    reward = combined({"a": {**WORD, "shaping": [step]}})
    cases = {
        "list": [0.2, 1.0, -0.5],
        "number": 0.2,
        "missing": None,
        "text": "0.2",
        "empty": [],
        "nan": [float("nan")],
    }
    groups = [group("1.5", name=name, base=base) for name, base in cases.items()]
    found = {each.id: scores.samples[0] for each, scores in zip(groups, reward.score(groups), strict=True)}
    assert found["list"].value == pytest.approx(0.763030, abs=1e-6)
    assert found["number"].value == pytest.approx(0.785835, abs=1e-6)
    for name in ("missing", "text", "empty", "nan"):
        assert found[name].reason.startswith("no_reference_reward: part a: base of prompt"), name
    few = combined({"a": {**WORD, "shaping": [{**step, "max_references": 1}]}})
    assert few.score(groups)[0].samples[0].value == pytest.approx(0.785835, abs=1e-6)


def test_reference_responses_are_scored_once_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"kind": "lsc", "reference_responses": "base", "fit": "empirical"}
    reward = combined({"a": WORD}, shaping=[step])
    made = [group("1.5", name="g", base=["0.2", "1.0", "-0.5"]), group("1.5", "2", name="h", base="0.0")]
    first, second = reward.score(made)
    assert values(first) == [pytest.approx(-0.390090, abs=1e-6)]
    assert values(second) == pytest.approx(log_sigmoid(np.array([1.5, 2.0])))
    asked: list[int] = []
    original = type(reward._rewards["a"]).score

    def counting(self: Any, groups: Any) -> Any:
        asked.append(len(groups))
        return original(self, groups)

    monkeypatch.setattr(type(reward._rewards["a"]), "score", counting)
    assert [values(scores) for scores in reward.score(made)] == [values(first), values(second)]
    assert asked == [2]


def test_a_reference_response_that_cannot_be_judged_says_so() -> None:
    reward = combined({"a": WORD}, shaping=[{"kind": "centre", "reference_responses": "base"}])
    unreadable, one, none = reward.score(
        [group("1", name="g", base=["x"]), group("3", name="h", base=["1"]), group("1", name="i", base=[])]
    )
    assert unreadable.samples[0].reason.startswith("no_reference_reward: combined: a reference response got no score")
    assert values(one) == [2.0]
    assert "is empty" in none.samples[0].reason


def test_a_normal_fit_of_one_reference_is_invalid_and_not_a_guess() -> None:
    reward = combined({"a": WORD}, shaping=[{"kind": "lsc", "reference_rewards": "base"}])
    (scores,) = reward.score([group("1", base=[0.5])])
    assert scores.samples[0].reason.startswith("no_reference_reward: combined: lsc: a normal fit needs at least two")


def test_group_statistics_are_by_group_and_without_invalid_samples() -> None:
    reward = combined({"a": {**WORD, "shaping": ["group_normalise"]}})
    first, second, third = reward.score([group("1", "x", "3"), group("100", "300", name="h"), group("5", name="i")])
    assert values(first) == [-1.0, None, 1.0]
    assert values(second) == [-1.0, 1.0]
    assert values(third) == [0.0]
    assert values(reward.score([group("100", "300", name="h")])[0]) == [-1.0, 1.0]


def test_clip_then_delta_on_token_and_span_rewards() -> None:
    steps = [{"kind": "clip", "eta": 0.5}, "delta"]
    tokens, spans = score(combined({"a": TOKENS}, shaping=steps), "0.9 0.4 0.8 0.2")[0], None
    assert tokens.token_rewards == pytest.approx([0.1, -0.1, 0, 0], abs=1e-6)
    spans = score(combined({"a": {**SPANS, "shaping": ["delta"]}}), "0.9 0.4 0.8 0.2")[0]
    assert [span.value for span in spans.span_rewards] == pytest.approx([0.5, -0.4, 0.8, 0])


def test_token_rewards_of_a_split_response_are_shaped_as_steps() -> None:
    """Steps of 2, 1 and 1 words, the second word not trained: 0.9, 0.8 and 0.2."""
    made = group("0.9 9 0.8 0.2")
    mask, spans = np.array([1, 0, 1, 1], dtype=np.bool_), (Span(0, 2), Span(2, 3), Span(3, 4))
    sample = replace(made.samples[0], mask=mask, spans=spans)
    (scores,) = combined({"a": TOKENS}, shaping=["delta"]).score([replace(made, samples=(sample,))])
    assert scores.samples[0].token_rewards is None
    shaped = scores.samples[0].span_rewards
    assert [(span.start, span.end) for span in shaped] == [(0, 2), (2, 3), (3, 4)]
    assert [span.value for span in shaped] == pytest.approx([0.1, 0.8, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ({"kind": "renorm", "mu": 1.0}, "1 0.666667 1 0", [1, 0.666667, 1, 0]),
        ({"kind": "renorm"}, "0 0.666667 1 0", [-1, -0.333333, 0, -1]),
        ({"kind": "turn_dense", "maximum": 4}, "1 0 1", [0.5, 0, 0.5]),
        ({"kind": "turn_dense", "maximum": 4}, "0.5 0 1 0 1", [0.125, 0, 0.25, 0, 0.25]),
    ],
)
def test_process_rewards_by_the_outcome(step: dict[str, Any], text: str, expected: list[float]) -> None:
    """The outcome is the first word, which is a step here, too."""
    (scored,) = score(combined({"a": SPANS, "b": WORD}, shaping=[step]), text)
    assert [span.value for span in scored.span_rewards] == pytest.approx(expected, abs=1e-6)
    assert scored.value == float(text.split()[0])
    (alone,) = score(combined({"a": SPANS}, shaping=[step]), text)
    assert alone.reason == f"no_value: {step['kind']} needs an outcome as well as the process rewards"


def test_process_steps_pass_over_tokens_that_are_not_trained() -> None:
    made = group("0.9 9 0.4 9 0.8 0.2")
    sample = replace(made.samples[0], mask=np.array([1, 0, 1, 0, 1, 1], dtype=np.bool_))
    (scores,) = combined({"a": TOKENS}, shaping=["delta"]).score([replace(made, samples=(sample,))])
    assert scores.samples[0].token_rewards == pytest.approx([0.5, 9, -0.4, 9, 0.8, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("standardise", [-1.069045, 0, -0.534522, 1.603567]),
        ("clip_std", [1.129171, 3, 2, 4.870829]),
        ("minmax", [0, 0.4, 0.2, 1]),
    ],
)
def test_running_statistics_count_a_step_before_its_scores_are_used(kind: str, expected: list[float]) -> None:
    reward = combined({"a": {**WORD, "pairs": True}}, shaping=[kind])
    assert CombinedReward.traits(reward.config).update_when == "before"
    groups = scored(reward, group("1", "3"), group("x", "2", "6", name="h"))
    assert [v for each in groups if each.scores for v in values(each.scores)] == [1, 3, None, 2, 6]
    reward.update(groups)
    first, second = reward.rescore(groups)
    assert [*values(first), *values(second)[1:]] == pytest.approx(expected, abs=1e-6)
    assert second.samples[0].reason == "unreadable: part a: it is an x"
    assert first.samples[1].trace == "a: read 3"
    assert first.pairs == (PreferencePair(0, 1, 0.9),)
    # And the next step's scores use what was counted; a saved state goes on with it.
    again = combined({"a": WORD}, shaping=[kind])
    again.load_state_dict(reward.state_dict())
    assert again.version == 1
    assert values(again.score([group("1", "3")])[0]) == pytest.approx(expected[:2], abs=1e-6)


def test_running_statistics_of_a_part_and_of_the_whole() -> None:
    parts = {"a": {**WORD, "shaping": ["standardise"]}, "b": {**TOKENS, "weight": 2}}
    reward = combined(parts, shaping=["minmax"])
    groups = scored(reward, group(*RUNNING))
    reward.update(groups)
    (found,) = reward.rescore(groups)
    assert values(found) == pytest.approx([0, 0.4, 0.2, 1], abs=1e-6)
    assert [s.components["a/shaped"] for s in found.samples] == pytest.approx(
        [-1.069045, 0, -0.534522, 1.603567], abs=1e-6
    )
    assert found.samples[3].token_rewards is not None
    assert found.samples[3].token_rewards.tolist() == [12]


def test_members_of_a_lone_part_survive_a_rescore() -> None:
    """Where another part judges too, or parts are the members, there is nothing of its own to keep."""
    several = {"_target_": "combination_rewards.Several"}
    answered = {**WORD, "when": {"has": ["answer"]}}
    groups = [group("1 2 3", "6"), group("4 5", name="h", answer=None)]
    reward = combined({"a": several, "b": answered}, shaping=["standardise"])
    judged = scored(reward, *groups)
    assert [s.ensemble for _, s in judged[1].scored()] == [(4, 5)]
    reward.update(judged)
    both, alone = reward.rescore(judged)
    assert [s.ensemble for s in both.samples] == [(), ()]
    assert [s.ensemble for s in alone.samples] == [(4, 5)]
    members = combined({"a": several}, shaping=["standardise"], combine="median")
    judged = scored(members, groups[1])
    members.update(judged)
    assert [s.ensemble for s in members.rescore(judged)[0].samples] == [(4.5,)]


def test_a_state_of_other_steps_is_refused() -> None:
    state = combined({"a": WORD}, shaping=["standardise"]).state_dict()
    with pytest.raises(ValueError, match="use the same shaping"):
        combined({"a": WORD}, shaping=[{"kind": "clamp", "low": 0}]).load_state_dict(state)
    with pytest.raises(ValueError, match="saved reward has the parts"):
        combined({"b": WORD}, shaping=["standardise"]).load_state_dict(state)


def test_a_reward_with_running_statistics_has_one_worker() -> None:
    config = CombinedReward.Config(parts={"a": WORD}, shaping=["standardise"], workers=2)
    assert any("one worker" in message for message in CombinedReward.check(config))


@pytest.mark.parametrize("moment", ["before", "after", "none"])
def test_parts_learn_from_their_own_scores_when_they_say(moment: str) -> None:
    learner = {"_target_": "combination_rewards.Learner", "moment": moment, "weight": 2}
    reward = combined({"net": learner, "rule": {**SECOND, "when": {"has": "answer"}}})
    assert CombinedReward.traits(reward.config).update_when == moment
    groups = scored(reward, group("1 10", "3 20", "7 x"), group("5 30", "x 1", name="h", answer=None))
    assert reward.update(groups) == ({} if moment == "none" else {"learner/bias": 3.0})
    if moment == "before":
        first, second = reward.rescore(groups)
        assert values(first) == [2 * 4 + 10, 2 * 6 + 20, None]
        assert values(second) == [2 * 8, None]
        assert first.samples[2].reason == "unreadable: part rule: it is an x"
        assert first.samples[0].components["rule/twice"] == 20
    fresh = CombinedReward(reward.config, RewardContext())
    fresh.load_state_dict(reward.state_dict())
    assert values(fresh.score(groups)[0]) == values(reward.score(groups)[0])


def test_two_parts_that_learn_are_told_apart_and_must_agree() -> None:
    learner = {"_target_": "combination_rewards.Learner"}
    reward = combined({"a": learner, "b": learner})
    assert reward.update(scored(reward, group("2"))) == {"a/learner/bias": 2.0, "b/learner/bias": 2.0}
    config = CombinedReward.Config(parts={"a": learner, "b": {**learner, "moment": "before"}})
    assert any("at the same point of a step" in message for message in CombinedReward.check(config))


def test_a_part_that_learns_after_keeps_its_scores_while_statistics_are_counted_before() -> None:
    reward = combined({"a": {"_target_": "combination_rewards.Learner"}}, shaping=["standardise"])
    groups = scored(reward, group(*RUNNING))
    reward.update(groups)
    assert values(reward.rescore(groups)[0]) == pytest.approx([-1.069045, 0, -0.534522, 1.603567], abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("delta", "must be a list of steps"),
        (["delt"], "step 1: there is no kind 'delt'; did you mean delta?"),
        ([{"eta": 1}], "step 1 has no kind"),
        (["delta", "clip"], "step 2 (clip): eta is required"),
        ([{"kind": "clip", "eta": True}], "step 1 (clip): eta must be a number"),
        ([{"kind": "clip", "etta": 1, "eta": 1}], "there is no option etta; did you mean eta?"),
        ([{"kind": "par", "k": -1, "reference_value": 0}], "step 1 (par): k=-1 must be a number, above 0"),
        (["par"], "step 1 (par) needs one of reference_value, reference_rewards, reference_responses; none is given"),
        ([{"kind": "lsc", "reference_value": 0, "quantile": 0.5}], "quantile and fit have no effect"),
        ([{"kind": "clamp"}], "step 1 (clamp) needs low or high"),
        ([{"kind": "clamp", "low": 2, "high": 1}], "low=2 must be below high=1"),
        ([{"kind": "overlong", "max_tokens": 5, "buffer_tokens": 6}], "buffer_tokens=6 is more than max_tokens=5"),
        (["standardise", {"kind": "par", "reference_value": 0}], "put par first"),
    ],
)
def test_mistakes_name_the_step(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_steps(steps)


@pytest.mark.parametrize(
    ("variable", "name", "options"),
    [("SHAPING", "Power", '{"exponent": 0.3}'), ("COMBINER", "SoftMinimum", '{"temperature": 0.5}')],
)
def test_the_contract_can_be_run_against_the_classes_of_the_docs(
    repository: Path, tmp_path: Path, variable: str, name: str, options: str
) -> None:
    page = (repository / "docs/rewards/combination.md").read_text()
    (tmp_path / "my_steps.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(repository)]),
        variable: f"my_steps.{name}",
        f"{variable}_OPTIONS": options,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(repository / "tests/contract")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
