"""Splitting responses into steps: odd texts, odd tokens, and tokens as they were sampled."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from rlkit.data.rendering import load_tokenizer
from rlkit.experience.steps import split_steps, step_spans, token_steps
from rlkit.models.folder import model_folder


def pieces(text: str, style: str = "auto") -> list[str]:
    return [text[a:b] for a, b in split_steps(text, style)]  # type: ignore[arg-type]


def test_text_is_split_into_lines_or_numbered_steps() -> None:
    assert pieces("a = 1\nb = 2\n\nA: 3") == ["a = 1\n", "b = 2\n\n", "A: 3"]
    assert pieces("\n\n a\n \n b") == ["\n\n a\n \n", " b"]
    assert pieces("Step 1: do\nthis\n\nStep 2: that") == ["Step 1: do\nthis\n\n", "Step 2: that"]
    assert pieces("First. step 1: x Step 22 : y") == ["First. ", "step 1: x ", "Step 22 : y"]
    assert pieces("Step 1: x\ny", "lines") == ["Step 1: x\n", "y"]
    assert pieces("no mark\nhere", "numbered") == ["no mark\nhere"]
    assert pieces("") == [""] and pieces(" \n") == [" \n"]
    assert pieces("a\nb\n\nc\n \n\n d\n\n", "blank_line") == ["a\nb\n\n", "c\n \n\n", " d\n\n"]
    assert pieces("\n\na\n\nb", "blank_line") == ["\n\na\n\n", "b"]


@given(st.text(alphabet="ab \n1:S", max_size=40))
def test_steps_cover_the_text(text: str) -> None:
    for style in ("lines", "numbered", "blank_line"):
        assert "".join(pieces(text, style)) == text


def test_a_step_has_the_tokens_of_its_text_and_the_last_one_the_end() -> None:
    tokenizer = load_tokenizer(model_folder("embedded:policy"))
    text = "Tom has 2 + 3 = 5 apples.\nHe eats 1.\n\nA: 4"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    spans = token_steps(text, encoded["offset_mapping"], split_steps(text), len(ids))
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == [
        "Tom has 2 + 3 = 5 apples.\n",
        "He eats 1.\n\n",
        "A: 4<eos>",
    ]


def test_tokens_across_a_boundary_belong_where_their_first_visible_character_is() -> None:
    text, steps = "a\nbc", [(0, 2), (2, 4)]
    assert token_steps(text, [(0, 1), (1, 3), (3, 4)], steps, 4) == [(0, 1), (1, 4)], "`\\nb` begins the second line"
    assert token_steps(text, [(0, 4)], steps, 2) == [(0, 1), (1, 2)], "the end belongs to the last step"
    assert token_steps("", [], [(0, 0)], 1) == [(0, 1)]


def said(ids: list[int], tokenizer: PreTrainedTokenizerFast, style: str = "lines") -> list[str]:
    spans = step_spans(np.array(ids, dtype=np.int32), tokenizer, style)  # type: ignore[arg-type]
    bounds = [(span.start, span.end) for span in spans]
    assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert not bounds or (bounds[0][0], bounds[-1][1]) == (0, len(ids))
    return [span.data["text"] for span in spans]


def test_sampled_tokens_are_split_as_they_are() -> None:
    """However the model cut the text: into the tokenizer's own tokens, or into single characters."""
    tokenizer = load_tokenizer(model_folder("embedded:policy"))
    text = "Tom has 2 + 3 = 5 apples.\nHe eats 1.\n\nA: 4"
    lines = ["Tom has 2 + 3 = 5 apples.\n", "He eats 1.\n\n", "A: 4"]
    whole = tokenizer.encode(text, add_special_tokens=False)
    single = [token for character in text for token in tokenizer.encode(character, add_special_tokens=False)]
    for ids in (whole, single):
        assert said([*ids, tokenizer.eos_token_id], tokenizer) == lines
        assert said(ids, tokenizer, "blank_line") == ["".join(lines[:2]), lines[2]]
    assert said([tokenizer.eos_token_id], tokenizer) == [""]
    assert said([], tokenizer) == []


def test_characters_of_several_tokens_are_not_cut() -> None:
    """A tokenizer of bytes: a character of four tokens at the end of a line, and one that is never completed."""
    alphabet = sorted(ByteLevel.alphabet())
    model = Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    ids = tokenizer.encode("a \U0001f600\n\u00e9b\nc")
    assert len(ids) == 2 + 4 + 1 + 2 + 1 + 1 + 1
    assert said(ids, tokenizer) == ["a \U0001f600\n", "\u00e9b\n", "c"]
    unfinished = said([*ids, *tokenizer.encode("\U0001f600")[:2]], tokenizer)
    assert unfinished == ["a \U0001f600\n", "\u00e9b\n", "c"]


def test_words_that_carry_their_space() -> None:
    """As SentencePiece has them: the first one's space is not part of the text."""
    words = ["\u2581Step", "\u25811", ":", "\u2581yes", "\u2581step", "\u25812"]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    ids = [0, 1, 2, 3, 4, 5, 2, 3]
    assert said(ids, tokenizer, "numbered") == ["Step 1: yes", " step 2: yes"]
    assert said(ids, tokenizer, "auto") == ["Step 1: yes", " step 2: yes"]
