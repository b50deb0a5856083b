"""Chat templates are applied once, and prompts are drawn in an order that can be resumed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlkit.data.base import DataError, Problem
from rlkit.data.order import PromptOrder
from rlkit.data.rendering import load_tokenizer, render, renderer
from rlkit.experience import Message, Prompt

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens; like Llama's, it puts a BOS before every text of its own accord."""
    vocabulary = {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **vocabulary}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def problem(text: str, role: str = "user", origin: str = "d.jsonl:1") -> Problem:
    return Problem(
        id=origin, messages=(Message(role, text),), references=("r",), answer="1", columns={"k": 2}, origin=origin
    )


def test_template_applied_once_with_one_bos() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer("x")["input_ids"][0] == 0  # the trap: tokenising rendered text would add a second BOS
    (prompt,), bad = render([problem("2+2?  ok\n")], tokenizer, 100)
    assert bad == []
    assert prompt.token_ids.count(0) == 1
    assert prompt.token_ids[0] == 0
    assert tokenizer.decode(list(prompt.token_ids)) == "<s><user>2+2?  ok\n</s><assistant>"
    assert all(type(token) is int for token in prompt.token_ids)
    assert (prompt.id, prompt.references, prompt.answer, prompt.columns) == ("d.jsonl:1", ("r",), "1", {"k": 2})


def test_arguments_of_the_template_reach_it() -> None:
    thinking = "{% if thinking is defined and not thinking %}<think></think>{% endif %}"
    tokenizer = byte_tokenizer(TEMPLATE + thinking)
    rows = [problem("2+2?"), problem("what?", "critic")]  # the refused one sends each row through by itself
    texts = {}
    for value in (None, True, False):
        arguments = None if value is None else {"thinking": value}
        (prompt,), _ = render(rows, tokenizer, 100, template_arguments=arguments)
        texts[value] = tokenizer.decode(list(prompt.token_ids))
    assert texts[None] == texts[True] == "<s><user>2+2?</s><assistant>"
    assert texts[False] == "<s><user>2+2?</s><assistant><think></think>"


def test_long_and_refused_prompts_are_bad_rows_and_order_is_kept() -> None:
    rows = [problem("a" * n, "critic" if n == 3 else "user", f"d.jsonl:{n}") for n in range(1, 6)]
    longest = len(render([rows[3]], byte_tokenizer(), 100)[0][0].token_ids)
    prompts, bad = render(rows, byte_tokenizer(), longest)
    assert [p.id for p in prompts] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:4"]
    assert [b.origin for b in bad] == ["d.jsonl:3", "d.jsonl:5"]
    assert "no critics here" in bad[0].reason
    assert f"{longest + 1} tokens" in bad[1].reason
    assert "rollout.max_prompt_tokens" in bad[1].reason


def test_no_template() -> None:
    with pytest.raises(DataError, match=r"model\.chat_template"):
        render([problem("q")], byte_tokenizer(None), 100)


def test_template_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}Q: {{ m.content }}{% endfor %} A:")
    tokenizer = byte_tokenizer(None)
    (prompt,), _ = render([problem("why?")], tokenizer, 100, chat_template=path)
    assert tokenizer.decode(list(prompt.token_ids)) == "Q: why? A:"
    assert tokenizer.chat_template is None
    with pytest.raises(DataError, match="cannot be read"):
        render([problem("q")], tokenizer, 100, chat_template=tmp_path / "absent.jinja")
    path.write_text("{% for m in messages %}")
    with pytest.raises(DataError, match="not valid Jinja"):
        render([problem("q")], tokenizer, 100, chat_template=path)


def test_template_with_two_bos() -> None:
    with pytest.raises(DataError, match="twice"):
        render([problem("q")], byte_tokenizer("{{ bos_token }}" + TEMPLATE), 100)


def test_load_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_tokenizer(tmp_path / "model")
    assert render([problem("a  b\n")], loaded, 100) == render([problem("a  b\n")], byte_tokenizer(), 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"model\.path"):
        load_tokenizer(tmp_path / "empty")


def test_warns_where_transformers_replaces_the_saved_tokenizer(tmp_path: Path) -> None:
    characters = {c: i for i, c in enumerate(map(chr, range(32, 127)))}
    core = Tokenizer(models.WordLevel(vocab={"[U]": 95, "\n": 96, "£": 97, **characters}, unk_token="[U]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[U]").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "Qwen2Tokenizer"))
    with pytest.warns(UserWarning, match="model_type"):
        load_tokenizer(tmp_path)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), messages=(Message("user", "q"),), token_ids=(i,)) for i in range(count)]


@given(st.integers(1, 40), st.lists(st.integers(0, 50), max_size=12), st.integers(0, 3))
def test_every_epoch_holds_every_prompt_once(count: int, takes: list[int], seed: int) -> None:
    order = PromptOrder(prompts(count), seed)
    drawn = [p.id for n in takes for p in order.take(n)]
    assert len(drawn) == sum(takes)
    assert order.state_dict()["epoch"] == len(drawn) // count
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert len(set(epoch)) == len(epoch)
    whole = PromptOrder(prompts(count), seed).take(sum(takes))
    assert drawn == [p.id for p in whole]  # sizes of the draws do not matter


@given(st.integers(1, 30), st.integers(0, 90), st.integers(0, 60), st.integers(0, 3))
def test_resumes_anywhere(count: int, before: int, after: int, seed: int) -> None:
    order = PromptOrder(prompts(count), seed)
    order.take(before)
    state = order.state_dict()
    expected = [p.id for p in order.take(after)]
    resumed = PromptOrder(prompts(count), seed + 1)
    resumed.load_state_dict(state)
    assert [p.id for p in resumed.take(after)] == expected
    assert resumed.state_dict() == order.state_dict()


def test_epochs_and_seeds_differ() -> None:
    order = PromptOrder(prompts(50), 0)
    first, second = order.take(50), order.take(50)
    assert first != second
    assert first != PromptOrder(prompts(50), 1).take(50)
    assert first != prompts(50)


def test_other_data_are_refused_at_resume() -> None:
    state = PromptOrder(prompts(5), 0).state_dict()
    changed = [*prompts(4), Prompt(id="4", messages=(), token_ids=(99,))]
    for other in (prompts(6), changed):
        with pytest.raises(DataError, match="other data"):
            PromptOrder(other, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="no prompts"):
        PromptOrder([], 0)


def test_a_plain_text_gets_neither_template_nor_bos_but_its_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    so, four = (tokenizer.encode(text, add_special_tokens=False) for text in ("so", "4"))
    assert renderer(tokenizer)("so</s>4") == (*so, 1, *four)
    assert renderer(tokenizer)("") == ()
