"""How requests are shared out over rollout workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlkit.experience import Message, Prompt
from rlkit.rollout.dealing import deal
from rlkit.rollout.requests import GroupRequest

SAMPLES = 4


def requests_of(lengths: list[int]) -> list[GroupRequest]:
    return [
        GroupRequest(f"{i:03d}", Prompt(f"p{i}", (Message("user", "?"),), (1,) * length), SAMPLES, seed=0, step=1)
        for i, length in enumerate(lengths)
    ]


def tokens(share: list[GroupRequest]) -> int:
    return sum(len(request.prompt.token_ids) for request in share)


def test_long_prompts_do_not_meet_on_one_worker() -> None:
    first, second = deal(requests_of([100, 1, 100, 1, 100, 1, 100, 1]), [0, 0])
    assert tokens(first) == tokens(second) == 202
    assert len(first) == len(second) == 4


@given(st.lists(st.integers(1, 500), max_size=30), st.integers(1, 5))
def test_every_request_is_dealt_once_in_order_and_counts_differ_by_one(lengths: list[int], workers: int) -> None:
    requests = requests_of(lengths)
    shares = deal(requests, [0] * workers)
    assert sorted(request.id for share in shares for request in share) == [request.id for request in requests]
    assert all([r.id for r in share] == sorted(r.id for r in share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert deal(requests, [3]) == [requests]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 30))
def test_who_has_less_open_gets_more(load: list[int], count: int) -> None:
    shares = deal(requests_of([5] * count), [SAMPLES * groups for groups in load])
    after = [before + len(share) for before, share in zip(load, shares, strict=True)]
    given_some = [total for total, share in zip(after, shares, strict=True) if share]
    assert sum(map(len, shares)) == count
    assert all(total <= least + 1 for total in given_some for least in after)
