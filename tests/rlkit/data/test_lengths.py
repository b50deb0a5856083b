"""Tokens of prompts counted without transformers are those that a run counts with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from rlkit.data.arithmetic import Arithmetic
from rlkit.data.base import DataError, Problem, Response
from rlkit.data.lengths import LARGEST_TOKENIZER, too_long_prompts, too_long_responses, uncountable
from rlkit.data.rendering import load_tokenizer, render
from rlkit.experience import Message
from rlkit.models.folder import model_folder

FOLDER = model_folder("embedded:policy")
CHAT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}[{{ messages[0].content | tojson }}]{% endif %}\n"
    "{% for message in messages %}\n{% if message.content == 'refused' %}{{ raise_exception('no') }}{% endif %}\n"
    "{% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "{% generation %}{{ strftime_now('%Y') }} {{ message.content | trim }}{% endgeneration %}{% endfor %}"
)


def problem(origin: str, *contents: str) -> Problem:
    roles = ("user",) if len(contents) == 1 else ("system", "user")
    return Problem(origin, tuple(map(Message, roles, contents)), origin=origin)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "model"))


@pytest.mark.parametrize("template", [None, CHAT])
def test_lengths_are_those_of_a_run(template: str | None, tmp_path: Path) -> None:
    if template is not None:
        (tmp_path / "chat.jinja").write_text(template)
    named = None if template is None else tmp_path / "chat.jinja"
    problems = [*Arithmetic(Arithmetic.Config(), 0).preview("train"), problem("s", "Be <short> & ünkind.", " Why?  ")]
    prompts, _ = render(problems, load_tokenizer(FOLDER), 10_000, named)
    expected = sorted(len(prompt.token_ids) for prompt in prompts)
    counted = too_long_prompts(problems, FOLDER, named, limit=1, allowed=len(problems))
    assert sorted(tokens for tokens, _ in counted) == expected


def test_arguments_of_the_template_count(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT + "{% if thinking %} a b c{% endif %}")
    short, long = (
        too_long_prompts([problem("s", "Why?")], FOLDER, tmp_path / "chat.jinja", 1, 1, {"thinking": thinking})
        for thinking in (False, True)
    )
    assert long[0][0] - short[0][0] == 3


def test_no_more_are_tokenised_than_prove_it(folder: Path) -> None:
    problems = [problem(f"d:{n}", "a b " * n) for n in range(1, 101)]
    proven = too_long_prompts(problems, folder, None, 16, allowed=2)
    assert [origin for _, origin in proven] == ["d:100", "d:99", "d:98"]
    (folder / "tokenizer.json").write_text("{}")
    assert too_long_prompts(problems, folder, None, 10_000, allowed=2) == []  # its bytes are fewer: nothing is read
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        too_long_prompts(problems, folder, None, 16, allowed=2)


def test_the_longest_response_of_a_row_is_counted(folder: Path) -> None:
    def answered(n: int) -> Problem:
        texts = ("a b " * n, "a", "a b " * (n - 1))
        responses = tuple(Response((Message("assistant", text),), origin=f"d:{n}") for text in texts)
        return Problem(f"p{n}", (Message("user", "?"),), responses=responses)

    counted = too_long_responses([answered(n) for n in range(1, 31)], folder, 1, 100)
    assert [origin for _, origin in counted] == [f"d:{n}" for n in range(30, 0, -1)]
    expected = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a b " * 30).ids)
    assert counted[0][0] == expected
    assert len(too_long_responses([answered(n) for n in range(1, 31)], folder, 1, 2)) == 3


def test_what_cannot_be_counted_here(folder: Path) -> None:
    long = [problem("d:1", "a b " * 100), problem("d:2", "refused")]
    (folder / "chat_template.jinja").write_text(CHAT)
    assert [origin for _, origin in too_long_prompts(long, folder, None, 1, allowed=2)] == ["d:1"]
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(LARGEST_TOKENIZER + 1)
    assert uncountable(folder) == "tokenizer.json is large"
    (folder / "tokenizer.json").unlink()
    assert uncountable(folder) == "without a tokenizer.json"
    assert too_long_prompts(long, folder, None, 1, allowed=0) == []
