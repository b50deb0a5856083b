"""Several sources in one run: read together, drawn by weight, each with its own epochs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from table_fixture import good, write

from rlkit.data.base import DataError
from rlkit.data.mixture import Mixture
from rlkit.data.order import MixtureOrder, PromptOrder, order_of
from rlkit.experience import Message, Prompt


def mixture(folder: Path, **more: Any) -> Mixture:
    pairs = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(10)]
    sources = {
        "maths": {"kind": "jsonl", "path": str(write(folder / "maths.jsonl", good(20))), "heldout_share": 0.25},
        "taste": {
            "kind": "pairs",
            "path": str(write(folder / "taste.jsonl", pairs)),
            "heldout_share": 0.2,
            "weight": 3,
        },
    }
    return Mixture(Mixture.Config(sources=sources, **more), seed=0)


def test_sources_are_read_together_and_keep_their_names(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    assert source.check() == []
    assert source.weights() == {"maths": 1.0, "taste": 3.0}
    assert source.provides() == {"responses"}, "references are responses; answers and pairs one source alone has"
    train, heldout = source.load("train")[0], source.load("heldout")[0]
    for problems, counts in ((train, {"maths": 15, "taste": 8}), (heldout, {"maths": 5, "taste": 2})):
        assert Counter(problem.id.partition("/")[0] for problem in problems) == counts
    assert train[0].id == f"maths/{train[0].origin}"


def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", good(20))
    paths = {"path": str(rows), "heldout_path": str(write(tmp_path / "heldout.jsonl", good(30)[25:]))}
    other = {"path": str(write(tmp_path / "other.jsonl", good(30)[24:])), "heldout_path": str(rows)}
    source = Mixture(
        Mixture.Config(sources={k: {"kind": "jsonl", **v} for k, v in {"a": paths, "b": other}.items()}), 0
    )
    train, bad = source.load("train")
    assert [problem.id for problem in train] == ["b/other.jsonl:1"]
    assert len(bad) == 25 and "asks the same" in bad[0].reason


def test_messages_name_the_source(tmp_path: Path) -> None:
    sources = {"a": {"kind": "chat", "path": str(tmp_path / "absent.jsonl")}}
    (message,) = Mixture(Mixture.Config(sources=sources), 0).check()
    assert message.startswith(f"data.sources.a.path={tmp_path / 'absent.jsonl'}: no such file")


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ({}, "names no source"),
        ({"a": {"path": "x"}}, "a.kind is missing; it must be one of"),
        (
            {"a": {"kind": "chats", "path": "x"}},
            "one of arithmetic, chat, environment, hf, jsonl, pairs, reasoning_gym, responses",
        ),
        ({"a": {"kind": "chat"}}, "a.path: Field required"),
        ({"a": {"kind": "chat", "path": "x", "traim_on": "last"}}, "a.traim_on: no such key; did you mean train_on"),
        ({"a": {"kind": "chat", "path": "x", "weight": 0}}, "a.weight must be a number above 0"),
        ({"a/b": {"kind": "chat", "path": "x"}}, "only letters, digits and _"),
        ({"a": {"kind": "rlkit.data.mixture.Mixture", "sources": {}}}, "cannot contain another mixture"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(sources: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Mixture.Config(sources=sources)


def prompts(**counts: int) -> list[Prompt]:
    return [
        Prompt(f"{name}/{i}", (Message("user", "q"),), (len(name), i)) for name, n in counts.items() for i in range(n)
    ]


def test_any_stretch_has_the_sources_in_proportion() -> None:
    order = MixtureOrder(prompts(a=5, b=50, c=7), 0, {"a": 1, "b": 2, "c": 0.5})
    drawn = [prompt.id.partition("/")[0] for prompt in order.take(350)]
    assert Counter(drawn) == {"a": 100, "b": 200, "c": 50}
    for start in range(0, 350, 7):
        assert Counter(drawn[start : start + 7]) == {"a": 2, "b": 4, "c": 1}
    assert order.metrics() == {"data/epochs": 20, "data/epochs/a": 20, "data/epochs/b": 4, "data/epochs/c": 50 / 7}


def test_each_source_is_drawn_in_its_own_order() -> None:
    both = prompts(a=5, b=9)
    order = order_of(both, 3, {"a": 1, "b": 1})
    drawn = order.take(40)
    for name in "ab":
        own = [prompt for prompt in drawn if prompt.id.startswith(name)]
        assert own == PromptOrder([p for p in both if p.id.startswith(name)], 3).take(20)
    assert isinstance(order_of(both, 3, {}), PromptOrder)
    assert order.named({"a/1", "b/3", "c"}) == {prompt.id: prompt for prompt in both if prompt.id in {"a/1", "b/3"}}


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 5))
def test_resumes_anywhere(before: int, after: int, weight: int) -> None:
    def new(seed: int) -> MixtureOrder:
        return MixtureOrder(prompts(a=4, b=6), seed, {"a": weight, "b": 2})

    order = new(0)
    order.take(before)
    state = json.loads(json.dumps(order.state_dict()))
    expected = order.take(after)
    resumed = new(1)
    resumed.load_state_dict(state)
    assert resumed.take(after) == expected
    assert resumed.state_dict() == order.state_dict()


def test_other_sources_are_refused_at_resume() -> None:
    weights = {"a": 1.0, "b": 1.0}
    state = MixtureOrder(prompts(a=4, b=6), 0, weights).state_dict()
    with pytest.raises(DataError, match=r"sources a, b, now a, c"):
        MixtureOrder(prompts(a=4, c=6), 0, {"a": 1, "c": 1}).load_state_dict(state)
    with pytest.raises(DataError, match="other data"):
        MixtureOrder(prompts(a=4, b=5), 0, weights).load_state_dict(state)
    with pytest.raises(DataError, match="several sources"):
        PromptOrder(prompts(a=4), 0).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.sources\.b has no usable"):
        MixtureOrder(prompts(a=4), 0, weights)
