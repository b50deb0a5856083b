"""Where responses come from: what fits with `rollout.source`, what has no effect, and what is predicted of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlkit.config.loading import load_config
from rlkit.config.machine import fits, this_machine
from rlkit.config.memory import processes
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun
from rlkit.config.store import stored_bytes
from rlkit.models.folder import model_folder

Load = Callable[..., ResolvedRun]
SINGLE = ("cluster=single_gpu", "cluster.gpu_memory_gib=79", "cluster.host_memory_gib=200")


def rows(file: Path, *content: Mapping[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return file


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def one(*arguments: str) -> ResolvedRun:
        return load_config([f"run_dir={tmp_path / 'run'}", *arguments])

    return one


@pytest.fixture
def pairs(tmp_path: Path) -> Sequence[str]:
    content = ({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(20))
    return "algorithm=dpo", "data=pairs", f"data.path={rows(tmp_path / 'pairs.jsonl', *content)}"


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    content = ({"prompt": f"{i}?", "response": "yes", "score": 3 if i == 4 else i % 2} for i in range(20))
    return rows(tmp_path / "scored.jsonl", *content)


@pytest.fixture
def copied_policy(tmp_path: Path) -> Path:
    """The model with its tokenizer as another version writes it."""
    folder = Path(shutil.copytree(model_folder("embedded:policy"), tmp_path / "copied"))
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))
    return folder


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("rollout.max_concurrent_samples=8", "samples nothing"),
        ("rollout.sleep=always", "take turns, which they do not"),
        ("rollout.structured.regex=a", "samples nothing"),
        ("verifier=choice", "samples nothing"),
        ("reward=rule", "have their own labels"),
        ("algorithm.samples_per_prompt=4", "the data say how many"),
        ("evaluation.samples=3", "samples nothing"),
        ("critic.reference_cache=file", "has no effect"),
        ("trainer.total_epochs=2 trainer.total_steps=3", "exclude each other"),
    ],
)
def test_what_has_no_effect_on_recorded_responses_is_refused(
    load: Load, pairs: Sequence[str], option: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        load(*pairs, *option.split())


def test_what_has_an_effect_on_recorded_responses_is_taken(load: Load, pairs: Sequence[str], tmp_path: Path) -> None:
    options = ("rollout.temperature=0.7", "rollout.max_response_tokens=64", "rollout.max_prompt_tokens=64")
    run = load(*pairs, *options, f"learner.reference_cache={tmp_path / 'file'}")
    assert run.config.rollout.workers == 0


def test_a_cache_that_nobody_fills_is_refused(load: Load, pairs: Sequence[str]) -> None:
    for others in (["algorithm=grpo"], [*pairs, "algorithm.reference_every_steps=2"], [*pairs, "algorithm=simpo"]):
        with pytest.raises(ConfigError, match=r"learner\.reference_cache.* has no effect"):
            load(*others, "learner.reference_cache=file")


def test_a_filter_without_scores_is_refused(load: Load) -> None:
    distilled = ("algorithm=distill", "algorithm.teacher=embedded:policy")
    with pytest.raises(ConfigError, match="no reward is used"):
        load(*distilled, "buffer.drop_equal_rewards=true")
    assert load(*distilled, "buffer.truncated=drop_group").config.buffer.drops_groups


def test_a_reward_that_follows_the_policy_needs_one_that_samples(load: Load, pairs: Sequence[str]) -> None:
    follows = ("reward=implicit_prm", "reward.reference=policy", "rollout.judge=always")
    with pytest.raises(ConfigError, match="they are not sent"):
        load(*pairs, *follows)


def test_a_score_that_is_no_label_is_named_with_its_row(load: Load, scored: Path) -> None:
    labels = ("data=responses", f"data.path={scored}")
    with pytest.raises(ConfigError, match=r"scored\.jsonl:5 has a score of 3"):
        load("algorithm=kto", *labels)
    assert load("algorithm=sft", *labels).data_config.path == str(scored)


def test_tokenizers_are_compared_by_their_tokens(load: Load, copied_policy: Path) -> None:
    teacher = ("algorithm=distill", f"algorithm.teacher={copied_policy}")
    load(*teacher)
    file = copied_policy / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    *_, first, second = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="has a different tokenizer"):
        load(*teacher)


def test_no_engine_is_predicted_where_nothing_samples(load: Load, pairs: Sequence[str]) -> None:
    run = load(*pairs, *SINGLE)
    assert "rollout engine" not in [process.name for process in processes(run, 79 * 2**30)]
    small = load(*pairs, *SINGLE, "cluster.gpu_memory_gib=3", "learner.tokens_per_microbatch=1024")
    assert this_machine(small).gpu_bytes == 3 * 2**30
    assert not [issue for issue in fits(small) if "gpu_memory_utilization" in issue.where]
    sampled = load("algorithm=grpo", "reward=rule", "cluster.weight_transfer=object_store")
    recorded = load(*pairs, "cluster.weight_transfer=object_store")
    assert stored_bytes(recorded) < stored_bytes(sampled) / 2
