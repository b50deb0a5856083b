"""What every shaping step and every combiner must keep to. Run it against your own:

    SHAPING=my_module.MyStep SHAPING_OPTIONS='{"my_key": 3}' python -m pytest tests/contract
    COMBINER=my_module.MyCombiner python -m pytest tests/contract

Without the variables it checks all of the package's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from combination_rewards import SPANS, WORD, combined, group, score

from rewards.combined.reward import CombinedReward
from rewards.combined.scores import COMBINERS, Combiner, Rule, parse_combiner
from rewards.shaping.steps import (
    STEPS,
    FusingStep,
    OutcomeStep,
    ProcessStep,
    ReferenceStep,
    RunningStatistics,
    RunningStep,
    Step,
    parse_steps,
)
from rlkit.experience.section import Named

NEEDED: dict[str, dict[str, Any]] = {
    "par": {"reference_value": 0.5},
    "centre": {"reference_value": 0.5},
    "lsc": {"reference_value": 0.5},
    "clamp": {"low": 0.0},
    "overlong": {"max_tokens": 4, "buffer_tokens": 2},
    "clip": {"eta": 0.5},
    "turn_dense": {"maximum": 4},
}
"""Options without a default of the package's steps."""


def sections(variable: str, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a user would write: of their own, or of all of the package's."""
    if variable in os.environ:
        return [{"kind": os.environ[variable], **json.loads(os.environ.get(f"{variable}_OPTIONS", "{}"))}]
    if {"SHAPING", "COMBINER"} & os.environ.keys():
        return []
    return [{"kind": kind, **options} for kind, options in known.items()]


def kind_of(section: dict[str, Any]) -> str:
    return str(section["kind"])


STEP_SECTIONS = sections("SHAPING", {kind: NEEDED.get(kind, {}) for kind in STEPS})
COMBINER_SECTIONS = sections("COMBINER", {kind: {} for kind in COMBINERS})
each_step = pytest.mark.parametrize("section", STEP_SECTIONS, ids=kind_of)
each_combiner = pytest.mark.parametrize("section", COMBINER_SECTIONS, ids=kind_of)
VALUES = np.array([0.25, 1.0, -0.5, 2.0])
LENGTHS = np.array([1, 2, 3, 400])
REFERENCES = np.array([0.1, 0.4, 0.7])


def parsed(section: dict[str, Any]) -> Step:
    (step,) = parse_steps([section])
    return step


def applied(step: Step, values: np.ndarray) -> np.ndarray:
    match step:
        case OutcomeStep():
            return step.apply(values, LENGTHS[: len(values)])
        case ReferenceStep():
            return step.compare(values, REFERENCES)
        case RunningStep():
            statistics = RunningStatistics()
            statistics.add(VALUES)
            return step.normalise(values, statistics)
        case ProcessStep():
            return step.apply(values)
        case FusingStep():
            return step.apply(values, 0.5)
    raise AssertionError(f"{type(step).__name__} is of no known level")


def check_options(part: Named, section: dict[str, Any]) -> None:
    fields = {name: field for name, field in type(part).model_fields.items() if name != "kind"}
    assert [name for name, field in fields.items() if not field.description] == [], "write what each option means"
    assert (type(part).__doc__ or "").strip(), "write what it does: --help shows the first line"
    assert part.kind == section["kind"]
    assert type(part).model_validate_json(part.model_dump_json()) == part, "a written configuration is read again"


@each_step
def test_the_options_of_a_step_are_typed_and_documented(section: dict[str, Any]) -> None:
    check_options(parsed(section), section)
    with pytest.raises(ValueError, match="there is no option no_such_option"):
        parse_steps([{**section, "no_such_option": 1}])


@each_step
def test_a_step_keeps_the_number_of_values_and_makes_them_finite(section: dict[str, Any]) -> None:
    step = parsed(section)
    before = VALUES.copy()
    for count in (len(VALUES), 1):
        result = applied(step, VALUES[:count])
        assert np.shape(result) == (count,)
        assert np.isfinite(result).all()
    np.testing.assert_array_equal(VALUES, before, "a step changes no array in place")


@each_step
def test_a_step_makes_equal_results_of_equal_values(section: dict[str, Any]) -> None:
    np.testing.assert_array_equal(applied(parsed(section), VALUES), applied(parsed(section), VALUES))


@each_step
def test_a_step_works_in_a_combination(section: dict[str, Any]) -> None:
    """Valid samples keep a value or say why not; invalid ones stay invalid; the state is saved and read."""
    step = parsed(section)
    part = SPANS if isinstance(step, ProcessStep | FusingStep) else WORD
    parts = {"a": part, "b": WORD} if isinstance(step, FusingStep) else {"a": part}
    reward = combined(parts, shaping=[section])
    assert CombinedReward.check(reward.config) == []
    judged = group("1 2", "3 4", "0.5 1") if part is SPANS else group("1", "x", "3")
    scored = judged.with_scores(reward.score([judged])[0])
    reward.update([scored])
    (scores,) = reward.rescore([scored])
    assert [s.valid for s in scores.samples] == [True, part is SPANS, True]
    again = combined(parts, shaping=[section])
    again.load_state_dict(reward.state_dict())
    assert reward.score([judged])[0].samples == again.score([judged])[0].samples
    assert reward.score([replace(judged, samples=())])[0].samples == ()


def test_importing_them_is_cheap() -> None:
    """The configuration layer imports them."""
    modules = {type(parsed(section)).__module__ for section in STEP_SECTIONS}
    modules |= {type(parse_combiner(section)).__module__ for section in COMBINER_SECTIONS}
    script = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'vllm', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", "import these where they are used"


def combine(combiner: Combiner, *values: float, weights: float = 1.0) -> float:
    return Rule(combiner)(np.array(values), np.full(len(values), weights))


@each_combiner
def test_the_options_of_a_combiner_are_typed_and_documented(section: dict[str, Any]) -> None:
    check_options(parse_combiner(section), section)
    with pytest.raises(ValueError, match="there is no option no_such_option"):
        parse_combiner({**section, "no_such_option": 1})


@each_combiner
def test_a_combiner_makes_one_finite_value(section: dict[str, Any]) -> None:
    combiner = parse_combiner(section)
    for values in ((0.5,), (0.5, -1.0), (2.0, 2.0, 2.0)):
        assert isinstance(combine(combiner, *values), float)
        assert np.isfinite(combine(combiner, *values))
        assert combine(combiner, *values) == combine(combiner, *values)
    if not combiner.weighted:
        assert combine(combiner, 1.0, 2.0) == combine(combiner, 1.0, 2.0, weights=0.5)


@each_combiner
def test_a_combiner_works_in_a_combination(section: dict[str, Any]) -> None:
    reward = combined({"a": WORD, "b": {**WORD, "place": 1}}, combine=section)
    assert CombinedReward.check(reward.config) == []
    assert CombinedReward.Config(**reward.config.model_dump(mode="json")) == reward.config
    good, bad = score(reward, "1 2", "1 x")
    assert good.valid
    assert not bad.valid
    assert len(good.ensemble) == (2 if parse_combiner(section).ensemble else 0)
