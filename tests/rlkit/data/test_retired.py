"""Prompts that the policy has solved are not drawn again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_groups import make_group

from rlkit.data.order import MixtureOrder, PromptOrder
from rlkit.experience import Message, Prompt
from rlkit.experience.buffer import DataSolvedError
from rlkit.experience.filters import solved


def prompts(count: int, prefix: str = "") -> list[Prompt]:
    return [Prompt(id=f"{prefix}{i}", messages=(Message("user", "q"),), token_ids=(i,)) for i in range(count)]


def ids(order: PromptOrder | MixtureOrder, count: int) -> list[str]:
    return [prompt.id for prompt in order.take(count)]


def test_a_prompt_is_solved_at_the_share_and_above() -> None:
    """OLMo 3: seven of eight is enough, and what could not be judged counts on neither side."""
    right = (1.0,) * 7
    groups = [
        make_group("seven", *right, 0.0),
        make_group("six", *right[:6], 0.0, 0.0),
        make_group("unjudged", *right, None, 0.0),
        make_group("worth", 0.9, 0.9),
        make_group("none", None, None),
    ]
    groups = [replace(group, prompt=replace(group.prompt, id=group.id)) for group in groups]
    assert solved(groups, 0.875) == ["seven", "unjudged"]
    assert solved(groups, 0.75) == ["seven", "six", "unjudged"]
    assert solved(groups, 1.0) == solved(groups, None) == []


@given(st.integers(1, 20), st.integers(0, 30), st.sets(st.integers(0, 19)), st.integers(0, 3))
def test_what_is_retired_never_comes_again_and_the_rest_keeps_its_order(
    count: int, before: int, numbers: set[int], seed: int
) -> None:
    retired = {str(i) for i in numbers if i < count}
    order, plain = PromptOrder(prompts(count), seed), PromptOrder(prompts(count), seed)
    assert ids(order, before) == ids(plain, before)
    order.retire(retired)
    assert order.left == count - len(retired)
    if not order.left:
        assert order.take(0) == []
        with pytest.raises(DataSolvedError, match=r"the data are solved: .*buffer\.retire_solved_share"):
            order.take(1)
        return
    later = [one for one in ids(plain, 5 * count) if one not in retired]
    assert ids(order, len(later)) == later
    assert order.metrics().get("data/retired", 0) == len(retired)
    resumed = PromptOrder(prompts(count), seed)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert ids(resumed, 10) == ids(order, 10)


def test_a_checkpoint_from_before_has_none() -> None:
    state = PromptOrder(prompts(3), 0).state_dict()
    del state["retired"]
    order = PromptOrder(prompts(3), 0)
    order.load_state_dict(state)
    assert order.left == 3


def test_a_source_without_prompts_leaves_its_share_to_the_others() -> None:
    both = [*prompts(2, "a/"), *prompts(5, "b/")]
    order = MixtureOrder(both, 0, {"a": 1.0, "b": 1.0})
    assert Counter(one[0] for one in ids(order, 8)) == {"a": 4, "b": 4}
    order.retire(["a/0", "a/1", "b/3"])
    assert order.metrics()["data/retired"] == 3
    resumed = MixtureOrder(both, 1, {"a": 1.0, "b": 1.0})
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    drawn = ids(order, 8)
    assert set(drawn) == {"b/0", "b/1", "b/2", "b/4"} and ids(resumed, 8) == drawn
    order.retire([f"b/{i}" for i in range(5)])
    with pytest.raises(DataSolvedError):
        order.take(1)


def test_the_share_of_a_source_without_prompts_goes_to_the_others_by_their_weights() -> None:
    sources = [*prompts(2, "a/"), *prompts(2, "b/"), *prompts(2, "c/")]
    order = MixtureOrder(sources, 0, {"a": 19.0, "b": 1.0, "c": 80.0})
    assert Counter(one[0] for one in ids(order, 100)) == {"a": 19, "b": 1, "c": 80}
    order.retire(["c/0", "c/1"])
    for _ in range(3):
        assert Counter(one[0] for one in ids(order, 1000)) == {"a": 950, "b": 50}
