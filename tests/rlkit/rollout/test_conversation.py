"""The ledger holds what the engine was given and what it returned, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.environments.base import Step
from rlkit.experience import Episode, Message, ToolCall
from rlkit.experience.types import FinishReason
from rlkit.rollout.conversation import Conversation, as_sample
from rlkit.rollout.rendering import Bridge
from rlkit.rollout.requests import Response


def response(ids: list[int], finish: FinishReason = "stop", version: int = 0) -> Response:
    versions = np.full(len(ids), version, np.int32)
    return Response("r", np.array(ids, np.int32), -np.array(ids, np.float32) / 100, finish, 0, versions)


TURNS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 90), min_size=1, max_size=5),
        st.lists(st.integers(100, 190), max_size=5),
        st.integers(0, 1),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@given(st.lists(st.integers(200, 290), min_size=1, max_size=4), TURNS, st.integers(1, 40), st.booleans())
def test_what_is_trained_is_what_the_engine_saw(
    prompt: list[int], turns: list[tuple[list[int], list[int], int]], limit: int, answered_last: bool
) -> None:
    conversation = Conversation(prompt, limit)
    seen: list[list[int]] = []
    played: list[tuple[int, list[int]]] = []
    for number, (ids, after, drop) in enumerate(turns):
        before = conversation.prompt()
        room = conversation.room
        assert room >= 1 and room == len(prompt) + limit - len(before)
        sampled = ids[:room]
        seen.append([*before, *sampled])
        conversation.sampled(response(sampled, version=number), f"turn {number}")
        conversation.judged(Step(reward=float(number), state=f"state {number}"))
        played.append((number, sampled))
        if number == len(turns) - 1 and not answered_last:
            break
        kept = conversation.observed(Bridge(drop, after), [Message("user", "go on")])
        assert kept == (len(seen[-1]) - drop + len(after) < len(prompt) + limit)
        if not kept:
            assert conversation.prompt() == seen[-1]
            break
        assert conversation.prompt() == seen[-1][: len(seen[-1]) - drop] + after
    sample = as_sample([conversation], 3, 7, Episode("done"))
    assert [*prompt, *sample.token_ids.tolist()] == seen[-1]  # observations that nobody answered are not in it
    assert len(sample) <= limit
    assert sample.versions is not None and sample.logprobs is not None and sample.mask is not None
    np.testing.assert_array_equal(sample.mask, sample.token_ids < 100)
    np.testing.assert_array_equal(sample.versions >= 0, sample.mask)
    expected = np.where(sample.mask, -sample.token_ids.astype(np.float32) / 100, 0)
    np.testing.assert_array_equal(sample.logprobs, expected.astype(np.float32))
    ends = [0, *(span.end for span in sample.spans)]
    assert [span.start for span in sample.spans] == ends[:-1] and ends[-1] == len(sample)  # no gap, no overlap
    own = [span for span in sample.spans if span.role == "assistant"]
    assert [span.data["reward"] for span in own] == [float(number) for number, _ in played]
    for span, (number, ids) in zip(own, played, strict=True):
        inside = sample.token_ids[span.start : span.end].tolist()
        assert inside in (ids, ids[:-1]) and sample.mask[span.start : span.end].all()
        assert set(sample.versions[span.start : span.end].tolist()) <= {number}
    assert sample.text == f"turn {played[-1][0]}"
    assert sample.policy_versions == (sample.versions[sample.mask][0], played[-1][0])


def test_a_sample_of_an_episode() -> None:
    conversation = Conversation([9], 10)
    call, bad = ToolCall("look"), ToolCall("", error="no JSON")
    conversation.sampled(response([1, 2], version=4), "hm", [call, bad])
    conversation.judged(Step(reward=0.5, metrics={"near": 0.25}))
    said = [Message("tool", "a", "look", (), "1"), Message("tool", "b", "look", (), "2")]
    assert conversation.observed(Bridge(1, [50, 51, 52]), said)
    conversation.sampled(response([3], "length", version=5), "done")
    sample = as_sample([conversation], 0, 1, Episode("done", success=True))
    assert sample.token_ids.tolist() == [1, 50, 51, 52, 3]
    assert [(span.start, span.end, span.kind, span.role) for span in sample.spans] == [
        (0, 1, "turn", "assistant"), (1, 4, "turn", "tool"), (4, 5, "turn", "assistant")
    ]  # fmt: skip
    assert sample.spans[0].data == {"reward": 0.5, "state": None, "malformed": 1, "metrics": {"near": 0.25}}
    assert (sample.finish_reason, sample.text, sample.policy_versions) == ("length", "done", (4, 5))  # a cut turn
    assert sample.episode is not None and sample.episode.success
    assert sample.episode.messages == (
        Message("assistant", "hm", calls=(call, bad)), *said, Message("assistant", "done")
    )  # fmt: skip


@pytest.mark.parametrize(("ended", "reason"), [("done", "stop"), ("turns", "length"), ("tokens", "length")])
def test_budgets_are_the_policys_doing(ended: str, reason: str) -> None:
    conversation = Conversation([9], 4)
    conversation.sampled(response([1, 2]), "")
    assert not conversation.observed(Bridge(0, [5, 6]), [Message("user", "?")])  # no token would be left
    assert conversation.messages == [Message("assistant", "")]
    assert as_sample([conversation], 0, 0, Episode(ended)).finish_reason == reason  # type: ignore[arg-type]


def test_nothing_sampled_and_two_observations() -> None:
    conversation = Conversation([9], 9)
    with pytest.raises(ValueError, match="nothing was sampled"):
        as_sample([conversation], 0, 0, Episode("failed", "died"))
    conversation.sampled(response([1]), "")
    assert conversation.observed(Bridge(0, [5]), [])
    with pytest.raises(RuntimeError, match="does not answer a turn"):
        conversation.observed(Bridge(0, [5]), [])
