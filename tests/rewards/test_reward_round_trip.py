"""A reward's configuration, written out with every field, is the same configuration again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sandbox_fixture import need_bubblewrap

from rlkit.config.loading import load_config
from rlkit.config.parts import config_text

ROWS = ("data=jsonl", "data.path={folder}/rows.jsonl", "data.answer_column=null")


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward=json_schema", "reward.schema_file={folder}/schema.json"],
        ["reward=code", "reward.isolation=bubblewrap", *ROWS],
        ["reward=code", "reward.isolation=http", "reward.url=http://127.0.0.1:1", *ROWS],
        ["reward=regex_match", "reward.pattern='#### {{answer}}'"],
        ["reward=judge", "reward.base_url=http://127.0.0.1:1/v1", "reward.model=m", "reward.mode=pairwise"],
        ["reward=polar", "reward.backend=http_vllm", "reward.urls=[http://127.0.0.1:1]"],
        ["reward=preference", "reward.model_path=embedded:polar", "reward.layout=pair"],
        ["algorithm=prime", "reward=implicit_prm", "reward.outcome=null", "reward.update=none"],
        ["reward=[rule,polar]", "reward.parts.polar.weight=0.3", "reward.shaping=[{{kind:par,reference_value:0.0}}]"],
        ["reward=length", "reward.max_tokens=9"],
        ["reward=format", "reward.tags=[think,answer]"],
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)  # fmt: skip
def test_what_was_written_out_loads_again(overrides: list[str], tmp_path: Path) -> None:
    if "reward.isolation=bubblewrap" in overrides:
        need_bubblewrap()
    (tmp_path / "schema.json").write_text("{}")
    rows = [{"question": f"q{i}", "tests": ["assert True"]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [text.format(folder=tmp_path) for text in overrides]
    first = load_config([*given, f"run_dir={tmp_path / 'run'}"], elsewhere=())
    # What an actor is given: the section as it was resolved.
    section = {key: value for key, value in first.config.reward.items() if key != "_target_"}
    assert first.reward_class.Config(**section) == first.reward_config
    file = tmp_path / "config.yaml"
    file.write_text(config_text(first.config))
    assert load_config([f"run_dir={tmp_path / 'again'}"], file, elsewhere=()).config.reward == first.config.reward
