"""vLLM's parsers of calls read what their models write, or are refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from episode_templates import WEATHER
from paths import FIXTURES

from rlkit.data.rendering import load_tokenizer
from rlkit.experience import UserError
from rlkit.models.folder import model_folder
from rlkit.rollout.calls import call_format

WRITTEN: dict[str, str] = json.loads((FIXTURES / "vllm_calls.json").read_text())
"""A call of `weather` with the city Graz, by the name of the parser."""
TOKENS = re.compile(r"</?[^<>\s=]+>|<\|\"\|>|\[[A-Z_]+\]|\]<\]minimax\[>\[")


def tokenizer(text: str) -> Any:
    """With tokens for what looks like some in a text: most parsers want those of their models."""
    own = load_tokenizer(str(model_folder("embedded:agent")))
    own.add_tokens(sorted(set(TOKENS.findall(text))), special_tokens=True)
    return own


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_is_read(name: str) -> None:
    reader = call_format(f"vllm:{name}", [WEATHER], tokenizer(WRITTEN[name]))
    assert reader.read("It is warm.") == ("It is warm.", ())
    _, (call,) = reader.read(WRITTEN[name])
    assert (call.name, call.arguments, call.error) == ("weather", {"city": "Graz"}, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai", "hf", "cohere_command3", "cohere_command4", "lfm2"])
def test_a_parser_of_tokens_or_of_other_tokenizers_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="vLLM's parser cannot read this model's texts"):
        call_format(f"vllm:{name}", [WEATHER], tokenizer(""))
