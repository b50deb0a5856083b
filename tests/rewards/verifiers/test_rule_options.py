"""Every option of `reward=` that is a rule: it composes, says what it needs, and its fields are documented."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from paths import ROOT

from rlkit.config.parts import import_part

CONF = ROOT / "conf" / "reward"
ALWAYS = [{"id": "punctuation:no_comma"}]
OPTIONS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("rule", {}, {"answer"}),
    ("math", {}, {"answer"}),
    ("gsm8k", {}, {"answer"}),
    ("multiple_choice", {}, {"answer"}),
    ("multiple_choice", {"options_column": "choices"}, {"answer", "choices"}),
    ("exact_match", {}, {"answer"}),
    ("exact_match", {"gold": "references"}, {"references"}),
    ("regex_match", {"pattern": "x"}, set()),
    ("regex_match", {"pattern": "x{answer}"}, {"answer"}),
    ("regex_match", {"pattern_column": "p"}, {"p"}),
    ("format", {}, set()),
    ("tool_call", {}, {"tool_calls"}),
    ("instructions", {}, {"instruction_id_list", "kwargs"}),
    ("instructions", {"always": ALWAYS}, set()),
    ("json_schema", {}, {"json_schema"}),
    ("length", {"max_tokens": 10}, set()),
    ("group_length", {}, set()),
    ("repetition", {}, set()),
]


@pytest.mark.parametrize(("name", "given", "needed"), OPTIONS)
def test_each_option(name: str, given: dict[str, Any], needed: set[str]) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    section = yaml.safe_load(text)
    kind = import_part("reward", section.pop("_target_"))
    config = kind.Config(**section, **given)
    traits = kind.traits(config)
    found = {*traits.columns, *(key for key in ("answer", "references") if getattr(traits, key))}
    assert found == needed
    assert kind.check(config) == []
    assert [field for field, info in kind.Config.model_fields.items() if not info.description] == []
