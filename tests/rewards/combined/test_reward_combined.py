"""Several rewards as one: values, routing, failures, process rewards, preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from combination_rewards import SECOND, SPANS, TOKENS, WORD, combined, group, score

from rewards.combined.reward import CombinedReward, PartFailedError
from rewards.combined.scores import averaged_pairs
from rlkit.experience import GroupScores, PreferencePair


def incompatibilities(parts: Mapping[str, Any], **options: Any) -> list[str]:
    return CombinedReward.check(CombinedReward.Config(parts=dict(parts), **options))


@pytest.mark.parametrize(
    ("options", "value", "ensemble"),
    [
        ({}, 2 + 4, ()),
        ({"combine": "product"}, 8, ()),
        ({"combine": "min"}, 2, (2, 4)),
        ({"combine": "median"}, 3, (2, 4)),
        ({"combine": "mean"}, 3, (2, 4)),
        ({"combine": "mean_minus_std", "spread_weight": 2}, 3 - 2 * 1, (2, 4)),
        ({"combine": "mean_minus_variance", "spread_weight": 0.5}, 3 - 0.5, (2, 4)),
        ({"combine": "logical_and"}, -np.log1p(np.exp(-2)) - np.log1p(np.exp(-4)), ()),
    ],
)
def test_values_are_combined(options: dict[str, Any], value: float, ensemble: tuple[float, ...]) -> None:
    (found,) = score(combined({"a": WORD, "b": SECOND}, **options), "2 4")
    assert found.value == pytest.approx(value)
    assert found.ensemble == ensemble
    expected = {"a": 2.0, "a/twice": 4.0, "b": 4.0, "b/twice": 8.0}
    assert found.components == expected | ({"ensemble_std": 1.0} if ensemble else {})
    assert found.trace == "a: read 2\nb: read 4"


def test_weights() -> None:
    parts = {"a": {**WORD, "weight": 0.5}, "b": {**SECOND, "weight": -1}}
    assert score(combined(parts), "2 4")[0].value == pytest.approx(1 - 4)
    parts = {"a": {**WORD, "weight": 3}, "b": SECOND}
    assert score(combined(parts, combine="mean"), "2 4")[0].value == pytest.approx(2.5)


def test_a_part_with_weight_0_is_only_shown() -> None:
    (found,) = score(combined({"a": WORD, "b": {**SECOND, "weight": 0}}), "2 4")
    assert (found.value, found.components["b"]) == (2.0, 4.0)


def test_each_prompt_is_routed_to_the_parts_that_judge_it() -> None:
    parts = {"rule": {**WORD, "when": {"has": ["answer"]}}, "model": {**SECOND, "when": {"lacks": ["answer"]}}}
    reward = combined(parts)
    # `!` would raise, `x` be invalid, if the other part were asked
    texts = [group("1 !"), group("! 10", name="h", answer=None), group("2 x", name="i"), group("x 20", answer=None)]
    first, second, third, fourth = reward.score(texts)
    assert [scores.samples[0].value for scores in (first, second, third, fourth)] == [1.0, 10.0, 2.0, 20.0]
    assert set(second.samples[0].components) == {"model", "model/twice"}


@pytest.mark.parametrize(
    ("when", "columns", "judged"),
    [
        ({"equals": {"source": "gsm8k"}}, {"source": "gsm8k"}, True),
        ({"equals": {"source": ["math", "gsm8k"]}}, {"source": "gsm8k"}, True),
        ({"equals": {"source": "gsm8k"}}, {"source": "math"}, False),
        ({"equals": {"source": "gsm8k"}}, {}, False),
        ({"equals": {"level": 1}}, {"level": 1}, True),
        ({"equals": {"level": 1}}, {"level": "1"}, False),
        ({"equals": {"level": 1}}, {"level": True}, False),
        ({"differs": {"source": "gsm8k"}}, {"source": "gsm8k"}, False),
        ({"differs": {"source": "gsm8k"}}, {}, True),
        ({"has": "tests"}, {"tests": []}, False),
        ({"has": "tests"}, {"tests": ["assert"]}, True),
        ({"has": "flag"}, {"flag": False}, True),
        ({"lacks": "tests"}, {"tests": None}, True),
        ({"has": ["references", "source"], "equals": {"level": [1, 2]}}, {"source": "a", "level": 2}, True),
        ({"has": ["references", "source"], "equals": {"level": [1, 2]}}, {"source": "a", "level": 3}, False),
    ],
)
def test_conditions(when: dict[str, Any], columns: dict[str, Any], judged: bool) -> None:
    reward = combined({"a": {**WORD, "when": when}})
    (scores,) = reward.score([group("7", **columns)])
    assert scores.samples[0].valid == judged
    if not judged:
        assert scores.samples[0].reason.startswith("unrouted: no part")


def test_what_a_part_cannot_judge_is_invalid_and_names_the_part() -> None:
    reward = combined({"a": WORD, "b": SECOND})
    good, bad, worse = score(reward, "1 2", "1 x", "x x")
    assert good.value == 3.0
    assert bad.reason == "unreadable: part b: it is an x"
    assert worse.reason == "unreadable: part a: it is an x; part b: unreadable: it is an x"
    assert bad.value is None
    assert "b: saw an x" in bad.trace


def test_a_part_that_is_not_asked_cannot_fail() -> None:
    reward = combined({"a": WORD, "b": {**SECOND, "when": {"lacks": "answer"}}})
    assert score(reward, "1 x")[0].value == 1.0


def test_parts_that_raise_are_all_named() -> None:
    reward = combined({"a": WORD, "fine": WORD, "b": SECOND})
    with pytest.raises(PartFailedError) as caught:
        score(reward, "1 !")
    assert str(caught.value) == "part b: RuntimeError: word 1 is on fire"
    both = combined({"a": WORD, "b": SECOND, "d": {"_target_": "reward_samples.Misbehaving"}})
    with pytest.raises(PartFailedError, match="part a: RuntimeError: word 0 is on fire; part b: RuntimeError"):
        score(both, "! !")


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("None", "wrong_type"),
        ("string", "wrong_type"),
        ("wrong length", "wrong_length"),
        ("nan", "not_finite"),
        ("None inside", "wrong_type"),
        ("bare number", "wrong_type"),
        ("too many tokens", "wrong_length"),
    ],
)
def test_a_part_that_breaks_the_contract_makes_invalid_scores(order: str, kind: str) -> None:
    first, *_ = score(combined({"odd": {"_target_": "reward_samples.Misbehaving"}}), order, "good")
    assert not first.valid
    assert first.reason.startswith(f"{kind}: part odd: ")


def test_a_value_that_overflows_is_invalid() -> None:
    (found,) = score(combined({"a": WORD, "b": SECOND}, combine="product"), "1e200 1e200")
    assert found.reason.startswith("not_finite: combine=product")


def test_a_part_that_cannot_start_is_named() -> None:
    with pytest.raises(PartFailedError, match="part b cannot start: ValueError: the model folder is empty"):
        combined({"a": WORD, "b": {"_target_": "reward_samples.Misbehaving", "fail_start": True}})


def test_process_rewards_are_summed_with_weights() -> None:
    parts = {"a": {**TOKENS, "weight": 2}, "b": TOKENS, "c": {**SPANS, "weight": 0.5}, "d": SPANS, "e": WORD}
    (found,) = score(combined(parts), "1 2 3")
    assert found.value == 1.0
    assert found.token_rewards is not None
    assert found.token_rewards.tolist() == [3, 6, 9]
    assert [(s.start, s.end, s.value) for s in found.span_rewards] == [(0, 1, 1.5), (1, 2, 3.0), (2, 3, 4.5)]


def test_process_rewards_alone_have_no_value() -> None:
    (found,) = score(combined({"a": TOKENS}), "1 2")
    assert found.value is None
    (mean,) = score(combined({"a": {**TOKENS, "weight": 3}, "b": TOKENS}, combine="mean"), "1 2")
    assert mean.token_rewards is not None
    assert mean.token_rewards.tolist() == [1, 2]
    (silent,) = score(combined({"a": TOKENS, "b": WORD}, combine="min"), "1 2")
    assert silent.reason.startswith("no_value: part a")


def test_preferences_are_averaged_by_weight() -> None:
    left, right = [PreferencePair(0, 1, 0.9)], [PreferencePair(1, 0, 0.8), PreferencePair(2, 0)]
    assert averaged_pairs([left, right], [1, 1]) == (
        PreferencePair(0, 1, pytest.approx(0.55)),  # type: ignore[arg-type]
        PreferencePair(2, 0, 1.0),
    )
    assert averaged_pairs([left, right], [3, 1])[0].probability == pytest.approx((3 * 0.9 + 0.2) / 4)
    assert averaged_pairs([left], [-1]) == (PreferencePair(1, 0, pytest.approx(0.9)),)  # type: ignore[arg-type]
    assert averaged_pairs([left, right], [0, 1])[0] == PreferencePair(1, 0, 0.8)


def test_preferences_among_valid_samples_stay() -> None:
    reward = combined({"a": {**WORD, "pairs": True}})
    both, one = reward.score([group("1", "2"), group("1", "x", name="h")])
    assert both.pairs == (PreferencePair(0, 1, 0.9),)
    assert one.pairs == ()


def test_a_combination_can_be_a_part() -> None:
    inner = {
        "_target_": "rewards.combined.reward.CombinedReward",
        "combine": "min",
        "parts": {"a": WORD, "b": SECOND},
        "shaping": [{"kind": "clamp", "high": 3}],
        "weight": 10,
    }
    (found,) = score(combined({"ensemble": inner, "rule": WORD}), "5 4")
    assert found.value == 10 * 3 + 5
    assert found.components["ensemble/a/twice"] == 10


def test_whole_groups_in_order() -> None:
    reward = combined({"a": WORD})
    made: Sequence[GroupScores] = reward.score([group("1", "2"), group("3", name="h")])
    assert [[s.value for s in scores.samples] for scores in made] == [[1, 2], [3]]
    assert reward.score([]) == []


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({"a": {**WORD, "weight": 2}}, {"combine": "min"}, "reward.parts.a.weight=2: has no effect"),
        ({"a": {**WORD, "weight": 0}}, {"combine": "mean"}, "reward.parts.a.weight=0: must be above 0"),
        ({"a": {**WORD, "workers": 2}}, {}, "reward.parts.a.workers=2: has no effect in a part"),
        ({"a": {**WORD, "max_failed_share": 0.9}}, {}, "set reward.max_failed_share"),
        ({"a": WORD}, {"timeout_seconds": 5}, "may take 120 s"),
        ({"a": TOKENS, "b": SPANS}, {"combine": "median"}, "a and b give process rewards"),
        ({"a": WORD}, {"shaping": ["delta"]}, "reward.shaping: delta shapes process rewards, and a gives none"),
        (
            {"a": {**WORD, "shaping": [{"kind": "lsc", "reference_value": 0}]}},
            {"combine": "logical_and"},
            "use combine=sum",
        ),
        ({"a": {**WORD, "broken": "/nope"}}, {}, "reward.parts.a.broken=/nope: no such folder"),
    ],
)
def test_what_does_not_fit_is_refused(parts: dict[str, Any], options: dict[str, Any], message: str) -> None:
    assert any(message in found for found in incompatibilities(parts, **options)), incompatibilities(parts, **options)


def test_fitting_parts_are_accepted() -> None:
    parts = {"a": {**WORD, "weight": 2}, "b": {**TOKENS, "shaping": [{"kind": "clip", "eta": 0.5}, "delta"]}}
    assert incompatibilities(parts) == []
    assert incompatibilities({"a": WORD, "b": WORD}, combine="mean_minus_std", workers=2) == []


def test_the_deadline_is_that_of_all_parts() -> None:
    config = CombinedReward.Config(parts={"a": {**WORD, "timeout_seconds": 7}, "b": WORD})
    assert config.timeout_seconds == 127


def test_needs_are_those_of_all_parts_and_routes() -> None:
    parts = {
        "a": {"_target_": "combination_rewards.Answered", "when": {"equals": {"source": "x"}, "lacks": "references"}},
        "b": {**WORD, "shaping": [{"kind": "par", "reference_rewards": "base_rewards"}]},
        "c": {"_target_": "rewards.polar.reward.PolarReward"},
    }
    traits = CombinedReward.traits(CombinedReward.Config(parts=parts))
    assert (traits.answer, traits.references) == (True, True)
    assert traits.columns == ("base_rewards", "rubric", "source")
