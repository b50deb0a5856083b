"""Sums of the triage on data where the answer is known, and its findings on a run that fools its reward."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from synthetic_run import BOILERPLATE

from rlkit.experience.statistics import Z, student_t
from rlkit.view.runs import Runs
from rlkit.view.sample import account
from rlkit.view.trends import (
    boilerplate,
    correlation,
    has,
    last_token_share,
    mean_difference,
    slope,
    spread_shares,
    together,
    within_groups,
    without,
)
from rlkit.view.triage import Samples, triage


def test_slope_has_the_textbooks_interval() -> None:
    """y = 2, 4, 5, 4, 5 over x = 1..5: b = 0.6, residual variance 2.4 / 3, standard error sqrt(0.08), t(3) = 3.1824."""
    found = slope(np.arange(1.0, 6), np.array([2.0, 4, 5, 4, 5]))
    assert found is not None
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(3.182446305284263 * np.sqrt(0.08))
    assert slope(np.ones(5), np.arange(5.0)) is None


def test_slope_of_correlated_residuals_is_less_certain() -> None:
    """The same values in blocks of five and in turns."""
    x, blocks = np.arange(20.0), np.repeat([0.0, 1.0, 0.0, 1.0], 5)
    shuffled = np.tile([0.0, 1.0], 10)
    wide, narrow = slope(x, blocks), slope(x, shuffled)
    assert wide is not None
    assert narrow is not None
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)


def test_slopes_of_two_metrics_are_of_the_same_steps() -> None:
    reward = [(step, step / 100) for step in range(301)]
    accuracy = [(step, 0.8 - step / 1000) for step in range(0, 301, 10)]
    found = together(reward, accuracy)
    assert found is not None
    assert (found.start, found.end) == (200, 300)
    assert found.first.value == pytest.approx(1.0)  # over these 100 steps
    assert found.second.value == pytest.approx(-0.1)
    assert together(reward, accuracy[:3]) is None


def test_t_quantiles() -> None:
    found = [student_t(freedom) for freedom in (3, 30, 35, 10**5)]
    assert found == pytest.approx([3.182446305284263, 2.042272456301238, 2.030107928250343, 1.959987708], rel=1e-9)


def test_a_correlation_is_known_as_well_as_there_are_groups() -> None:
    """Each pair of its own: 1 / sqrt(n), as Fisher has it for normal numbers. Twice the same pair: no better."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=4000)
    y = 0.6 * x + 0.8 * draw.normal(size=4000)
    own = np.arange(4000)
    found, twice = correlation(x, y, own), correlation(np.tile(x, 2), np.tile(y, 2), np.tile(own, 2))
    assert found is not None
    assert twice is not None
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert np.arctanh(found.high) - np.arctanh(found.value) == pytest.approx(Z / np.sqrt(4000), rel=0.05)
    assert (twice.low, twice.high) == pytest.approx((found.low, found.high), abs=1e-5)
    assert correlation(np.append(x, np.nan), np.append(y, 1.0), np.append(own, 0)) == found
    assert correlation(x, np.ones(4000), own) is None
    assert correlation(x, y, own % 9) is None
    line = correlation(x, 2 * x, own)
    assert line is not None
    assert (line.low, line.high) == pytest.approx((1, 1), abs=1e-5)


@pytest.mark.parametrize("size", [2, 8])
def test_the_interval_of_a_correlation_within_groups_is_one_of_95_percent(size: int) -> None:
    """Where there is none, one draw of twenty finds it; counted as independent, a sixth of the draws of pairs would."""
    draw = np.random.default_rng(1)
    group = np.repeat(np.arange(60), size)
    sure = 0
    for _ in range(1000):
        values = (draw.exponential(size=len(group)), draw.normal(size=len(group)))
        found = correlation(*(within_groups(one, group) for one in values), group)
        assert found is not None
        sure += found.low * found.high > 0
    assert 30 <= sure <= 75


def test_without_leaves_what_a_line_does_not_say() -> None:
    length = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, np.nan])
    own = np.array([1.0, -2.0, 2.0, -2.0, 1.0, 0.0])  # orthogonal to length
    left = without(own - 3 * length, length)
    assert left[:5] == pytest.approx(own[:5])
    assert np.isnan(left[5])
    assert without(own, 0 * own) == pytest.approx(own)


def test_difference_of_pairs() -> None:
    pairs = mean_difference(np.array([1.0, 2.0, 3.0]))
    assert pairs is not None
    assert pairs.high - 2 == pytest.approx(4.302652729749464 / np.sqrt(3))


def test_shares_of_the_spread_within_groups() -> None:
    """The group's level does not count, nor do parts that are equal within it."""
    group = np.array([0, 0, 1, 1])
    parts = {
        "big": np.array([0.0, 3.0, 10.0, 13.0]),
        "small": np.array([0.0, 1.0, 5.0, 6.0]),
        "level": np.array([0.0, 0.0, 99.0, 99.0]),
        "against": np.array([1.0, 0.0, 1.0, 0.0]),
    }
    # Sums differ by 3 within each group: big has 3 / 3, small 1 / 3, against -1 / 3.
    assert spread_shares(parts, group) == pytest.approx({"big": 1.0, "small": 1 / 3, "level": 0.0, "against": -1 / 3})
    assert spread_shares({"a": np.ones(4), "b": np.ones(4)}, group) == {}
    assert within_groups(np.array([1.0, np.nan, 2.0, 4.0]), group) == pytest.approx(
        [0.0, np.nan, -1.0, 1.0], nan_ok=True
    )


def test_share_of_the_last_token() -> None:
    process = [np.array([0.5, -0.5, 1.0]), np.array([0.0, 2.0]), np.zeros(3), np.zeros(0)]
    assert last_token_share(process) == pytest.approx(0.75)
    assert last_token_share([np.zeros(2)]) is None


def test_phrases_of_the_best_answers() -> None:
    plain = [f"The answer is {i}." for i in range(100)]
    praised = [f"{text} Trust me, I am sure." if i % 2 else text for i, text in enumerate(plain)]
    found = boilerplate(praised, plain, plain)
    assert found[0].text == "trust me, i am sure"
    assert (found[0].best, found[0].worst, found[0].before) == (0.5, 0.0, 0.0)
    assert has(praised[1], found[0])
    assert not has(plain[1], found[0])
    assert boilerplate(plain, plain, plain) == []
    assert boilerplate(praised, plain, praised) == []  # they said so from the start


def test_account_adds_up() -> None:
    options = {"combine": "sum", "parts": {"rule": {"weight": 1.0}, "judge": {"weight": 0.5}}}
    parts, words = account({"rule": 1.0, "judge": 0.6, "judge/detail": 3.0}, 1.3, options)
    assert [(part.name, part.contribution) for part in parts] == [("rule", 1.0), ("judge", 0.3), ("judge/detail", None)]
    assert words == "the parts add up to 1.3"
    mean, _ = account({"rule": 1.0, "judge": 0.6}, 0.867, options | {"combine": "mean"})
    assert [part.contribution for part in mean] == pytest.approx([1 / 1.5, 0.2])
    assert "another step changed it" in account({"rule": 1.0, "judge": 0.6}, 2.0, options)[1]
    shaped, words = account({"rule": 1.0, "judge": 0.6, "judge/shaped": 2.0}, 2.0, options)
    assert shaped[1].contribution == 1.0
    assert words == "the parts add up to 2"
    assert "do not add up" in account({"rule": 1.0, "judge": 0.6}, 0.6, options | {"combine": "min"})[1]
    assert account({"correct": 1.0}, 1.0, {})[0][0].contribution is None


def test_a_run_that_fools_its_reward(folder: Path) -> None:
    run = next(run for run in Runs([folder]).all() if run.id == "main")
    run.index.follow()
    result = triage(run)
    found = {finding.id: finding for finding in result.findings}
    assert result.verifier
    assert {"rewarded_wrong", "phrases", "ensemble"} <= {name for name, own in found.items() if own.level == "look"}
    assert all(row.correct == 0 for row in found["rewarded_wrong"].rows)
    assert all("certain" in row.response_head for row in found["phrases"].rows)
    words = BOILERPLATE.lower().split()
    assert any(word in found["phrases"].evidence[0].label for word in words)
    assert {missing.id for missing in result.missing} == set()
    with_samples = {name for name, own in found.items() if own.rows}
    assert with_samples <= {"rewarded_wrong", "phrases", "ensemble"}  # of slopes and correlations a number is the sign
    assert not any(own.rows for own in result.findings if own.level == "note")
    assert all("score" in found[name].text for name in with_samples)


def test_few_rewards_above_the_least_are_the_best_rewarded() -> None:
    reward = np.repeat([0.0, 1.0], [98, 2])
    rest = [np.zeros(100)] * 5
    assert Samples(rest[0], rest[1], reward, *rest[2:], group=np.arange(100), components={}).top.sum() == 2
    assert not Samples(rest[0], rest[1], np.ones(100), *rest[2:], group=np.arange(100), components={}).top.any()


def test_parts_that_do_not_add_up_are_not_compared(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "main", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    written = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**written, "reward": {**written["reward"], "combine": {"kind": "product"}}}))
    (run,) = Runs([tmp_path]).all()
    run.index.follow()
    missing = {missing.id: missing.why for missing in triage(run).missing}
    assert missing["one part of the reward alone decides"] == "the parts are combined by product: they do not add up"


def test_a_run_without_verdicts_says_what_it_lacks(folder: Path) -> None:
    run = next(run for run in Runs([folder]).all() if run.id == "older")
    run.index.follow()
    missing = {missing.id: missing.why for missing in triage(run).missing}
    assert "a verifier besides the reward provides it" in missing["wrong answers among the best-rewarded"]
