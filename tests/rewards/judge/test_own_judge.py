"""The judge of one's own in docs/rewards/judge.md, against a real HTTP server on loopback."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from judge_fixture import Asked, JudgeServer, Reply, is_right
from paths import ROOT
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.judge.base import BaseJudge, JudgeError
from rlkit.config.loading import load_config
from rlkit.experience import GroupScores

CRITERIA = ["It gives a number.", "It gives the right answer.", "It is polite."]


@pytest.fixture(scope="module")
def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/rewards/judge.md").read_text(), flags=re.DOTALL)
    return block


@pytest.fixture
def module(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "my_judge.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import my_judge  # type: ignore[import-not-found]

    yield my_judge
    sys.modules.pop("my_judge")


def honest(asked: Asked) -> Reply:
    """Right responses meet all criteria, others none."""
    count = len(re.findall(r"^\d+\. ", asked.user, re.MULTILINE))
    return Reply(json.dumps({"reasoning": "looked", "met": [is_right(asked.responses[0])] * count}))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(honest) as server:
        yield server


def started(module: ModuleType, server: JudgeServer, **options: Any) -> BaseJudge:
    reward: BaseJudge = module.Checklist(
        module.Checklist.Config(base_url=server.url, model="judge", **options), RewardContext()
    )
    reward.start()
    server.asked.clear()
    return reward


def score(reward: BaseJudge, *texts: str, criteria: Any = CRITERIA) -> GroupScores:
    group = make_group("g", texts)
    (scores,) = reward.score([replace(group, prompt=replace(group.prompt, columns={"criteria": criteria}))])
    return scores


def test_it_is_short(code: str) -> None:
    assert len(code.splitlines()) < 100


def test_it_is_a_prompt_and_a_parser(module: ModuleType, server: JudgeServer) -> None:
    reward = started(module, server)
    server.judge = lambda asked: Reply('{"reasoning": "rude", "met": [true, true, false]}')
    (sample,) = score(reward, "42, you fool.").samples
    assert (sample.value, sample.trace) == (pytest.approx(2 / 3), "rude")
    assert dict(sample.components) == {"judge": sample.value, "guard": 0.0}
    (asked,) = server.asked
    assert "3. It is polite." in asked.user and "What is 6 times 7?" in asked.user
    assert asked.responses == ["42, you fool."]


def test_what_every_judge_has_it_has(module: ModuleType, server: JudgeServer) -> None:
    reward = started(module, server, max_reasks=1)
    server.judge = lambda asked: Reply('{"met": [1, 1, 1]}') if "broken" in asked.user else honest(asked)
    right, again, empty, broken = score(reward, "42", "42", "Solution:", "broken").samples
    assert right.value == again.value == 1.0
    assert empty.value == 0.0 and empty.components["guard"] == 1.0
    assert not broken.valid and broken.reason.startswith("unparsable: met is not a list of 3 times true or false")
    assert len(server.asked) == 1 + 2, "one question, and one that is asked twice"
    assert server.asked[-1].body["messages"][3]["content"].startswith("This cannot be read: met is not a list")
    server.judge = lambda asked: Reply(status=401)
    assert score(reward, "41").samples[0].reason.startswith("refused: the judge answered 401")
    assert score(reward, "42").samples[0].value == 1.0, "verdicts are remembered"
    assert score(reward, "42", criteria=[]).samples[0].reason == "no_criteria: the row has none"


def test_it_is_probed_at_the_start(module: ModuleType, server: JudgeServer) -> None:
    server.judge = lambda asked: Reply('{"met": [true]}')
    with pytest.raises(JudgeError, match="it accepts responses without content"):
        started(module, server)
    started(module, server, probe="off")


def test_it_is_chosen_by_its_dotted_path(module: ModuleType, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = [{"question": f"What is {i} times 7?", "answer": str(7 * i), "criteria": CRITERIA} for i in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    endpoint = ["reward.base_url=http://127.0.0.1:9/v1", "reward.model=judge"]
    data = ["data=jsonl", f"data.path={rows}", f"run_dir={tmp_path / 'run'}"]
    load_config(["reward=judge", "reward._target_=my_judge.Checklist", *endpoint, *data], elsewhere=())
