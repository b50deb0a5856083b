"""Constraints on the words, sentences, case and language of a text, named as in IFEval (arXiv 2311.07911).

Each takes the response and the arguments that IFEval's `kwargs` column gives it, and says whether it is followed.
Written anew from the paper's descriptions; sentences and words are found with regular expressions instead of NLTK.
"""

from __future__ import annotations

import re

CHARACTERS_FOR_LANGUAGE = 4000
"""The beginning of a text tells its language."""

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+(?:['’\-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|\n\s*\n")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|approx|No|Inc|Ltd|Co)|\b[A-Z])\.$")


def compare(count: int, relation: str, target: int | float) -> bool:
    """IFEval's relations. Raises ValueError for another one."""
    if relation == "at least":
        return count >= target
    if relation == "less than":
        return count < target
    raise ValueError(f"the relation {relation!r} is neither 'at least' nor 'less than'")


def keywords_exist(text: str, *, keywords: list[str]) -> bool:
    """All keywords occur, in any case."""
    return all(keyword.casefold() in text.casefold() for keyword in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: float, relation: str) -> bool:
    """A keyword occurs so often."""
    return compare(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a whole word."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: float, let_relation: str) -> bool:
    """A letter (or sign) occurs so often, in either case."""
    if len(letter) != 1:
        raise ValueError(f"letter must be one sign, not {letter!r}")
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    """The whole response is in this language (ISO 639-1)."""
    return bool(text.strip()) and language_of(text) == language.split("-")[0].lower()


def number_of_sentences(text: str, *, num_sentences: float, relation: str) -> bool:
    """So many sentences."""
    return compare(count_sentences(text), relation, num_sentences)


def number_of_words(text: str, *, num_words: float, relation: str) -> bool:
    """So many words (runs of letters, digits and `_`)."""
    return compare(len(_WORD.findall(text)), relation, num_words)


def number_of_paragraphs(text: str, *, num_paragraphs: float) -> bool:
    """Exactly so many paragraphs, divided by `***`; none in the middle is empty."""
    parts = [part.strip() for part in re.split(r"\*\*\*", text)]
    inner = parts[1:-1]
    return all(inner) and sum(bool(part) for part in parts) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: float, nth_paragraph: float, first_word: str) -> bool:
    """So many paragraphs, divided by empty lines, and the n-th (from 1) starts with this word."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    place = int(nth_paragraph)
    if len(paragraphs) != num_paragraphs or not 1 <= place <= len(paragraphs):
        return False
    word = paragraphs[place - 1].split()[0].lstrip("\"'“‘*_(").lower()
    wanted = first_word.strip().lower()
    return re.fullmatch(rf"{re.escape(wanted)}(?:\W.*)?", word, re.DOTALL) is not None


def capital_word_frequency(text: str, *, capital_frequency: float, capital_relation: str) -> bool:
    """So many words in capital letters only."""
    return compare(sum(word.isupper() for word in _TOKEN.findall(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """English, in capital letters only."""
    return text.isupper() and language_of(text) == "en"


def english_lowercase(text: str) -> bool:
    """English, in small letters only."""
    return text.islower() and language_of(text) == "en"


def no_comma(text: str) -> bool:
    """Not one comma."""
    return "," not in text


def count_sentences(text: str) -> int:
    """Sentences end with . ! ? or their full-width forms, or an empty line; `Dr.` and initials end none."""
    count = start = 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.end()].strip()
        if end[0] == "." and _ABBREVIATION.search(sentence[-12:]) and text[end.end() :].strip():
            continue
        count += bool(_WORD.search(sentence))
        start = end.end()
    return count + bool(_WORD.search(text[start:]))


def language_of(text: str) -> str:
    """ISO 639-1 code of the likeliest language. Upper case is lowered, because the model knows mostly lower case."""
    import py3langid

    label: str = py3langid.classify(text[:CHARACTERS_FOR_LANGUAGE].lower())[0]
    return label
