"""Finding final answers in texts and comparing them with gold answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Literal

MAX_ANSWER_CHARACTERS = 256
Marker = Literal["####", "boxed", "answer is", "A:"]
MARKERS: tuple[Marker, ...] = ("####", "boxed", "answer is", "A:")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = rf"[-+]?(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?![\dA-Za-z]))?"
_PLAIN_NUMBER = re.compile(_NUMBER)
_LAST_NUMBER = re.compile(rf"(?<![\w.])[$€£]?({_NUMBER})(?!\w)")
_HASHES = re.compile(r"#{4,}\s*([^\n]*)")
_LINE_A = re.compile(r"^[ \t]*A:[ \t]*([^\n]+)", re.MULTILINE)
_ANSWER_IS = re.compile(r"\banswer[*_\s]*(?:is|was|:|=)[*_:\s]*([^\n]+)", re.IGNORECASE)
_BRACES = re.compile(r"\\f?boxed\s*\{|\\[{}]|[{}]")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_WORD_AFTER_NUMBER = re.compile(r"\s*([A-Za-z]{2,})")
_MIXED_NUMBER = re.compile(r"(-?)(\d+)\s+(\d+)/(\d+)")
_ALTERNATIVE = re.compile(r"\s*(?:or|and|not)\s+(?:[-+±√π(\\\d.]|[b-hj-z]\b)", re.IGNORECASE)
"""`5 or 6` is more than a 5; `5 and so on` is not. (`a` and `I` are words.)"""
_PRODUCT = re.compile(r"\s*[xX]\s*[\d(]")
_OPERATORS_IN_WORDS = frozenset(
    {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "mod", "times", "over", "plus", "minus"}
)
_JOINING_WORDS = frozenset({"or", "and", "not"})
_LETTER = re.compile(r"[A-Za-z°]")
_POWER = r"(?:\s?\^\{?[23]\}?|[²³])?"
_UNIT_WORD = rf"[A-Za-z]{{2,}}{_POWER}"
_UNIT = rf"(?:[A-Za-z]{{2,}}|(?<=[\s°/])[mgsLhCF](?![A-Za-z])){_POWER}"
_WITH_UNIT = re.compile(rf"(?P<number>{_NUMBER})\s*°?\s*(?P<unit>{_UNIT})?(?:(?:\s*/\s*|\s+){_UNIT}){{0,2}}\.?")
_WITH_UNIT_WORD = re.compile(
    rf"(?P<number>{_NUMBER})\s*°?\s*(?P<unit>{_UNIT_WORD})?(?:(?:\s*/\s*|\s+){_UNIT_WORD}){{0,2}}\.?"
)
_VALUE = re.compile(r"[\s*_`\"'=≈:]*(?:[-+−±$€£\\(\[{]|\.?\d)")
"""Other text after "answer is" may be prose (`my answer is helpful`)."""
_PROSE = re.compile(r"\s+[(\[\"'A-Za-z]|[\"')\]]*(?:[.;:!?]|,(?!\s*\d))(?:\s|$)|[\"')\]]+(?:\s|$)|\s*$")


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    text: str
    """Without currency, thousands separators, units and the rest."""
    marker: str
    """`####`, `boxed`, `answer is`, `A:` or `last number`."""

    @property
    def marked(self) -> bool:
        return self.marker != "last number"


def final_answer(
    text: str, accept_last_number: bool = False, markers: Sequence[Marker] = MARKERS
) -> FinalAnswer | None:
    r"""The last marked answer (`#### x`, `\boxed{x}`, `The answer is x`, a line `A: x`), without the text after it.

    "answer is" before what is no value (`the answer is rounded`) counts only if nothing else is marked. If nothing is
    marked and `accept_last_number` is set, the last number counts.
    """
    marked: list[tuple[int, str, str]] = []
    for marker, pattern in (("####", _HASHES), ("A:", _LINE_A), ("answer is", _ANSWER_IS)):
        marked += [(match.start(1), marker, match.group(1)) for match in pattern.finditer(text)]
    marked += [(start, "boxed", content) for start, content in _boxed(text)]
    marked = [candidate for candidate in marked if candidate[1] in markers]
    # The last marker wins; a `\boxed{}` after `####` on the same line starts later than the line's text.
    words: FinalAnswer | None = None
    for _, marker, content in sorted(marked, reverse=True):
        cleaned = _clean_boxed(content) if marker == "boxed" else _clean_line(content)
        if cleaned and (marker != "answer is" or _VALUE.match(content) or _VALUE.match(cleaned)):
            return FinalAnswer(cleaned, marker)
        if cleaned and words is None:
            words = FinalAnswer(cleaned, marker)
    if words is not None:
        return words
    if accept_last_number:
        numbers = _LAST_NUMBER.findall(text.replace("−", "-"))
        if numbers:
            return FinalAnswer(_clean_line(numbers[-1]), "last number")
    return None


def gold_answer(text: str) -> str:
    """From GSM8K's `... #### 72`; a text without a marker is the answer."""
    marked = final_answer(text) if any(mark in text for mark in ("####", "\\boxed", "A:")) else None
    return marked.text if marked is not None else _clean_boxed(text)


def plain_decimal(text: str) -> Decimal | None:
    """Exact value of `-1,234.50`, `1e3`; None for other forms."""
    if _PLAIN_NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text.replace(",", ""))


def compare_plain(answer: str, gold: str) -> bool | None:
    """Whether plain decimal numbers are equal; None if one is not plain, or math-verify's rounding could matter.

    It rounds to 6 places at 15 digits: unequal numbers closer than 1e-5 or of more than 12 digits are left to it.
    """
    left, right = plain_decimal(answer), plain_decimal(gold)
    if left is None or right is None:
        return None
    if left == right:
        return True
    if max(abs(left), abs(right)) >= 10**12 or abs(left - right) <= Decimal("1e-5"):
        return None
    return False


def _boxed(text: str) -> list[tuple[int, str]]:
    """Start and content of every closed `\\boxed{...}`; in linear time."""
    boxes: list[tuple[int, str]] = []
    open_braces: list[int | None] = []  # where a box's content starts; None for an ordinary brace
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, text[start : match.start()]))
        elif token.endswith("{") and token != "\\{":
            open_braces.append(match.end() if len(token) > 1 else None)
    return boxes


def _strip_decoration(text: str) -> str:
    text = text.replace("−", "-").replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    text = re.sub(r"\\[()\[\]]|\\\$|[$€£]|<\|[^|>]*\|>|</?s>", "", text)
    text = text.strip().strip("*_`\"'").lstrip("=≈:").strip()
    # `+5` is 5; a minus counts only right before the number, so `- 5` stays as it is.
    return re.sub(r"^\+\s*(?=[\d.])", "", text)


def _clean_boxed(text: str) -> str:
    text = _strip_decoration(text)
    text = text if text.endswith("\\.") else text.rstrip(".").rstrip()
    return _canonical(text)


def _clean_line(line: str) -> str:
    line = _strip_decoration(line)
    number = _PLAIN_NUMBER.match(line)
    if number is not None:
        rest = line[number.end() :]
        word = _WORD_AFTER_NUMBER.match(rest)
        if word is not None and word.group(1).lower() in _SCALES:
            return _canonical(f"{number.group()}e{_SCALES[word.group(1).lower()]}")
        joined = _ALTERNATIVE.match(rest) or (word is not None and word.group(1).lower() in _OPERATORS_IN_WORDS)
        is_unit = word is not None and not joined
        if is_unit or (_PROSE.match(rest) and word is None and not _PRODUCT.match(rest)):
            return _canonical(number.group())
    sentence = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip()
    if sentence.count("=") and "," not in sentence:
        sentence = sentence.rsplit("=", 1)[1].strip()  # `3 * 4 = 12`: the answer is its result
    return _canonical(sentence)


def _canonical(text: str) -> str:
    mixed = _MIXED_NUMBER.fullmatch(text)
    if mixed is not None:
        whole, top, bottom = (int(part) for part in mixed.group(2, 3, 4))
        return f"{mixed.group(1)}{whole * bottom + top}/{bottom}"
    number = plain_decimal(text)
    if number is None or abs(number.adjusted()) > 30:
        return text
    plain = format(number, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain in ("-0", "") else plain


def without_units(answer: str, gold: str) -> tuple[str, str]:
    """Both without a unit in words (`12 m^2`, `5 square feet`, `3 km/h`) that only one of them has.

    A letter on the gold's number is algebra: `3k` stays. So do texts longer than MAX_ANSWER_CHARACTERS.
    """
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARACTERS:
        return answer, gold
    if not _LETTER.search(gold):
        return _number_of(answer, _WITH_UNIT), gold
    if not _LETTER.search(answer):
        return answer, _number_of(gold, _WITH_UNIT_WORD)
    return answer, gold


def _number_of(text: str, with_unit: re.Pattern[str]) -> str:
    match = with_unit.fullmatch(" ".join(text.split()))  # several `\s*` in a row would share a long run in n^3 ways
    if match is None or (match["unit"] or "").lower() in _OPERATORS_IN_WORDS | _JOINING_WORDS | _SCALES.keys():
        return text
    return _canonical(match["number"])


def verify_pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """`right`, `wrong`, `gold_unparsable` or `exception: ...` per (answer, gold) pair."""
    return [_verify(answer, gold) for answer, gold in pairs]


def _verify(answer: str, gold: str) -> str:
    from math_verify import verify

    try:
        parsed_gold = _parse(gold)
        if not parsed_gold:
            return "gold_unparsable"
        # The time-outs of math-verify are signals, which need the main thread; the parent's deadline replaces them.
        right = verify(parsed_gold, _parse(answer), timeout_seconds=None, raise_on_error=True)
    except Exception as error:  # whatever sympy does on model-written text is this pair's verdict, not a crash
        return f"exception: {type(error).__name__}: {str(error)[:200]}"
    return "right" if right else "wrong"


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list[object]:
    """Empty: no expression."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    in_latex = re.sub(r"(?<!\\)%", r"\\%", answer)  # a bare % starts a comment
    for text in (f"\\boxed{{{in_latex}}}", answer):
        parsed: list[object] = parse(text, extraction_config=targets, parsing_timeout=None, raise_on_error=True)
        if any(not isinstance(expression, str) for expression in parsed):
            return parsed
    return []
