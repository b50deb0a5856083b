"""Reads numbers exactly, as people and LaTeX write them."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)"
_INTEGER = rf"(?:{_GROUPED}|\d+)"
NUMBER = rf"[-+]?(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?![\dA-Za-z]))?"
"""`-1,234.50`, `10 000`, `.5`, `6.02e23`."""
PLAIN_NUMBER = re.compile(NUMBER)
LARGEST_EXPONENT = 1000
"""Largest exponent of a power of ten that is read here."""
SIGNIFICANT_DIGITS = 5
"""How many significant digits a decimal must share with the exact value that it approximates."""

_SEPARATORS = str.maketrans("", "", ", \u00a0\u2009\u202f")
_POINTS_AND_COMMA = re.compile(r"([-+]?\d{1,3})((?:[. ]\d{3})+),(\d+)")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+)")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+")
_SCIENTIFIC = re.compile(
    rf"(?:(?P<factor>{NUMBER})\s*(?:\\times|\\cdot|[x×*·])\s*)?10\s*(?:\^|\*\*)\s*(?:\{{\s*|\(\s*)?"
    r"(?P<exponent>[-+]?\d{1,4})\s*[)}]?"
)
_MIXED = re.compile(r"(-?)(\d+)\s+(\d+)/(\d+)")
_SLASH = re.compile(rf"\(?({NUMBER})\)?\s*/\s*\(?({NUMBER})\)?")
_FRACTION = re.compile(
    rf"(?P<sign>-?)\s*(?P<whole>\d+)?\s*\\[dtc]?frac\s*(?:\{{\s*(?P<top>{NUMBER})\s*\}}|(?P<top_digit>\d))"
    rf"\s*(?:\{{\s*(?P<bottom>{NUMBER})\s*\}}|(?P<bottom_digit>\d))"
)
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS)}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"({NUMBER})\s*(hundred|thousand|million|billion|trillion)", re.IGNORECASE)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")


def plain_decimal(text: str) -> Decimal | None:
    """Return the exact value of `-1,234.50`, `10 000`, `1e3`; None for other forms."""
    if PLAIN_NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text.translate(_SEPARATORS))


def compare_plain(answer: str, gold: str) -> bool | None:
    """Whether two plain decimal numbers are exactly equal; None if one is not plain."""
    left, right = plain_decimal(answer), plain_decimal(gold)
    return None if left is None or right is None else left == right


def canonical(text: str) -> str:
    """Return a number in its shortest plain form (`1.8 million` is 1800000, `1 1/2` is 3/2); other text unchanged."""
    number = plain_decimal(text)
    if number is None:
        number = _written_number(text)
    if number is not None:
        return _format(number)
    mixed = _MIXED.fullmatch(text)
    if mixed is not None:
        whole, top, bottom = (int(part) for part in mixed.group(2, 3, 4))
        return f"{mixed.group(1)}{whole * bottom + top}/{bottom}"
    return text


def rational(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number, `3/4`, `\frac{3}{4}`, `2\frac{1}{3}`; None for other forms."""
    number = plain_decimal(text)
    if number is not None:
        return Fraction(number) if abs(number.adjusted()) < LARGEST_EXPONENT else None
    match = _SLASH.fullmatch(text)
    if match is not None:
        return _quotient(match[1], match[2])
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    value = _quotient(match["top"] or match["top_digit"], match["bottom"] or match["bottom_digit"])
    if value is not None and match["whole"]:
        value += int(match["whole"])
    return -value if value is not None and match["sign"] else value


def approximates(decimal: Decimal, exact: Fraction) -> bool:
    """Whether `decimal` is the exact value rounded or truncated at its last digit, with SIGNIFICANT_DIGITS or more."""
    shortest = decimal.normalize()
    places = -int(shortest.as_tuple().exponent)
    if places <= 0 or len(shortest.as_tuple().digits) < SIGNIFICANT_DIGITS:
        return False
    difference = abs(exact) - abs(Fraction(shortest))
    return (decimal < 0) == (exact < 0) and -Fraction(1, 2) <= difference * 10**places < 1


def decimal_comma(text: str) -> Decimal | None:
    """Read `3,14` as a decimal; None for another form or grouped thousands (`1,234`, but not `0,111`)."""
    match = _DECIMAL_COMMA.fullmatch(text)
    if match is None or _THOUSANDS.fullmatch(text):
        return None
    return Decimal(f"{match[1]}.{match[2]}")


def raised(text: str) -> str:
    """Rewrite `10²³` as `10^{23}`."""
    return _RAISED.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)


def _written_number(text: str) -> Decimal | None:
    if len(text) > 60:
        return None
    match = _POINTS_AND_COMMA.fullmatch(text)
    if match is not None:  # 1.234,56
        return Decimal(match[1] + re.sub("[. ]", "", match[2]) + "." + match[3])
    if "10" in text:
        match = _SCIENTIFIC.fullmatch(raised(text))
        if match is not None and abs(int(match["exponent"])) <= LARGEST_EXPONENT:
            factor = plain_decimal(match["factor"]) if match["factor"] else Decimal(1)
            return None if factor is None else factor.scaleb(int(match["exponent"]))
    match = _SCALED.fullmatch(text)
    if match is not None:
        factor = plain_decimal(match[1])
        return None if factor is None else factor.scaleb(SCALES[match[2].lower()])
    word = NUMBER_WORDS.get(text.lower())
    return None if word is None else Decimal(word)


def _quotient(top: str, bottom: str) -> Fraction | None:
    left, right = plain_decimal(top), plain_decimal(bottom)
    if left is None or right is None or not right or max(abs(left.adjusted()), abs(right.adjusted())) > 300:
        return None
    return Fraction(left) / Fraction(right)


def _format(number: Decimal) -> str:
    if not number:
        return "0"
    if abs(number.adjusted()) > 30:
        return str(number.normalize()) if len(number.as_tuple().digits) <= 28 else str(number)
    plain = format(number, "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
