"""Judges of turns, against a real HTTP server on loopback: worked numbers, what they read, what cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from judge_fixture import Asked, JudgeServer, Reply, is_right

from rewards.base import RewardContext
from rewards.combined.reward import CombinedReward
from rewards.judge.base import JudgeError
from rewards.judge.turns import EpisodeJudge, SubgoalJudge, TurnJudge
from rlkit.experience import Episode, Group, GroupScores, Message, Prompt, Sample, Score, Span, ToolCall
from rlkit.experience.steps import process_rewards

CALL = ToolCall("ask", {"about": "fox"})
SAID = (
    Message("assistant", "let me see", calls=(CALL,)),
    Message("tool", "green", name="ask"),
    Message("assistant", "it is green"),
    Message("user", "sure?"),
    Message("assistant", "42"),
)
PROMPT = Prompt("p", (Message("user", "What colour?"),), (1,), answer="green", columns={"subgoals": list("abcd")})


def played(said: tuple[Message, ...] = SAID) -> Group:
    """Every message has two tokens."""
    spans = tuple(Span(2 * i, 2 * i + 2, "turn", message.role) for i, message in enumerate(said))
    mask = np.repeat([message.role == "assistant" for message in said], 2)
    ids = np.zeros(len(mask), np.int32)
    episode = Episode("done", messages=said)
    one = Sample(0, ids, np.zeros(len(ids), np.float32), said[-1].content, "stop", (0, 0), 0, mask, spans)
    return Group("g", PROMPT, (replace(one, episode=episode),))


def points(*verdicts: tuple[float, float]) -> Callable[[Asked], Reply]:
    """By turn."""

    def judge(asked: Asked) -> Reply:
        turn = asked.user.count("assistant:\n")
        got, most = verdicts[turn]
        return Reply(json.dumps({"reasoning": f"turn {turn}", "points": got, "of": most}))

    return judge


def started(kind: type[EpisodeJudge], server: JudgeServer, **options: Any) -> EpisodeJudge:
    options = {"probe": "off", "timeout_seconds": 20.0, "max_reasks": 0, **options}
    reward = kind(kind.Config(base_url=server.url, model="judge", **options), RewardContext())
    judge, server.judge = server.judge, lambda asked: Reply(json.dumps({"points": 1, "of": 1, "turns": [1]}))
    reward.start()
    server.judge = judge
    server.asked.clear()
    return reward


def scored(kind: type[EpisodeJudge], judge: Callable[[Asked], Reply], **options: Any) -> tuple[Score, list[Asked]]:
    with JudgeServer(judge) as server:
        reward = started(kind, server, **options)
        (scores,) = reward.score([played()])
        reward.close()
        return scores.samples[0], server.asked


def test_points_of_those_that_a_perfect_turn_would_get() -> None:
    score, asked = scored(TurnJudge, points((4, 6), (5, 5), (0, 4)))
    rewards, spans = process_rewards(played().samples[0], score)
    assert rewards.tolist() == pytest.approx([2 / 3, 1.0, 0.0]) and spans.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert score.value is None and score.components == {"judge": pytest.approx(5 / 9), "unread": 0.0}
    first, second, third = sorted(asked, key=lambda one: one.user.count("assistant:\n"))
    assert first.responses == ['let me see\n{"call": "ask", "arguments": {"about": "fox"}}']
    assert second.responses == ["it is green"] and "tool:\ngreen" in second.user
    assert third.responses == ["42"] and "sure?" in third.user and "sure?" not in second.user


@pytest.mark.parametrize(("outcome", "expected"), [(1.0, [2 / 3, 1.0, 0.0]), (0.0, [-1 / 3, 0.0, -1.0])])
def test_with_an_outcome_and_renorm_it_is_ppr(outcome: float, expected: list[float]) -> None:
    with JudgeServer(points((4, 6), (5, 5), (0, 4))) as server:
        own = {"_target_": "rewards.judge.turns.TurnJudge", "base_url": server.url, "model": "judge", "probe": "off"}
        right = {"_target_": "rewards.verifiers.match.ExactMatch", "answer_in": "response"}
        section = {"parts": {"judge": own, "right": right}, "shaping": [{"kind": "renorm"}]}
        reward = CombinedReward(CombinedReward.Config(**section), RewardContext())
        reward.start()
        group = played()
        answer = "42" if outcome else "43"
        group = replace(group, prompt=replace(group.prompt, answer=answer))
        (scores,) = reward.score([group])
        reward.close()
    assert scores.samples[0].value == outcome
    assert process_rewards(group.samples[0], scores.samples[0])[0].tolist() == pytest.approx(expected)


def test_a_turn_whose_verdict_cannot_be_read_has_no_process_reward() -> None:
    for bad in ((5, 4), (1, 0), (-1, 4)):
        score, _ = scored(TurnJudge, points((4, 6), bad, (0, 4)))
        rewards, spans = process_rewards(played().samples[0], score)
        assert rewards.tolist() == pytest.approx([2 / 3, 0.0]) and spans.tolist() == [[0, 2], [8, 10]]
        assert score.components["unread"] == 1.0
    nothing, _ = scored(TurnJudge, lambda _: Reply("no idea"))
    assert nothing.reason.startswith("unparsable: ")


def test_a_judge_that_is_away_makes_the_sample_invalid() -> None:
    def broken(asked: Asked) -> Reply:
        return Reply(status=400) if "sure?" in asked.user else points((4, 6), (5, 5), (0, 4))(asked)

    score, _ = scored(TurnJudge, broken)
    assert not score.valid and score.reason.startswith("refused: ")


def test_a_turn_without_content_earns_nothing_and_is_not_asked_about() -> None:
    said = (Message("assistant", ":"), Message("user", "?"), Message("assistant", "green"))
    with JudgeServer(points((9, 9), (1, 2))) as server:
        reward = started(TurnJudge, server)
        (scores,) = reward.score([played(said)])
        reward.close()
        assert len(server.asked) == 1
    assert process_rewards(played(said).samples[0], scores.samples[0])[0].tolist() == [0.0, 0.5]


def test_each_sub_goal_is_paid_once_at_the_turn_that_completes_it() -> None:
    """Of four, one in the first turn and one in the third; two in one turn count double."""

    def judge(turns: list[Any]) -> Callable[[Asked], Reply]:
        return lambda _: Reply(json.dumps({"reasoning": "r", "turns": turns}))

    score, (asked,) = scored(SubgoalJudge, judge([1, None, 3, None]))
    assert process_rewards(played().samples[0], score)[0].tolist() == [0.25, 0.0, 0.25]
    assert re.findall(r"TURN \d", asked.user) == ["TURN 1", "TURN 2", "TURN 3"] and "4. d" in asked.user
    score, _ = scored(SubgoalJudge, judge([2, 2, None, None]))
    assert process_rewards(played().samples[0], score)[0].tolist() == [0.0, 0.5, 0.0]
    for wrong in ([1, 2, 3], [4, None, None, None], [True, None, None, None], [0, None, None, None]):
        score, _ = scored(SubgoalJudge, judge(wrong))
        assert score.reason.startswith("unparsable: ")
    with JudgeServer() as server:
        reward = started(SubgoalJudge, server)
        group = replace(played(), prompt=replace(PROMPT, columns={"subgoals": "a"}))
        assert reward.score([group])[0].samples[0].reason.startswith("no_subgoals: ")
        reward.close()


@pytest.mark.parametrize("kind", [TurnJudge, SubgoalJudge])
def test_the_probe_sends_responses_without_content(kind: type[EpisodeJudge]) -> None:
    def judge(likes: Callable[[str], bool]) -> Callable[[Asked], Reply]:
        def reply(asked: Asked) -> Reply:
            good = likes(asked.responses[0])
            return Reply(json.dumps({"points": int(good), "of": 1, "turns": [1 if good else None]}))

        return reply

    def start(server: JudgeServer) -> GroupScores | None:
        reward = kind(kind.Config(base_url=server.url, model="judge"), RewardContext())
        reward.start()
        reward.close()
        return None

    with JudgeServer(judge(is_right)) as server:
        start(server)
    with JudgeServer(judge(lambda _: True)) as server, pytest.raises(JudgeError, match="failed the probe"):
        start(server)


def test_a_response_without_an_environment_is_invalid() -> None:
    with JudgeServer() as server:
        reward = started(TurnJudge, server)
        alone = replace(played().samples[0], spans=(), episode=None)
        (scores,) = reward.score([replace(played(), samples=(alone,))])
        reward.close()
    assert scores.samples[0].reason.startswith("no_episode: ")
