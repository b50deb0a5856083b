"""Reads units of measure in answers, and relates units of one dimension such as `6 km` and `6 m`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# Dimension; unit in terms of the dimension's first unit; its names (plurals in -s are implied).
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("length", "1", "m meter metre mtr"),
    ("length", "1/1000000000", "nm nanometer nanometre"),
    ("length", "1/1000000", "µm μm micrometer micrometre micron"),
    ("length", "1/1000", "mm millimeter millimetre"),
    ("length", "1/100", "cm centimeter centimetre"),
    ("length", "1/10", "dm decimeter decimetre"),
    ("length", "1000", "km kilometer kilometre"),
    ("length", "0.0254", "in inch inches"),
    ("length", "0.3048", "ft foot feet"),
    ("length", "0.9144", "yd yard"),
    ("length", "1609.344", "mi mile"),
    ("area", "4046.8564224", "acre"),
    ("area", "10000", "ha hectare"),
    ("volume", "0.001", "L l liter litre"),
    ("volume", "0.0001", "dl dL deciliter decilitre"),
    ("volume", "0.00001", "cl cL centiliter centilitre"),
    ("volume", "0.000001", "ml mL milliliter millilitre cc"),
    ("volume", "0.003785411784", "gal gallon"),
    ("volume", "0.000946352946", "qt quart"),
    ("volume", "0.000473176473", "pt pint"),
    ("volume", "0.0002365882365", "cup"),
    ("mass", "1", "g gm gram gramme"),
    ("mass", "1/1000", "mg milligram"),
    ("mass", "1000", "kg kilogram kilo"),
    ("mass", "1000000", "ton tonne"),
    ("mass", "453.59237", "lb lbs pound"),
    ("mass", "28.349523125", "oz ounce"),
    ("time", "1", "s sec second"),
    ("time", "1/1000", "ms millisecond"),
    ("time", "60", "min minute"),
    ("time", "3600", "h hr hour"),
    ("time", "86400", "day"),
    ("time", "604800", "wk week"),
    ("months", "1", "month"),
    ("months", "12", "yr year"),
    ("months", "120", "decade"),
    ("months", "1200", "century centuries"),
    ("dollars", "1", "$ dollar usd buck"),
    ("dollars", "1/100", "¢ cent penny pennies"),
    ("euros", "1", "€ euro eur"),
    ("pounds sterling", "1", "£ gbp"),
    ("yen", "1", "¥ yen jpy"),
    ("rupees", "1", "₹ rupee rs inr"),
    ("yuan", "1", "yuan rmb cny"),
    ("angle", "1", "° degree deg"),
    ("radians", "1", "rad radian"),
    ("celsius", "1", "°C C celsius centigrade"),
    ("fahrenheit", "1", "°F F fahrenheit"),
    ("kelvin", "1", "K kelvin"),
    ("energy", "1", "J joule"),
    ("energy", "1000", "kJ kilojoule"),
    ("force", "1", "N newton"),
    ("power", "1", "W watt"),
    ("power", "1000", "kW kilowatt"),
    ("pressure", "1", "Pa pascal"),
    ("pressure", "1000", "kPa kilopascal"),
    ("frequency", "1", "Hz hertz"),
    ("voltage", "1", "V volt"),
    ("current", "1", "ampere amp"),
    ("amount", "1", "mol mole"),
    ("", "1", "unit"),
    ("", "12", "dozen"),
)
_COMPOUNDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "fps": "ft/s"}
_DERIVED = {"area": ("length", 2), "volume": ("length", 3)}
_SYMBOLS = {name: (dimension, Fraction(factor)) for dimension, factor, names in _TABLE for name in names.split()}
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it|normal|sf)?|math(?:rm|bf|it|sf)|mbox|operatorname|rm)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;:! ]|~|\\q?quad\b")
_POWER = re.compile(r"(?<=[A-Za-zµμ])\s*\^\s*\{?\s*([23])\s*\}?")
_TOKEN = re.compile(r"[A-Za-zµμ]+|[°$€£¥₹¢]|[²³/]|\S")
_LAST_OF_VALUE = re.compile(r"(.*(?:[\d)}\]½]|\\pi|π))\s*([^\d(){}\[\]]+)", re.DOTALL)
OPERATORS_IN_WORDS = frozenset(
    {"pi", "sqrt", "sin", "cos", "tan", "cot", "csc", "log", "ln", "exp", "mod", "times", "over", "plus", "minus",
     "hundred", "thousand", "million", "billion", "trillion", "infty", "infinity", "inf"}
)  # fmt: skip
"""Words that turn the number before them into another one."""
NO_UNITS = OPERATORS_IN_WORDS | {
    "or", "and", "not", "if", "for", "to", "than", "is", "are", "when", "where", "with", "but", "nor",
}  # fmt: skip
MAX_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Unit:
    dimensions: tuple[tuple[str, int], ...]
    """Base dimension and its power, sorted; empty for a plain count."""
    factor: Fraction
    """Size in base units."""
    noun: str = ""
    """A word that is not a unit of measure (`apples`), in the singular."""
    letters: bool = False
    """Written as a bare letter, which could be a variable (`12 m`)."""


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Return the value and the unit of `12 m^2`, `5\text{ km/h}`, `\frac{1}{3} meters`; None if there is no unit.

    A bare letter directly after a digit is algebra (`3m`), and so is any text longer than MAX_CHARACTERS.
    """
    if len(text) > MAX_CHARACTERS or not _may_have_unit(text):
        return text, None
    in_text = _TEXT.search(text) is not None
    plain = _TEXT.sub(r" \1", _SPACE.sub(" ", text)).replace("^\\circ", "°").replace("^{\\circ}", "°")
    plain = _POWER.sub(lambda match: "²" if match[1] == "2" else "³", plain.replace("\\degree", "°"))
    match = _LAST_OF_VALUE.fullmatch(" ".join(plain.split()))
    if match is None:
        return text, None
    unit = read_unit(match[2])
    if unit is None:
        return text, None
    if unit.letters and (in_text or "°" in match[2]):
        unit = Unit(unit.dimensions, unit.factor)
    elif unit.letters and not re.search(r"\s[A-Za-z][²³]?\.?$", " ".join(plain.split())):
        return text, None
    return match[1].strip(), unit


def read_unit(phrase: str) -> Unit | None:
    """Read `square feet`, `km/h`, `miles per hour`, `degrees Celsius`, or a noun (`red apples`)."""
    phrase = phrase.strip().rstrip(".").strip()
    unit, rest = leading_unit(phrase)
    if unit is not None and not rest.strip():
        return unit
    words = phrase.replace("-", " ").split()
    if not words or not all(word.isalpha() for word in words) or NO_UNITS & {word.lower() for word in words}:
        return None
    if len(words[-1]) < 3 or any(len(word) == 1 and word != "a" for word in words):
        return None
    return Unit((), Fraction(1), noun=_singular(words[-1].lower()))


def leading_unit(text: str) -> tuple[Unit | None, str]:
    """Return the unit of measure at the start of a text, and the rest of the text."""
    tokens = [(match[0], match.end()) for match in _TOKEN.finditer(text[:80])]
    position, dimensions, factor, end = 0, dict[str, int](), Fraction(1), 0
    sign, parts, bare = 1, 0, False
    while position < len(tokens):
        power = 1
        word = tokens[position][0]
        if word.lower() in ("square", "sq", "cubic", "cu") and position + 1 < len(tokens):
            power = 2 if word.lower() in ("square", "sq") else 3
            position += 1 + (tokens[position + 1][0] == ".")
        if position >= len(tokens):
            break
        word, finish = tokens[position]
        following = tokens[position + 1][0] if position + 1 < len(tokens) else ""
        if word.lower() in ("°", "degree", "degrees") and following.lower() in (
            "c", "f", "celsius", "fahrenheit", "centigrade",
        ):  # fmt: skip
            position += 1
            word, finish = tokens[position]
            following = tokens[position + 1][0] if position + 1 < len(tokens) else ""
            known = _SYMBOLS["C" if word.lower() in ("c", "celsius", "centigrade") else "F"]
            letter = False
        else:
            compound = _COMPOUNDS.get(word.lower())
            if compound is not None and not parts:
                speed, _ = leading_unit(compound)
                return speed, text[finish:]
            symbol = _lookup(word)
            if symbol is None:
                break
            known, letter = symbol, len(word) == 1 and word.isalpha()
        bare = letter if not parts else False
        dimension, own_factor = known
        if following in ("²", "³"):
            power = 2 if following == "²" else 3
            position += 1
            finish = tokens[position][1]
        base, of_base = _DERIVED.get(dimension, (dimension, 1))
        if base:
            dimensions[base] = dimensions.get(base, 0) + sign * power * of_base
        factor *= own_factor ** (sign * power)
        parts, end, position = parts + 1, finish, position + 1
        joint = tokens[position][0] if position < len(tokens) else ""
        if joint not in ("/", "per") or position + 1 >= len(tokens) or sign < 0:
            break
        sign, position = -1, position + 1
    if not parts:
        return None, text
    if parts > 1 and not any(dimensions.values()):  # hours per day
        return leading_unit(tokens[0][0])[0], text[end:]
    unit = Unit(tuple(sorted((name, power) for name, power in dimensions.items() if power)), factor, letters=bare)
    return unit, text[end:]


def _may_have_unit(text: str) -> bool:
    last = text.rstrip(" .}")[-1:]
    return last.isalpha() or last in "°²³23$€£¥₹¢" or "\\text" in text or "\\circ" in text or "\\mathrm" in text


def _lookup(word: str) -> tuple[str, Fraction] | None:
    known = _SYMBOLS.get(word)
    if known is not None or len(word) == 1:
        return known
    lower = word.lower()
    for name in (lower, _singular(lower)):
        if len(name) > 1 and name in _SYMBOLS:
            return _SYMBOLS[name]
    return None


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and len(word) > 2 else word
