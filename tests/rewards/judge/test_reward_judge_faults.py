"""`reward=judge` when things go wrong: malformed answers, 429, 500 for ever, slowness, no server, no budget left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from judge_fixture import Asked, JudgeServer, Reply, honest, started
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.judge.base import JudgeError
from rewards.judge.reward import JudgeReward
from rlkit.experience import Score

RIGHT, WRONG = "6 * 7 = 42\n#### 42", "6 * 7 = 41\n#### 41"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        yield server


def score(reward: JudgeReward, *texts: str) -> tuple[Score, ...]:
    (scores,) = reward.score([make_group("g", list(texts))])
    return scores.samples


def first_then_honest(*replies: Reply) -> Callable[[Asked], Reply]:
    """These replies, then honest ones."""
    left = list(replies)
    return lambda asked: left.pop(0) if left else honest(asked)


@pytest.mark.parametrize(
    "reply",
    [
        Reply("I would say 10."),
        Reply('{"reasoning": "no end'),
        Reply(None),
        Reply('{"reasoning": "", "score": 99}'),
    ],
)
def test_an_answer_that_cannot_be_read_is_asked_again(server: JudgeServer, reply: Reply) -> None:
    reward = started(server)
    server.judge = first_then_honest(reply)
    assert score(reward, RIGHT)[0].value == 1.0
    again = server.asked[1].body["messages"]
    assert len(again) == 4 and again[3]["content"].startswith("This cannot be read: ")


def test_after_enough_unreadable_answers_it_is_invalid_and_not_zero(server: JudgeServer) -> None:
    reward = started(server, max_reasks=1)
    server.judge = lambda asked: Reply("Ten out of ten!") if "41" in asked.responses[0] else honest(asked)
    right, wrong = score(reward, RIGHT, WRONG)
    assert right.value == 1.0
    assert not wrong.valid and wrong.reason.startswith("unparsable: the answer is not one JSON object")
    assert "asked 2 times" in wrong.reason and "Ten out of ten!" in wrong.reason
    assert len(server.asked) == 3
    server.judge = honest
    assert score(reward, WRONG)[0].value == 0.0, "failures are not remembered"


def test_429_is_waited_out_as_the_server_asks(server: JudgeServer) -> None:
    reward = started(server)
    server.judge = first_then_honest(Reply(status=429, headers={"Retry-After": "0.7"}))
    began = time.monotonic()
    assert score(reward, RIGHT)[0].value == 1.0
    assert 0.7 <= time.monotonic() - began < 5
    assert len(server.asked) == 2


def test_a_pause_beyond_the_deadline_is_not_waited_for(server: JudgeServer) -> None:
    reward = started(server, timeout_seconds=5.0)
    server.judge = lambda asked: Reply(status=429, headers={"Retry-After": "3600"})
    began = time.monotonic()
    assert score(reward, RIGHT)[0].reason.startswith("rate_limited: the judge answered 429")
    assert time.monotonic() - began < 2 and len(server.asked) == 1


def test_500_for_ever_ends_and_is_invalid(server: JudgeServer) -> None:
    reward = started(server, attempts=3)
    server.judge = lambda asked: Reply(status=500)
    (found,) = score(reward, RIGHT)
    assert not found.valid and found.reason.startswith("unavailable: the judge answered 500")
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_other_refusals_are_not_tried_again(server: JudgeServer, status: int) -> None:
    reward = started(server)
    server.judge = lambda asked: Reply(status=status) if "41" in asked.responses[0] else honest(asked)
    right, wrong = score(reward, RIGHT, WRONG)
    assert right.value == 1.0
    assert wrong.reason == f'refused: the judge answered {status}: {{"error": {{"message": "as told"}}}}'
    assert len(server.asked) == 2


@pytest.mark.parametrize("raw", [b"<html>gateway</html>", b"{}", b'{"choices": []}', b"[]", b"\xff\xfe", b"9" * 5000])
def test_a_body_that_is_no_chat_completion_is_tried_again(server: JudgeServer, raw: bytes) -> None:
    reward = started(server, attempts=2)
    server.judge = first_then_honest(Reply(raw=raw))
    assert score(reward, RIGHT)[0].value == 1.0
    server.judge = lambda asked: Reply(raw=raw)
    assert score(reward, WRONG)[0].reason.startswith("bad_response: no chat completion")


def test_a_body_that_is_not_the_gzip_it_says_is_tried_again(server: JudgeServer) -> None:
    torn = Reply(raw=b"no gzip", headers={"Content-Encoding": "gzip"})
    reward = started(server, attempts=2)
    server.judge = first_then_honest(torn)
    assert score(reward, RIGHT)[0].value == 1.0
    server.judge = lambda asked: torn
    assert score(reward, WRONG)[0].reason.startswith("unavailable: DecodingError")


def test_a_slow_call_has_a_deadline_and_another_try(server: JudgeServer) -> None:
    reward = started(server, call_timeout_seconds=0.4)
    server.judge = first_then_honest(Reply("{}", after_seconds=30))
    assert score(reward, RIGHT)[0].value == 1.0
    assert len(server.asked) == 2


def test_the_scoring_call_as_a_whole_has_a_deadline(server: JudgeServer) -> None:
    reward = started(server, timeout_seconds=2.0, attempts=100, max_concurrent=1)
    server.judge = lambda asked: honest(asked) if "42" in asked.responses[0] else Reply("{}", after_seconds=30)
    began = time.monotonic()
    found = score(reward, RIGHT, *(f"{WRONG} {i}" for i in range(5)))
    assert time.monotonic() - began < 2.0, "it ends before the worker would be killed"
    assert found[0].value == 1.0
    assert all(sample.reason.startswith("timeout: ") for sample in found[1:])


def test_a_server_that_dies_and_comes_back(server: JudgeServer) -> None:
    reward = started(server, attempts=2)
    server.__exit__()
    assert score(reward, RIGHT)[0].reason.startswith("unavailable: ")
    with JudgeServer(port=server.port):
        assert score(reward, RIGHT)[0].value == 1.0


def test_pairwise_goes_on_with_the_comparisons_it_has(server: JudgeServer) -> None:
    texts = ["right 42", "wrong 1", "wrong 2", "broken"]
    reward = started(server, mode="pairwise", max_reasks=0)
    server.judge = lambda asked: Reply("?") if "broken" in asked.responses else honest(asked)
    found = score(reward, *texts)
    assert [sample.value for sample in found] == [1.0, 0.25, 0.25, None]
    assert found[3].reason.startswith("unparsable: ")


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_calls_beyond_the_budget_are_not_made(server: JudgeServer) -> None:
    reward = started(server, max_calls=4)  # one was spent at the start
    found = score(reward, *(f"{RIGHT} {i}" for i in range(6)))
    assert [sample.valid for sample in found].count(True) == 3 == len(server.asked)
    reasons = {sample.reason for sample in found if not sample.valid}
    assert reasons == {"budget: all 4 calls have been made (reward.max_calls)"}
    assert score(reward, f"{RIGHT} again")[0].reason.startswith("budget: ") and len(server.asked) == 3


def test_the_budget_is_dealt_out_to_workers(server: JudgeServer) -> None:
    reward = started(server, max_calls=4, workers=2)
    score(reward, RIGHT, WRONG)
    assert len(server.asked) == 1, "two calls for this worker, one of them at the start"


def test_tokens_are_counted(server: JudgeServer) -> None:
    reward = started(server, max_tokens=250, max_concurrent=1)  # 100 tokens a call
    found = score(reward, *(f"{RIGHT} {i}" for i in range(4)))
    assert len(server.asked) == 2
    assert sum(sample.reason == "budget: 300 of 250 tokens have been used (reward.max_tokens)" for sample in found) == 2


def test_a_token_budget_needs_a_server_that_counts(server: JudgeServer) -> None:
    server.judge = lambda asked: Reply(honest(asked).content, usage=False)
    with pytest.raises(JudgeError, match=r"does not report its usage; limit reward.max_calls instead"):
        started(server, max_tokens=1000)


# ---- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["refuse", "off"])
def test_a_judge_that_cannot_be_asked_is_refused_at_the_start(server: JudgeServer, probe: str) -> None:
    server.judge = lambda asked: Reply(status=401)
    with pytest.raises(JudgeError, match="cannot be used: refused: the judge answered 401"):
        started(server, probe=probe)
    server.judge = lambda asked: Reply("Hello! How can I help?")
    with pytest.raises(JudgeError, match="cannot be used: unparsable"):
        started(server, probe=probe)


def test_no_server_at_all() -> None:
    config = JudgeReward.Config(base_url="http://127.0.0.1:9/v1", model="judge", attempts=2)
    reward = JudgeReward(config, RewardContext())
    with pytest.raises(JudgeError, match=r"the judge judge at http://127\.0\.0\.1:9/v1 cannot be used: unavailable"):
        reward.start()
    reward.close()


def test_the_reasoning_is_kept_for_people(server: JudgeServer) -> None:
    reward = started(server)
    server.judge = lambda asked: Reply(json.dumps({"reasoning": "I added it up.", "score": 10}))
    assert score(reward, RIGHT)[0].trace == "I added it up."
