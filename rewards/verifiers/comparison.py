"""Compares a final answer with the gold answer: numbers (exactly), units, percentages, clock times and texts."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from rewards.verifiers.numerals import (
    NUMBER,
    approximates,
    canonical,
    decimal_comma,
    plain_decimal,
    rational,
)
from rewards.verifiers.symbolic import over_limits
from rewards.verifiers.units import NO_UNITS, Unit, split_unit

Pair = tuple[str, str]

PROSE_WORDS = 6
_PERCENT = re.compile(
    r"(.+?)\s*(?:\\?%|\\(?:text|mathrm|mbox)\s*\{\s*(?:percent|%|pct)\s*\}|(?:per ?cent|percentage|pct))\.?"
)
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2})(?::(\d{2}))?)?\s*(?:([ap])\.?\s?m\b\.?)?", re.IGNORECASE)
_RATIO = re.compile(rf"({NUMBER})((?:\s*:\s*{NUMBER})+)")
_TEXT_COMMAND = re.compile(r"\\(?:text(?:rm|bf|it|normal|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
_LETTERS = re.compile(r"[^\W\d_]")
_TEXT = re.compile(r"[\w\s'’\"“”.,;:!?()&/–—-]*")
_WORD = re.compile(r"[^\W\d_]{2,}")
_MATHEMATICAL = NO_UNITS | {"max", "min", "gcd", "lcm", "arcsin", "arccos", "arctan", "det", "tr", "undefined"}
_REASON = re.compile(
    r"\s*(?:[,;:(]\s*)?\b(?:because|since|as|so|which|due to|for)\b.*|\s+\(.*\)|\s+[–—-]\s.*", re.DOTALL
)
_LABEL = re.compile(r"\(?([A-Z])\)?(?:\s*[).:,]\s.*)?\.?", re.DOTALL)
_LIST = re.compile(r"\s*(?:,|;|&|\band\b)\s*(?:and\b\s*)?")
_RELATION = re.compile(r"\s*(?:[<>≤≥≠]|\\(?:neq?|geq?|leq?|lt|gt|not|geqslant|leqslant)(?![A-Za-z]))")
_HAS_RELATION = re.compile(r"[<>≤≥≠]|\\(?:neq?|geq?|leq?|lt|gt|not|geqslant|leqslant)(?![A-Za-z])")
_ANOTHER_LABEL = re.compile(r"(?:\bor\b|\band\b|[,/&;])\s*\(?[A-Z]\)?(?![A-Za-z'])")
_LABELS = re.compile(r"[A-Z](?:\s*(?:,|and|&)\s*[A-Z])+")
_EQUATION = re.compile(r"(?=.*[A-Za-z])[^=]*[^=]\s*[-+]\s*[^=]+=\s*0")
_SINGLE = re.compile(rf"(?<![\w.])({NUMBER})(?![\w])")
_OTHER_NUMBER = re.compile(
    r"\b(?:not|no|never|half|twice|double|triple|third|quarter|thrice|times|minus|plus|less|more|fewer|than|between|or|"
    r"least|most|above|below|over|under|squared|cubed|root|hundred|thousand|million|billion|dozen|power|percent|unless|"
    r"divided|multiplied|modulo?|per)\b|n't\b|[=<>^\\/*+%√:]",
    re.IGNORECASE,
)


def decide(answer: str, gold: str, letters_are_units: bool = False) -> str | Pair:
    """Return `right`, `wrong`, `wrong: WHY`, or the (answer, gold) that math-verify must compare."""
    if answer == gold:
        return "right"
    left, right = plain_decimal(answer), plain_decimal(gold)
    if left is not None and right is not None:
        return _said(left == right)
    return _decide_values(answer, gold, letters_are_units)


def _decide_values(answer: str, gold: str, letters_are_units: bool) -> str | Pair:
    times = _clock(answer), _clock(gold)
    if times[0] is not None and times[1] is not None:
        return _said(_same_time(times[0], times[1]))
    if _is_text(gold):
        return _said(_same_text(answer, gold))
    if answer.isalpha() and gold.isalpha() and not (len(gold) > 1 and _is_product(gold)):
        return _said(len(gold) > 1 and answer.casefold() == gold.casefold())
    if "\\text" in answer:
        answer = _alone_in_text(answer)
    percents = _percent(answer), _percent(gold)
    if percents[0] is not None or percents[1] is not None:
        return _compare_percents(answer, gold, percents)
    measured = _without_units(answer, gold, letters_are_units)
    if isinstance(measured, str):
        return measured
    answer, gold = (canonical(value) for value in measured)
    return _compare_values(answer, gold)


def _compare_values(answer: str, gold: str) -> str | Pair:
    if answer == gold:
        return "right"
    ratios = _ratio(answer), _ratio(gold)
    if ratios[1] is not None:
        return _compare_ratios(answer, ratios[0], ratios[1])
    left, right = rational(answer), rational(gold)
    if left is None or right is None:
        left, right = _with_decimal_commas(answer, gold, left, right)
    if left is not None and right is not None:
        return _said(left == right or _is_rounded(answer, right) or _is_rounded(gold, left))
    if right is not None and _has_words(answer):
        number = _only_number(answer)
        return "wrong" if number is None else _compare_values(number, gold)
    if _RELATION.match(answer) and (right is not None or not _HAS_RELATION.search(gold)):
        return "wrong"  # `> 5` is not 5
    if gold == "0" and _EQUATION.fullmatch(answer):
        return "wrong"
    if over_limits(gold):
        return _said(_squeezed(answer) == _squeezed(gold))
    too_much = over_limits(answer)
    return f"wrong: {too_much}" if too_much else (answer, gold)


def _said(right: bool) -> str:
    return "right" if right else "wrong"


def _is_rounded(decimal: str, exact: Fraction) -> bool:
    """Whether `decimal` is `exact` rounded; never if `exact` has a finite decimal, as decimals are compared exactly."""
    number = plain_decimal(decimal)
    if number is None or _terminates(exact):
        return False
    return approximates(number, exact)


def _terminates(value: Fraction) -> bool:
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1


def _with_decimal_commas(
    answer: str, gold: str, left: Fraction | None, right: Fraction | None
) -> tuple[Fraction | None, Fraction | None]:
    """Read decimal commas. `3,14` is a decimal if the other side is a single number, else a list; `0,5` always is."""
    commas = decimal_comma(answer) if left is None else None, decimal_comma(gold) if right is None else None
    if commas[0] is not None and commas[1] is not None:
        if answer.lstrip("-+").startswith("0,") or gold.lstrip("-+").startswith("0,"):
            return Fraction(commas[0]), Fraction(commas[1])
        return None, None
    if commas[0] is not None and right is not None:
        return Fraction(commas[0]), right
    if commas[1] is not None and left is not None and left.denominator != 1:
        return left, Fraction(commas[1])
    return left, right


def _clock(text: str) -> tuple[int, str] | None:
    """Return a clock time as seconds and `a` or `p` or nothing."""
    if len(text) > 16 or not (":" in text or text[-1:] in "mM."):
        return None
    match = _CLOCK.fullmatch(text)
    if match is None or not (match[2] or match[4]):
        return None
    hours, minutes, seconds = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    half = (match[4] or "").lower()
    if minutes > 59 or seconds > 59 or hours > 24 or (half and not 1 <= hours <= 12):
        return None
    if half:
        hours = hours % 12 + 12 * (half == "p")
    return hours * 3600 + minutes * 60 + seconds, half


def _same_time(answer: tuple[int, str], gold: tuple[int, str]) -> bool:
    if answer[1] and gold[1]:
        return answer[0] == gold[0]
    if not answer[1] and not gold[1]:
        return answer[0] == gold[0]
    return answer[0] == gold[0] or ((answer[0] - gold[0]) % 43200 == 0 and min(answer[0], gold[0]) < 46800 > 0)


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    if ":" not in text or len(text) > 80:
        return None
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    numbers = [plain_decimal(part.strip()) for part in text.split(":")]
    return tuple(Fraction(number) for number in numbers if number is not None)


def _compare_ratios(answer: str, left: tuple[Fraction, ...] | None, right: tuple[Fraction, ...]) -> str | Pair:
    if left is not None:
        if len(left) != len(right):
            return "wrong"
        return _said(
            all(a * y == b * x for a, x in zip(left, right, strict=True) for b, y in zip(left, right, strict=True))
        )
    if len(right) != 2 or right[1] == 0:
        return "wrong"
    value = right[0] / right[1]
    return _compare_values(answer.split("=")[-1].strip(), f"{value.numerator}/{value.denominator}")


def _percent(text: str) -> str | None:
    if "%" not in text and "cent" not in text and "pct" not in text:
        return None
    match = _PERCENT.fullmatch(text)
    return canonical(match[1].strip()) if match is not None else None


def _compare_percents(answer: str, gold: str, percents: tuple[str | None, str | None]) -> str | Pair:
    """Compare percentages: `50%` equals 50 (the sign may be left out) and 0.5 (its value)."""
    left, right = percents
    if left is not None and right is not None:
        return _compare_values(left, right)
    bare, percent = (answer, right) if left is None else (gold, left)
    assert percent is not None
    value, hundredfold = rational(bare), rational(percent)
    if value is not None and hundredfold is not None:
        return _said(
            value in (hundredfold, hundredfold / 100)
            or _is_rounded(bare, hundredfold)
            or _is_rounded(percent, value)
            or _is_rounded(percent, value * 100)
            or _is_rounded(bare, hundredfold / 100)
        )
    return _compare_values(percent if left is not None else answer, percent if right is not None else gold)


def _without_units(answer: str, gold: str, letters_are_units: bool) -> str | Pair:
    """Return `wrong` if the quantities differ in kind, else both in one unit. A unit on only one side is dropped."""
    value, unit = split_unit(answer)
    gold_value, gold_unit = split_unit(gold)
    if unit is None and gold_unit is None:
        return answer, gold
    if unit is not None and gold_unit is not None:
        if unit.noun or gold_unit.noun:
            return (value, gold_value) if unit.noun == gold_unit.noun else "wrong"
        if unit.dimensions != gold_unit.dimensions and not _both_pounds(unit, gold_unit):
            return "wrong"
        if unit.factor == gold_unit.factor or unit.dimensions != gold_unit.dimensions:
            return value, gold_value
        return _scaled(value, unit.factor), _scaled(gold_value, gold_unit.factor)
    one = unit or gold_unit
    assert one is not None
    if one.letters and not letters_are_units:
        return answer, gold
    if not one.dimensions and one.factor != 1:  # a dozen
        return _scaled(value, one.factor if unit else Fraction(1)), _scaled(
            gold_value, Fraction(1) if unit else one.factor
        )
    return value, gold_value


def _both_pounds(left: Unit, right: Unit) -> bool:
    names = {left.dimensions, right.dimensions}
    pound = Fraction("453.59237")
    return names == {(("mass", 1),), (("pounds sterling", 1),)} and pound in (left.factor, right.factor)


def _scaled(value: str, factor: Fraction) -> str:
    number = rational(canonical(value))
    if number is not None:
        scaled = number * factor
        return f"{scaled.numerator}/{scaled.denominator}" if scaled.denominator != 1 else str(scaled.numerator)
    return f"({value}) \\cdot \\frac{{{factor.numerator}}}{{{factor.denominator}}}"


def _plain_text(text: str) -> str:
    text = _TEXT_COMMAND.sub(r" \1 ", text).replace("\\ ", " ").replace("\\quad", " ").replace("\\%", "%")
    return " ".join(text.split()).strip(" .*_`\"'“”")


def is_prose(gold: str) -> bool:
    """Whether a gold answer has more words than a response would repeat."""
    return _is_text(gold) and len(_WORD.findall(_plain_text(gold))) > PROSE_WORDS


def _alone_in_text(text: str) -> str:
    match = _TEXT_COMMAND.fullmatch(text)
    return canonical(match[1].strip()) if match is not None else text


def _is_text(gold: str) -> bool:
    """Whether it is words, not an expression: `east`, `Alice and Bob`, `ABCD`, `true`, a choice `B`."""
    if not _LETTERS.search(gold):
        return False
    plain = _plain_text(gold)
    if re.fullmatch(r"\(?[A-J]\)?", plain) and not ("\\" in gold and "\\text" not in gold):
        return True
    if "\\text" in gold and _LABELS.fullmatch(plain):
        return True
    words = _WORD.findall(plain)
    if _TEXT.fullmatch(plain) is None:
        # It may be prose with a formula in it.
        return len([word for word in words if len(word) > 3 and word.lower() not in _MATHEMATICAL]) > 4
    if not words or (any(word.lower() in _MATHEMATICAL for word in words) and len(words) < 3):
        return False
    if re.match(r"[-+(.]*\d", plain):  # a quantity, or a sentence
        return split_unit(gold)[1] is None and len([word for word in words if len(word) > 2]) > 1
    if re.search(r"[A-Za-z]\s*\(\s*[\w, ]+\s*\)", plain) and len(words) < 3:  # f(x)
        return len(plain.split("(")[0].strip()) > 2 and " " in plain
    if re.search(r"(?<![A-Za-z])[A-Za-z][-/]|[-/][A-Za-z](?![A-Za-z])|\d", plain) and len(words) < 2:
        return False
    return not any(_is_product(word) for word in words) or len(words) > 1 or "\\text" in gold


def _is_product(word: str) -> bool:
    """Whether a word is a product of variables: `xy`, `abc`; not `on`."""
    if len(word) > 4 or not word.islower():
        return False
    return set(word) <= set("abc") or not set(word) & set("aeiou")


def _same_text(answer: str, gold: str) -> bool:
    left, right = _plain_text(answer), _plain_text(gold)
    label = re.fullmatch(r"\(?([A-Z])\)?", right)
    if label is not None:
        chosen = _LABEL.fullmatch(left)
        if chosen is None and len(label[1]) == 1 and label[1] <= "J":
            chosen = re.fullmatch(r"\(?([a-j])\)?", left)
        return chosen is not None and chosen[1].upper() == label[1] and not _ANOTHER_LABEL.search(left)
    candidates = {_folded(left), _folded(_REASON.sub("", left, count=1))}
    if _folded(right) in candidates:
        return True
    parts = [sorted(_folded(part) for part in _LIST.split(text) if part) for text in (left, right)]
    return len(parts[1]) > 1 and parts[0] == parts[1]


def _folded(text: str) -> str:
    """Drop case, punctuation and articles. Capitals alone (`ABCD`, `AB`) are names of points and stay."""
    text = unicodedata.normalize("NFKC", text).strip(" .,;:!?()\"'“”*_")
    text = " ".join(re.sub(r"[^\w\s%+/=<>^-]", "", text).casefold().split())
    return re.sub(r"^(?:the|a|an) (?=\w)", "", text)


def _has_words(text: str) -> bool:
    plain = re.sub(r"\\[A-Za-z]+", " ", _TEXT_COMMAND.sub(r" \1 ", text))
    return any(len(word) > 2 and word.lower() not in _MATHEMATICAL for word in _WORD.findall(plain))


def _only_number(text: str) -> str | None:
    """Return the number in a sentence that has exactly one and no calculation with it."""
    plain = _plain_text(text.replace("$", ""))
    if _OTHER_NUMBER.search(plain):
        return None
    numbers = _SINGLE.findall(plain)
    return canonical(numbers[0]) if len(numbers) == 1 else None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}]|\\left|\\right|\\,|\\!", "", text)
