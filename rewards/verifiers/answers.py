"""Finds final answers in texts."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rewards.verifiers.numerals import NUMBER, PLAIN_NUMBER, SCALES, canonical, plain_decimal
from rewards.verifiers.units import OPERATORS_IN_WORDS, leading_unit

MAX_ANSWER_CHARACTERS = 256
Marker = Literal["####", "boxed", "answer is", "A:"]
MARKERS: tuple[Marker, ...] = ("####", "boxed", "answer is", "A:")
MAX_LINE_CHARACTERS = 2000
"""How much is read after a marker."""
MAX_CANDIDATES = 64
"""How many marked answers are considered, from the last one backwards."""

_LAST_NUMBER = re.compile(rf"(?<![\w.,])[$€£]?({NUMBER}(?:\s?/\s?\d+)?)(?:(?!\w)|(?=(?:[a-z]{{1,3}})?[²³]))")
_LAST_FORMULA = re.compile(
    r"\$\$(?!\s*\$)([^$]+)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$\d])\$(?!\$)([^$\n]+?)(?<!\\)\$(?!\d)"
    r"|(-?\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})",
    re.DOTALL,
)
_HASHES = re.compile(r"#{4,}\s*")
_LINE_A = re.compile(r"^[ \t]*A:[ \t]*", re.MULTILINE)
_IS = (
    r"\b(?:is|are|was|were|equals?|becomes|would be|will be|should be|must be|(?:comes|turns) out to be)(?![A-Za-z])"
    r"|:|="
)
_ANSWER_IS = re.compile(
    rf"\banswers?(?:[*_\s]*(?:{_IS})|[*_]*\s+(?:to|for|of|in)\s[^.\n:=#]{{1,80}}?\s*(?:{_IS})"
    r"|[*_ \t]*(?=\$|\\\(|\\\[)|[*_: \t]*(?=\n))[*_:\s]*",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    rf"(\$[^$\n]+\$|\\\([^\n]{{1,200}}?\\\)|(?<![\w.]){NUMBER})\s+(?:is|as)\s+(?:(?:therefore|thus)\s+)?"
    r"(?:our|the|my)(?:\s+(?:final|correct|right))?\s+answer\b",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\boxed\s+((?:[^\s{}$\\.,;]|[.,](?=\d))+)|\\[{}]|[{}]")
_FILLER = re.compile(
    r"(?:[\s,:*_]*\b(?:therefore|thus|hence|so|then|about|around|approx(?:imately|\.)?|roughly|nearly|exactly|precisely|"
    r"equals?(?: to)?|simply|just|indeed|also|now|clearly|obviously|actually|given by|found to be|in fact|of course|"
    r"as follows|that|going to be|still|again|really|definitely|certainly|probably|likely|only)\b[\s,:]*)+",
    re.IGNORECASE,
)
_WORD_AFTER_NUMBER = re.compile(r"\s*([A-Za-z]{2,})")
_ALTERNATIVE = re.compile(r"\s*(?:or|and|not|to)\s+(?:[-+±√π(\\$\d.]|[b-hj-z]\b)", re.IGNORECASE)
"""`5 or 6` is more than a 5; `5 and so on` is just a 5. (`a` and `I` are words.)"""
_DECIMALS = re.compile(r",\d+(?![\d,.]*\d)")
_BOTTOM = re.compile(r"\s?/\s?\d+(?![\d,.]*\d)")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:per ?cent|percentage|pct)\b)")
_CONDITION = re.compile(r"\b(?:not|never|if|when|where|no)\b|n't\b", re.IGNORECASE)
_PRODUCT = re.compile(r"\s*[xX]\s*[\d(]")
_VALUE = re.compile(r"[\s*_`\"'=≈:]*(?:[-+−±$€£\\(\[{√π½]|\.?\d)")
"""Any other text after "answer is" may be prose (`my answer is helpful`)."""
_SIGN = re.compile(r"[°²³€£¥₹¢]|[a-z]{1,3}[²³]")
_PROSE = re.compile(
    r"\s+[(\[\"'A-Za-z—–]|\s*[—–]|[\"')\]*_]*(?:[.;:!?]|,(?!\s*\d))(?:\s|$)|[\"')\]]+(?:\s|$)|\s*$|,\s*(?:and|so|which)\b"
)
_FORMULA_FIRST = re.compile(
    r"[\s*_`\"'=≈:]*(?:\$\$(?P<display>[^$]+)\$\$|\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\d)|\\\((?P<round>.+?)\\\)"
    r"|\\\[(?P<square>.+?)\\\])(?P<rest>.*)",
    re.DOTALL,
)
_GOES_ON = re.compile(
    r"\s*(?:,(?!\s*(?:where|which|so|because|since|as|with|for|that|not)\b)|;|\\?%|\^|[-+*/=<>]|\\text"
    r"|(?:and|or|percent|pct|percentage)\b)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|<\|")
_NAME = re.compile(r"[A-Za-z\\(|][\w\s\\{}()|'.:]*")
_LAST_IS = re.compile(r"(?<!\w)(?:is|are|was|equals|=)\s+(?=[-+−±$€£\\(\[{√π½*]|\.?\d)")
_CURRENCY = re.compile(rf"[\s*_:=≈-]*(?:(\\\$|[€£¥₹])\s*|(\$)\s?){NUMBER}(?P<end>.?)")
_CURRENCY_AFTER = re.compile(rf"\s*{NUMBER}\s*(\\\$|[€£¥₹¢])")
_NAMES = {"$": "dollars", "\\$": "dollars", "€": "euros", "£": "gbp", "¥": "yen", "₹": "rupees", "¢": "cents"}
# Between two boxes: only layout, or a few joining words.
_LAYOUT = re.compile(r"(?:[\s$,;&+]|\\[()\[\],;!: ]|\\q?quad\b|\\\\)*")
_JOINING = re.compile(r"\b(?:and|or)\b|[,;&]")
_CORRECTING = re.compile(
    r"[.!?]\s|\n\s*\n|\b(?:but|no|not|wait|actually|instead|rather|sorry|hmm|should|correct|so|hence|thus|therefore|then)\b"
    r"|#{4}|\banswer",
    re.IGNORECASE,
)
_MAX_BETWEEN = 70
_MARKUP = re.compile(r"\\[()\[\]\"]|\\?\$|[€£¥₹]|<\|[^|>]*\|>|</?s>")
_GROUP_COMMA = re.compile(r"\s*\{\s*,\s*\}\s*|,\\!\s*")
_THIN_SPACE = re.compile(r"\\!|\\,(?![A-Za-z])|(?<=\d)(?:\\[;: ]|~)(?=\d{3})")


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    text: str
    """Without currency, thousands separators, words after a number, and so on."""
    marker: str
    """`####`, `boxed`, `answer is`, `A:` or `last number`."""
    unit: str = ""
    """The unit of measure or `%` next to a plain number."""

    @property
    def marked(self) -> bool:
        return self.marker != "last number"

    @property
    def quantity(self) -> str:
        """Text and unit, for comparison."""
        return f"{self.text} {self.unit}" if self.unit else self.text


def final_answer(
    text: str, accept_last_number: bool = False, markers: Sequence[Marker] = MARKERS
) -> FinalAnswer | None:
    r"""Return the last marked answer (`#### x`, `\boxed{x}`, `The answer is x`, a line `A: x`), without text after it.

    Neighbouring boxes are one answer. "answer is" before something that is not a value (`the answer is rounded`) counts
    only if nothing else is marked. If nothing is marked and `accept_last_number` is set, the last number or formula
    counts.
    """
    words: FinalAnswer | None = None
    for marker, content in _candidates(text, markers):
        answer = _clean_boxed(content, marker) if marker == "boxed" else _clean_line(content, marker)
        if answer.text and (marker != "answer is" or _VALUE.match(content) or _VALUE.match(answer.text)):
            return answer
        if answer.text and words is None:
            words = answer
    if words is not None:
        return words
    return _unmarked(text) if accept_last_number else None


def gold_final(text: str) -> FinalAnswer:
    """Return the gold answer of GSM8K's `... #### 72`; a text without a marker is the answer itself."""
    marked = None
    if "####" in text or "boxed" in text or "\\fbox" in text or "A:" in text or "nswer" in text:
        marked = final_answer(text)
    return marked if marked is not None else _clean_boxed(text, "")


def gold_answer(text: str) -> str:
    return gold_final(text).text


def _candidates(text: str, markers: Sequence[Marker]) -> Iterator[tuple[Marker, str]]:
    """Yield marked contents, from the last to the first."""
    # Start, marker and content; content None: the rest of the line after the start.
    marks: list[tuple[int, Marker, str | None]] = []
    if "####" in markers and "####" in text:
        marks += [(match.end(), "####", None) for match in _HASHES.finditer(text)]
    if "A:" in markers and "A:" in text:
        marks += [(match.end(), "A:", None) for match in _LINE_A.finditer(text)]
    if "answer is" in markers and ("nswer" in text or "NSWER" in text):
        marks += [(match.end(), "answer is", None) for match in _ANSWER_IS.finditer(text)]
        marks += [(match.start(1), "answer is", match[1]) for match in _IS_THE_ANSWER.finditer(text)]
    if "boxed" in markers and ("\\boxed" in text or "\\fbox" in text):
        marks += [(start, "boxed", content) for start, content in _boxes(text)]
    # The last marker wins; a `\boxed{}` after `####` on the same line starts later than the line's text.
    marks.sort(key=lambda mark: (mark[0], mark[1]), reverse=True)
    for start, marker, content in marks[:MAX_CANDIDATES]:
        if content is None:
            end = text.find("\n", start, start + MAX_LINE_CHARACTERS)
            content = text[start : end if end >= 0 else start + MAX_LINE_CHARACTERS]
            if end >= 0 and content.strip(" \t$*_:\\[(") == "":  # a formula on separate lines: `\[`, the formula, `\]`
                content = " ".join(text[start : start + MAX_LINE_CHARACTERS].split("\n", 3)[:3])
        yield marker, content


def _boxes(text: str) -> list[tuple[int, str]]:
    """Return start and content of every closed box, in linear time; neighbours are joined by commas."""
    boxes: list[tuple[int, int, int, str]] = []  # starts of command and content, end, content
    open_braces: list[tuple[int, int] | None] = []  # where a box and its content start; None for an ordinary brace
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                boxes.append((*opened, match.end(), text[opened[1] : match.start()]))
        elif match[1] is not None:
            boxes.append((match.start(), match.start(1), match.end(), match[1]))
        elif token.endswith("{") and token != "\\{":
            open_braces.append((match.start(), match.end()) if len(token) > 1 else None)
    joined: list[tuple[int, str]] = []
    contents: list[str] = []
    end_before = -1
    for start, content_start, end, content in boxes:
        if end_before > 0 and start >= end_before and _belongs(text[end_before:start][: _MAX_BETWEEN + 1]):
            if content.strip() not in contents:
                contents.append(content.strip())
            joined[-1] = (joined[-1][0], ", ".join(contents))
        else:
            contents = [content.strip()]
            joined.append((content_start, content))
        end_before = end
    return joined


def _belongs(between: str) -> bool:
    if _LAYOUT.fullmatch(between):
        return True
    if len(between) > _MAX_BETWEEN or _CORRECTING.search(between):
        return False
    return _JOINING.search(between) is not None or len(between) < 12


def _unmarked(text: str) -> FinalAnswer | None:
    text = text.replace("−", "-")
    number = _last(_LAST_NUMBER.finditer(text))
    formula = _last(_LAST_FORMULA.finditer(text))
    if formula is not None and (number is None or number.start() < formula.end()):
        content = next(group for group in formula.groups() if group is not None)
        tail = text[formula.end() :]
        unit = re.match(r"\s*(?:\\?%|percent\b|pct\b|percentage\b)", tail)
        return _clean_boxed(content + (" \\%" if unit else ""), "last number")
    if number is None:
        return None
    line = text[number.start() :].split("\n", 1)[0][:MAX_LINE_CHARACTERS]
    return _clean_line(line, "last number")


def _last(matches: Iterator[re.Match[str]]) -> re.Match[str] | None:
    last = deque(matches, maxlen=1)
    return last[0] if last else None


def _strip_decoration(text: str) -> str:
    text = _GROUP_COMMA.sub(",", text.replace("−", "-"))
    text = _THIN_SPACE.sub("", text).replace("\\,", " ")
    text = _MARKUP.sub("", text)
    text = text.strip().strip("*_`\"'").lstrip("=≈:").strip()
    # `+5` is 5; a minus counts only directly before the number, so `- 5` is unchanged.
    return re.sub(r"^\+\s*(?=[\d.])", "", text)


def _currency(text: str) -> str:
    """Return the currency before or after the number at the start of a text."""
    if not ("$" in text or "€" in text or "£" in text or "¥" in text or "₹" in text or "¢" in text):
        return ""
    match = _CURRENCY.match(text.replace("−", "-"))
    if match is not None and (match[1] or match["end"] not in ("$", "\\", "^", "_")):
        return _NAMES[match[1] or match[2]]
    match = _CURRENCY_AFTER.match(text.replace("−", "-").lstrip("$*_ "))
    return _NAMES[match[1]] if match is not None else ""


def _clean_boxed(text: str, marker: str) -> FinalAnswer:
    currency = _currency(text)
    text = _strip_decoration(text)
    text = text if text.endswith("\\.") else text.rstrip(".").rstrip()
    text = canonical(text)
    return FinalAnswer(text, marker, currency if currency and plain_decimal(text) is not None else "")


def _clean_line(line: str, marker: str) -> FinalAnswer:
    if marker == "answer is":
        filler = _FILLER.match(line)
        if filler is not None and filler.end() < len(line):
            line = line[filler.end() :]
    formula = _FORMULA_FIRST.match(line)
    if formula is not None and not _GOES_ON.match(formula["rest"]):
        inside = next(formula[name] for name in ("display", "inline", "round", "square") if formula[name])
        answer = _clean_boxed(_result(inside.replace("\n", " ")), marker)
        plain = not answer.unit and plain_decimal(answer.text) is not None
        return FinalAnswer(answer.text, marker, _unit_words(formula["rest"])) if plain else answer
    currency = _currency(line)
    line = _strip_decoration(line)
    number = PLAIN_NUMBER.match(line)
    if number is not None:
        said = _number_with_words(line, number, currency, marker)
        if said is not None:
            return said
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0].strip()
    if marker == "answer is" and sentence[:1].isalpha() and not _CONDITION.search(sentence):
        verbs = list(_LAST_IS.finditer(sentence))  # `The largest n is 34`
        if verbs:
            return _clean_line(line[verbs[-1].end() :], marker)
    return FinalAnswer(canonical(_result(sentence)), marker)


def _number_with_words(line: str, number: re.Match[str], currency: str, marker: str) -> FinalAnswer | None:
    """Return the answer; None if the text after the number is part of the value."""
    text, rest = number.group(), line[number.end() :]
    word = _WORD_AFTER_NUMBER.match(rest)
    if word is not None and word.group(1).lower() in SCALES:
        text, rest = canonical(f"{text} {word.group(1)}"), rest[word.end() :]
        word = _WORD_AFTER_NUMBER.match(rest)
    percent = _PERCENT.match(rest)
    if percent is not None:
        text, rest, word = f"{canonical(text)}%", rest[percent.end() :], None
    else:
        goes_on = _BOTTOM.match(rest) or _DECIMALS.match(rest)
        if goes_on is not None:
            text, rest = text + goes_on.group(), rest[goes_on.end() :]
            word = _WORD_AFTER_NUMBER.match(rest)
    joined = _ALTERNATIVE.match(rest) or (word is not None and word.group(1).lower() in OPERATORS_IN_WORDS)
    if joined or _PRODUCT.match(rest) or not (word is not None or _PROSE.match(rest) or _SIGN.match(rest)):
        return None
    return FinalAnswer(canonical(text), marker, currency or _unit_words(rest))


def _unit_words(rest: str) -> str:
    """Return the unit of measure at the start of a text, as written."""
    stripped = rest.lstrip()
    if not stripped:
        return ""
    unit, after = leading_unit(stripped)
    if unit is None or (stripped[:3].lower() == "in " and after.strip()):  # `12 in total`
        return ""
    words = stripped[: len(stripped) - len(after)]
    if unit.letters and (rest == stripped or re.match(r"\s*[\w(=+^*/-]", after)):
        return ""  # `3m`, `5 m + 2`
    return "" if after[:1].isalpha() else words


def _result(sentence: str) -> str:
    """Return the result of a calculation (`3 * 4 = 12`), but the whole of an equation (`x + y = 3`)."""
    if "=" not in sentence or "," in sentence or re.search(r"[<>!]=|=[<>]", sentence):
        return sentence
    left, _, right = sentence.rpartition("=")
    first = left.partition("=")[0]
    is_equation = re.search(r"[A-Za-z]", first) and not _NAME.fullmatch(first.strip())
    return sentence if is_equation else right.strip()
