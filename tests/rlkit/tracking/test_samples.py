"""Rows of samples.jsonl, and the writer beside the steps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT

from algorithms.base import Advantages, Experience
from rlkit.config.tracking import TrackingConfig
from rlkit.experience import Episode, Group, GroupScores, Message, Score, Segment, Span, SpanReward
from rlkit.experience.filters import BufferConfig, make_filter
from rlkit.tracking.recorder import Recorder
from rlkit.tracking.run_folder import RunFolder, json_text
from rlkit.tracking.samples import sample_rows, transcript, verdicts_by_group, widest_group
from tests.fixtures.groups import group, value


def test_all_samples_of_every_group_or_its_best_and_worst() -> None:
    groups = [group("g0", [value(0.5), value(2.0), value(-1.0)]), group("g1", [value(1.0), value(0.0)])]
    advantages = [np.full(3, float(i), np.float32) for i in range(5)]
    rows = sample_rows(7, groups, advantages, None)
    assert [(r["group_id"], r["rank"], r["sample"], r["reward"], r["advantage"]) for r in rows] == [
        ("g0", None, 0, 0.5, 0.0),
        ("g0", "best", 1, 2.0, 1.0),
        ("g0", "worst", 2, -1.0, 2.0),
        ("g1", "best", 0, 1.0, 3.0),
        ("g1", "worst", 1, 0.0, 4.0),
    ]
    assert sample_rows(7, groups, advantages, None, keep="best_worst") == rows[1:]
    row = json.loads(json_text(rows[1]))
    assert (row["group_size"], row["group_rewards"], row["length"]) == (3, [0.5, 2.0, -1.0], 3)
    assert (row["staleness"], row["correct"], row["verdict"], row["dropped"]) == (2, None, None, None)
    assert row["step"] == 7
    assert row["response"] == "g0 response 1"
    assert row["token_ids"] == [0, 1, 2]
    assert row["prompt"] == [{"role": "user", "content": "question g0"}]
    assert row["answer"] == "72"
    assert row["references"] == ["a reference"]
    assert row["components"] == {"math": 2.0}
    assert row["finish_reason"] == "stop"
    assert (row["policy_versions"], row["version_spans"]) == ([4, 5], [[0, 4]])
    assert row["valid"] is True


def test_rows_say_which_policy_wrote_which_tokens() -> None:
    one = group("g0", [value(1.0)] * 2, tokens=6)
    mixed = replace(one.samples[0], versions=np.array([4, 4, -1, 4, 5, -1], np.int32))
    recorded = replace(one.samples[1], logprobs=None)
    first, second = sample_rows(7, [replace(one, samples=(mixed, recorded))], None, None)
    assert (first["version_spans"], first["staleness"], second["staleness"]) == ([(0, 4), (4, 5)], 2, None)


def test_conversations_of_an_episode_can_be_read() -> None:
    def turn(start: int, end: int, reward: float) -> Span:
        return Span(start, end, "turn", "assistant", {"reward": reward, "state": None, "malformed": 0})

    said = tuple(Message(role, text) for role, text in [("assistant", "a"), ("user", "go on"), ("assistant", "b")])
    helper = (Message("user", "Help."),)
    ids = np.arange(6, dtype=np.int32)
    sample = replace(
        group("e", [value(1.0)]).samples[0],
        token_ids=ids,
        logprobs=np.zeros(6, np.float32),
        mask=np.array([1, 1, 0, 1, 1, 1], np.bool_),
        spans=(turn(0, 2, 0.0), Span(2, 3, "turn", "user"), turn(3, 4, 0.5), turn(4, 6, 1.0)),
        episode=Episode("done", messages=(*said, Message("assistant", "c"))),
        segments=(Segment(0, 4, ids[:2]), Segment(4, 6, ids[:3], helper)),
    )
    assert transcript(sample).splitlines() == [
        "assistant: a", "user: go on", "assistant: b", "-- a separate conversation --", "user: Help.", "assistant: c"
    ]  # fmt: skip
    (row,) = sample_rows(1, [replace(group("e", [value(1.0)]), samples=(sample,))], None, None)
    assert row["segments"] == [
        {"turn": 0, "context_tokens": 2, "behind": []},
        {"turn": 3, "context_tokens": 3, "behind": [{"role": "user", "content": "Help."}]},
    ]
    assert [turn.get("reward") for turn in row["turns"]] == [0.0, None, 0.5, 1.0]
    anew = replace(sample, segments=(Segment(0, 3, ids[:2]), Segment(3, 6, ids[:3])))
    assert "-- rendered again --" in transcript(anew)
    plain = replace(group("e", [value(1.0)]), samples=(replace(sample, segments=()),))
    assert "segments" not in sample_rows(1, [plain], None, None)[0]


def test_invalid_is_never_the_worst_and_never_zero() -> None:
    groups = [
        group("mixed", [Score.invalid("timeout: 3 s"), value(0.2), value(0.1)]),
        group("single", [Score.invalid("timeout"), value(0.2)]),
        group("none", [Score.invalid("timeout: 3 s"), Score.invalid("exception")]),
    ]
    rows = sample_rows(1, groups, None, None)
    assert [(r["group_id"], r["rank"], r["reward"]) for r in rows] == [
        ("mixed", None, None),
        ("mixed", "best", 0.2),
        ("mixed", "worst", 0.1),
        ("single", None, None),
        ("single", "only", 0.2),
        ("none", "invalid", None),
        ("none", None, None),
    ]
    assert (rows[5]["reason"], rows[5]["valid"]) == ("timeout: 3 s", False)
    assert rows[1]["group_rewards"] == [None, 0.2, 0.1]
    assert rows[1]["failed_in_group"] == {"timeout": 1}


def test_process_rewards_rank_by_their_sum() -> None:
    steps = Score(None, span_rewards=(SpanReward(0, 1, 0.5), SpanReward(1, 3, 0.5)))
    tokens = Score(None, token_rewards=np.full(3, 0.1, np.float32))
    worst, best = sample_rows(1, [group("g", [tokens, steps])], None, None)
    assert (best["rank"], worst["rank"]) == ("best", "worst")


def test_limit_draws_groups_at_random_but_repeatably() -> None:
    groups = [group(f"g{i}", [value(0), value(1)]) for i in range(10)]
    rows = sample_rows(3, groups, None, 2)
    assert len(rows) == 4
    assert rows == sample_rows(3, groups, None, 2)
    assert len({r["group_id"] for step in range(20) for r in sample_rows(step, groups, None, 2)}) > 5
    assert sample_rows(3, groups, None, 0) == []
    with pytest.raises(ValueError, match="3 advantages for 20 samples"):
        sample_rows(3, groups, [np.zeros(3, np.float32)] * 3, None)
    assert widest_group([groups[0], group("wide", [value(0), value(5)])]).id == "wide"  # type: ignore[union-attr]


def test_a_row_has_the_verdict_on_its_very_sample(tmp_path: Path) -> None:
    groups = [group("g0", [value(0.5), value(2.0)]), group("g1", [value(1.0), value(1.0)])]
    right, wrong = Score(9.0, components={"correct": 1.0}), Score(9.0, components={"correct": 0.0})
    graded = [groups[0].with_scores(GroupScores((right, Score.invalid("timeout")))),
              groups[1].with_scores(GroupScores((wrong, right)))]  # fmt: skip
    assert verdicts_of(groups, graded) == [(1.0, None), (None, None), (0.0, None), (1.0, None)]
    assert verdicts_of(groups, groups) == [(None, 0.5), (None, 2.0), (None, 1.0), (None, 1.0)]
    assert verdicts_of(groups, None) == [(None, None)] * 4


def verdicts_of(groups: list[Group], judged: list[Group] | None) -> list[tuple[Any, Any]]:
    rows = sample_rows(1, groups, None, None, judged=verdicts_by_group(judged))
    return [(row["correct"], row["verdict"]) for row in rows]


def test_groups_that_were_not_trained_say_why(tmp_path: Path) -> None:
    """At most as many rejected ones as trained ones; the writer has no part in how long a step takes."""
    lost, alone = Score.invalid("timeout"), [value(1.0), value(0.0)]
    groups = [group("a", [value(0.0), value(1.0)]), group("b", [lost, lost]), group("c", alone)]
    keep = np.array([1, 1, 0, 0, 0, 0], np.bool_)
    advantages = Advantages([np.full(3, i, np.float32) for i in range(6)], keep)
    rejected = [
        group("right", [Score(1.0), Score(1.0)]),
        group("wrong", [Score(0.0), Score(0.0)]),
        group("alike", [Score(0.5), Score(0.5)]),
        group("easy", [Score(1.0), Score(0.9)]),
        group("left", alone),
    ]
    cut = replace(rejected[0], id="cut", samples=tuple(replace(s, finish_reason="length") for s in groups[0].samples))
    config = BufferConfig(drop_equal_rewards=True, max_group_reward=0.9, truncated="drop_group")

    def rows(limit: int | None, others: list[Group]) -> list[dict[str, Any]]:
        folder = RunFolder(tmp_path / str(limit))
        recorder = Recorder(TrackingConfig(sample_groups_per_step=limit), folder, make_filter(config))
        recorder.step(Experience(groups, 6), advantages, others)
        folder.close()
        return [json.loads(line) for line in folder.samples.read_text().splitlines()]

    everything = rows(None, rejected[:3])
    assert {row["group_id"]: row["dropped"] for row in everything} == {
        "a": None, "b": "invalid", "c": "algorithm", "right": "all_right", "wrong": "all_wrong",
        "alike": "drop_equal_rewards",
    }  # fmt: skip
    assert [row["advantage"] for row in everything] == [0, 1, 2, 3, 4, 5] + [None] * 6
    assert all(row["step"] == 6 for row in everything)
    rest = {row["group_id"]: row["dropped"] for row in rows(3, [*rejected[3:], cut])}
    assert rest.items() >= {"easy": "max_group_reward", "left": "surplus", "cut": "truncated"}.items()
    assert len({row["group_id"] for row in rows(2, rejected)}) == 4
    assert rows(0, rejected) == []


def test_what_cannot_be_recorded_is_said_and_leaves_whole_lines(tmp_path: Path, caplog: Any) -> None:
    folder = RunFolder(tmp_path / "run")
    recorder = Recorder(TrackingConfig(), folder, make_filter(BufferConfig()))
    recorder.failed(1, [group("a", [value(1.0)])])
    odd = replace(group("b", [value(1.0)]), samples=(replace(group("b", [value(1.0)]).samples[0], text=object()),))  # type: ignore[arg-type]
    recorder.failed(2, [odd])
    recorder.failed(3, [group("c", [value(1.0)])])
    sizes = folder.sizes()  # waits for the writer
    rows = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert [(row["step"], row["dropped"]) for row in rows] == [(1, "step_failed"), (3, "step_failed")]
    assert sizes["samples.jsonl"] == folder.samples.stat().st_size
    assert (
        "not written: samples.jsonl and tokens/ of step 2: TypeError: object cannot be written as JSON" in caplog.text
    )


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk."""
    folder = RunFolder(tmp_path / "run")
    folder.append_samples([{"step": 1}])
    code = (
        "import resource, signal, sys; from pathlib import Path; from rlkit.tracking.run_folder import RunFolder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"folder = RunFolder({str(folder.path)!r}, resume=True)\n"
        "try: folder.append_samples([{'text': 'x' * 10_000}])\n"
        "except OSError: folder.append_samples([{'step': 3}])"
    )
    folder.close()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert folder.samples.read_text() == '{"step":1}\n{"step":3}\n'
