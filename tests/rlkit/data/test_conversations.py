"""Recorded responses as token ids: asked as the sampler is asked, ended as the template ends, turns masked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_templates import FAMILIES, Family, tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rlkit.data.arithmetic import Arithmetic, ArithmeticConfig
from rlkit.data.base import DataError, Problem, Response
from rlkit.data.conversations import render_recorded
from rlkit.data.rendering import load_tokenizer, render
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.experience import Message, PreferencePair, Prompt, Recorded
from rlkit.models.folder import model_folder

HI = (Message("user", "Hi"),)


def answer(text: str, value: float = 1.0, origin: str = "r.jsonl:1") -> Response:
    return Response((Message("assistant", text),), value, origin=origin)


def problem(*responses: Response, prompt: tuple[Message, ...] = HI, **more: Any) -> Problem:
    return Problem("p", prompt, origin="r.jsonl:1", responses=responses, **more)


def recorded(family: Family, *problems: Problem, response_tokens: int = 1000) -> tuple[list[Prompt], list[Any], Any]:
    tokenizer = tokenizer_of(family)
    stops = tokenizer.convert_tokens_to_ids(list(family.stops))
    prompts, bad = render_recorded(problems, tokenizer, stops, 1000, response_tokens)
    return prompts, bad, tokenizer


def the(prompt: Prompt) -> Recorded:
    assert prompt.recorded is not None
    return prompt.recorded


@pytest.mark.parametrize("name", FAMILIES)
def test_one_end_from_the_template_and_nothing_after_it(name: str) -> None:
    family = FAMILIES[name]
    ended = f"Yo{family.answer.rpartition('Yo')[2]}"  # as files that were written from rendered text have it
    (prompt,), bad, tokenizer = recorded(family, problem(answer("Yo"), answer(ended), answer("")))
    assert bad == []
    assert tokenizer.decode(prompt.token_ids) == family.asked
    plain, doubled, empty = the(prompt).samples
    assert tokenizer.decode(plain.token_ids) == tokenizer.decode(doubled.token_ids) == family.answer
    assert tokenizer.decode(empty.token_ids) == family.answer.replace("Yo", "")
    assert plain.text == family.answer.partition("<|im_end|>")[0].removesuffix(ended[2:])
    assert (plain.index, plain.logprobs, plain.mask, plain.spans, plain.finish_reason) == (0, None, None, (), "stop")
    assert prompt.token_ids == render([problem()], tokenizer, 1000)[0][0].token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_within_a_response_is_a_bad_row(name: str) -> None:
    family = FAMILIES[name]
    stop = family.stops[0]
    good = problem(answer("Yo", origin="r.jsonl:2"))
    prompts, bad, _ = recorded(family, problem(answer(f"Yo{stop} and more")), good)
    assert len(prompts) == 1
    assert [(row.origin, row.reason) for row in bad] == [
        ("r.jsonl:1", f"{stop!r} is in the middle of an answer, which it would end")
    ]


def test_reasoning_is_rendered_as_the_template_has_it() -> None:
    (prompt,), _, tokenizer = recorded(FAMILIES["thinking"], problem(answer("<think>\nhm\n</think>\n\nYo")))
    assert tokenizer.decode(the(prompt).samples[0].token_ids) == "<think>\nhm\n</think>\n\nYo<|im_end|>"


CHAT = (Message("assistant", "one"), Message("user", "more"), Message("assistant", "two"), Message("user", "go"))
TURNS = (*CHAT, Message("assistant", "three"))


@pytest.mark.parametrize("name", ["chatml", "llama", "gemma", "mistral"])
def test_turns_are_the_templates_whole_conversation_and_masked(name: str) -> None:
    family = FAMILIES[name]
    (prompt,), bad, tokenizer = recorded(family, problem(Response(TURNS, origin="r.jsonl:1")))
    assert bad == []
    (sample,) = the(prompt).samples
    messages = [{"role": m.role, "content": m.content} for m in (*HI, *TURNS)]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert sample.mask is not None
    rendered = tokenizer.decode([*prompt.token_ids, *sample.token_ids.tolist()])
    assert whole.startswith(rendered) and whole[len(rendered) :].strip() == ""
    stop, space = family.answer.rpartition("Yo")[2], " " if name == "mistral" else ""
    parts = [tokenizer.decode(sample.token_ids[span.start : span.end]) for span in sample.spans]
    assert parts == [f"{space}{text}{stop}" for text in ("one", "two", "three")]
    inside = np.zeros(len(sample), dtype=bool)
    for span in sample.spans:
        assert (span.kind, span.role) == ("turn", "assistant")
        inside[span.start : span.end] = True
    np.testing.assert_array_equal(sample.mask, inside)


def test_only_the_trained_turns_count() -> None:
    response = Response(TURNS, trained=(False, False, True, False, False))
    (prompt,), _, tokenizer = recorded(FAMILIES["chatml"], problem(response))
    (sample,) = the(prompt).samples
    assert len(sample.spans) == 1 and sample.spans[0].end == len(sample)
    assert tokenizer.decode(sample.token_ids[sample.trained]) == "two<|im_end|>"


def test_a_template_that_rewrites_earlier_turns() -> None:
    family = FAMILIES["thinking"]
    last = problem(Response(TURNS[-1:], origin="r.jsonl:2"), prompt=(*HI, *CHAT))
    prompts, bad, tokenizer = recorded(family, problem(Response(TURNS, origin="r.jsonl:1")), last)
    assert [row.origin for row in bad] == ["r.jsonl:1"]
    assert "renders an earlier answer differently" in bad[0].reason and "data.train_on=last" in bad[0].remedy
    assert tokenizer.decode(the(prompts[0]).samples[0].token_ids) == "<think>\n\n</think>\n\nthree<|im_end|>"


def test_a_template_that_cannot_end_an_answer_is_refused() -> None:
    family = FAMILIES["chatml"]
    tokenizer = tokenizer_of(family)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>"])
    with pytest.raises(DataError, match=r"after it comes '<\|im_end\|>\\n'.*ends with '<\|endoftext\|>'.*eos_token_id"):
        render_recorded([problem(answer("Yo"))], tokenizer, stops, 100, 100)
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    with pytest.raises(DataError, match="renders an answer differently from how it asks for one"):
        render_recorded([problem(answer("Yo"))], tokenizer, stops, 100, 100)


def test_a_row_is_used_whole_or_not_at_all() -> None:
    family = FAMILIES["chatml"]
    pair = problem(answer("Yo"), answer("Yo" * 20, 0.0), pairs=(PreferencePair(0, 1, 0.9, 2.0, 3.0),))
    mixed = problem(
        answer("a", 0.25, "r.jsonl:2"), answer("b" * 40, 0.5, "r.jsonl:3"), answer("c", 0.75, "r.jsonl:4"),
        pairs=(PreferencePair(2, 0), PreferencePair(1, 0)),
    )  # fmt: skip
    prompts, bad, _ = recorded(family, pair, mixed, problem(), response_tokens=30)
    assert [row.origin for row in bad] == ["r.jsonl:1", "r.jsonl:3", "r.jsonl:1"]
    assert bad[0].reason == "a response has 41 tokens, more than rollout.max_response_tokens=30"
    with pytest.raises(DataError, match=r"Raise rollout\.max_response_tokens \(the longest has 41\)"):
        refuse_too_many_bad_rows(bad[:1], 2, 0, "rows")
    assert bad[2].reason == "it has no response"
    (kept,) = prompts
    assert [sample.text for sample in the(kept).samples] == ["a", "c"]
    assert [score.value for score in the(kept).scores.samples] == [0.25, 0.75]
    assert the(kept).scores.pairs == (PreferencePair(1, 0),)


def test_weights_and_pairs_arrive() -> None:
    pair = PreferencePair(0, 1, 0.9, 2.0, 3.0)
    heavy = Response((Message("assistant", "Yo"),), 1.0, weight=2.5, origin="r.jsonl:1")
    (prompt,), _, _ = recorded(FAMILIES["gemma"], problem(heavy, answer("No", 0.0), pairs=(pair,)))
    assert the(prompt).scores.pairs == (pair,)
    assert [sample.weight for sample in the(prompt).samples] == [2.5, 1.0]


def test_responses_that_the_template_makes_equal() -> None:
    pair = problem(answer("Yo"), answer("Yo \n", 0.0), pairs=(PreferencePair(0, 1),))
    prompts, bad, _ = recorded(FAMILIES["llama"], pair)
    assert prompts == [] and bad[0].reason == "chosen and rejected are equal once they are rendered"


def test_references_are_the_responses_of_a_problem_without_any() -> None:
    """Tokenised alone and ended by the end-of-sequence token, as supervised fine-tuning has always had them."""
    tokenizer = load_tokenizer(model_folder("embedded:policy"))
    problems = Arithmetic(ArithmeticConfig(train_problems=32), seed=0).load("train")[0]
    prompts, bad = render_recorded(problems, tokenizer, [tokenizer.eos_token_id], 256, 128)
    assert bad == []
    assert [replace(prompt, recorded=None) for prompt in prompts] == render(problems, tokenizer, 256)[0]
    for prompt in prompts:
        alone = tokenizer(list(prompt.references), add_special_tokens=False)["input_ids"]
        assert [s.token_ids.tolist() for s in the(prompt).samples] == [[*ids, tokenizer.eos_token_id] for ids in alone]
        assert [sample.text for sample in the(prompt).samples] == list(prompt.references)
    short = sorted(len(sample) for sample in the(prompts[0]).samples)[1]
    prompts, bad = render_recorded(problems[:1], tokenizer, [tokenizer.eos_token_id], 256, short)
    assert (len(the(prompts[0]).samples), bad) == (2, [])
    prompts, bad = render_recorded(problems[:1], tokenizer, [tokenizer.eos_token_id], 256, 2)
    assert prompts == [] and [row.origin for row in bad] == [problems[0].origin]


def test_a_space_that_the_tokenizer_puts_itself_is_not_put_twice() -> None:
    letters = {c: i for i, c in enumerate(["▁", *map(chr, range(33, 127))])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = FAMILIES["mistral"].template
    (prompt,), _ = render_recorded([problem(answer("Yo"))], tokenizer, [tokenizer.eos_token_id], 100, 100)
    whole = tokenizer("<s>[INST] Hi [/INST] Yo</s>", add_special_tokens=False)["input_ids"]
    assert [*prompt.token_ids, *the(prompt).samples[0].token_ids.tolist()] == whole
    assert the(prompt).samples[0].text == "Yo"
