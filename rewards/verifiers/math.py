"""`reward=math` (and `rule`, `gsm8k`): 1 if the final answer of a response equals the gold answer, else 0.

In order: finding the final answer in a text, comparing plain numbers exactly, math-verify for everything else (in
processes that are killed when they hang), and the reward.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field

from rewards.base import Reward, RewardContext, RewardTraits
from rewards.verifiers.pool import Failed, Processes, TextRuleConfig, limit_memory
from rlkit.cluster.processes import die_with_parent
from rlkit.experience import Group, GroupScores, Score, UserError

MAX_ANSWER_CHARACTERS = 256
"""A longer "answer" is prose; it is not handed to the verifier."""

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
"""What makes `5 or 6` more than a 5; `5 and so on` is only that. (`a` and `I` are words.)"""
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
"""How a value starts; what else follows "answer is" may be prose about the answer (`my answer is helpful`)."""
_PROSE = re.compile(r"\s+[(\[\"'A-Za-z]|[\"')\]]*(?:[.;:!?]|,(?!\s*\d))(?:\s|$)|[\"')\]]+(?:\s|$)|\s*$")


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The final answer of a text."""

    text: str
    """Cleaned: without currency, thousands separators, units and the rest of the sentence."""
    marker: str
    """What marked it: `####`, `boxed`, `answer is`, `A:` or `last number`."""

    @property
    def marked(self) -> bool:
        """Whether the text marked it as its final answer."""
        return self.marker != "last number"


def final_answer(
    text: str, accept_last_number: bool = False, markers: Sequence[Marker] = MARKERS
) -> FinalAnswer | None:
    r"""The last marked answer (`#### x`, `\boxed{x}`, `The answer is x`, a line `A: x`); None if there is none.

    Whatever follows the answer, on its line or on further ones, does not matter. "answer is" followed by something
    that does not start like a value (`the answer is rounded`) counts only if nothing else is marked. If nothing is and
    `accept_last_number` is set, the last number of the text counts.
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
    """The final answer of a gold text: GSM8K's `... #### 72` gives `72`; a text without a marker is the answer."""
    marked = final_answer(text) if any(mark in text for mark in ("####", "\\boxed", "A:")) else None
    return marked.text if marked is not None else _clean_boxed(text)


def plain_decimal(text: str) -> Decimal | None:
    """The exact value of a plain decimal number (`-1,234.50`, `1e3`), None for everything else."""
    if _PLAIN_NUMBER.fullmatch(text) is None:
        return None
    return Decimal(text.replace(",", ""))


def compare_plain(answer: str, gold: str) -> bool | None:
    """Whether two plain decimal numbers are equal; None where math-verify's rounding could matter, or not both plain.

    math-verify compares floats after rounding to 6 places at 15 digits, so numbers closer than 1e-5 but not equal,
    and numbers of more than 12 digits, are left to it.
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
    """Start and content of every closed `\\boxed{...}`, braces balanced; one pass, whatever the text."""
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
    """Remove what surrounds an answer: math delimiters, markdown, currency, spacing commands, special tokens."""
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
    """The answer at the start of the rest of a line: a number without what follows it, or the line's first sentence."""
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
    """Numbers in one spelling (no separators, exponents, trailing zeros), so that equal ones share a verdict."""
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
    """Answer and gold, without a unit in words (`12 m^2`, `5 square feet`, `3 km/h`) that only one of them has.

    Two units are left to be compared. A letter on the gold's number is algebra, not a unit: `3k` stays. Longer than an
    answer may be, a text stays as it is.
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
    """A verdict per (answer, gold) pair: `right`, `wrong`, `gold_unparsable`, or `exception: ...`."""
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
    """What math-verify reads in an answer: as the content of a box, else as it is. Empty: no expression.

    Remembered: all samples of a group share their gold answer, and many an answer.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    in_latex = re.sub(r"(?<!\\)%", r"\\%", answer)  # a bare % starts a comment
    for text in (f"\\boxed{{{in_latex}}}", answer):
        parsed: list[object] = parse(text, extraction_config=targets, parsing_timeout=None, raise_on_error=True)
        if any(not isinstance(expression, str) for expression in parsed):
            return parsed
    return []


def prepare() -> None:
    """Tie this process to its parent, limit its memory and load math-verify before any deadline runs."""
    die_with_parent()
    # math-verify warns that its own time-outs are off: they are, on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    verify_pairs([("\\frac{1}{2}", "0.5")])  # builds the LaTeX grammar, which the first parse would wait for
    limit_memory()


Pair = tuple[str, str]


class VerifierError(UserError):
    """The verifier itself does not work (as opposed to: it could not judge an answer)."""


class Verifier:
    """Judges pairs of cleaned answers; remembers verdicts; owns its processes.

    >>> verifier = Verifier(processes=1, item_timeout_seconds=5.0, cache_size=1000)
    >>> verifier.verdicts([("1/2", "0.5"), ("3", "4")], budget_seconds=60.0)
    {('1/2', '0.5'): 'right', ('3', '4'): 'wrong'}
    """

    def __init__(self, processes: int, item_timeout_seconds: float, cache_size: int) -> None:
        self._processes = Processes(processes, prepare, ["math_verify", "rewards.verifiers.math"])
        self._item_timeout = item_timeout_seconds
        self._cache_size = cache_size
        self._cache: OrderedDict[Pair, str] = OrderedDict()

    def start(self, timeout_seconds: float = 60.0) -> None:
        """Start the processes and prove that they judge. Raises VerifierError with the cause if they do not."""
        if importlib.util.find_spec("math_verify") is None:
            raise VerifierError("math-verify is not installed: pip install 'math-verify[antlr4_9_3]'")
        probes = {("1/2", "0.5"): "right", ("\\frac{3}{4}", "0.5"): "wrong"}
        verdicts = self._judge(list(probes), time.monotonic() + timeout_seconds, timeout_seconds)
        if verdicts != probes:
            raise VerifierError(f"math-verify does not work in its processes: expected {probes}, got {verdicts}")

    def verdicts(self, pairs: Iterable[Pair], budget_seconds: float) -> dict[Pair, str]:
        """`right`, `wrong` or the reason why there is no verdict (`timeout: ...`, `crash: ...`) for each pair.

        Takes at most about `budget_seconds`; pairs not reached by then are `timeout: ...`.
        """
        deadline = time.monotonic() + budget_seconds
        known: dict[Pair, str] = {}
        unknown: list[Pair] = []
        for pair in dict.fromkeys(pairs):
            verdict = self._remembered(pair)
            if verdict is None:
                unknown.append(pair)
            else:
                known[pair] = verdict
        judged = self._judge(unknown, deadline, self._item_timeout) if unknown else {}
        for pair, verdict in judged.items():
            if verdict in ("right", "wrong", "gold_unparsable"):
                self._remember(pair, verdict)
        return known | judged

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def _remembered(self, pair: Pair) -> str | None:
        if pair in self._cache:
            self._cache.move_to_end(pair)
            return self._cache[pair]
        answer, gold = pair
        if answer == gold:
            return "right"
        equal = compare_plain(answer, gold)
        return None if equal is None else ("right" if equal else "wrong")

    def _remember(self, pair: Pair, verdict: str) -> None:
        self._cache[pair] = verdict
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _judge(self, pairs: Sequence[Pair], deadline: float, item_timeout: float) -> dict[Pair, str]:
        results = self._processes.map(verify_pairs, pairs, deadline, item_timeout)
        reasons = (result.reason if isinstance(result, Failed) else result for result in results)
        return dict(zip(pairs, reasons, strict=True))


class MathReward(Reward):
    r"""Compares the response's final answer (`#### x`, `\boxed{x}`, `The answer is x`, `A: x`) with the gold answer.

    A response without an answer scores 0: that is the model's failure. An answer that the verifier cannot judge
    (it hangs, dies, or cannot read the gold answer) is invalid, with the reason.
    """

    class Config(TextRuleConfig):
        """Options of the mathematics reward."""

        format_weight: float = Field(default=0.0, ge=0)
        """Added to the value of a response that marks its final answer, right or wrong."""
        accept_last_number: bool = False
        """Take the last number of a response that marks no answer."""
        markers: Annotated[tuple[Marker, ...], Field(min_length=1)] = MARKERS
        """What may mark the final answer; of several, the last one in the response counts."""
        strip_units: bool = False
        """A unit that only one of answer and gold has does not matter, in boxes, too: `12 m^2` is 12."""
        cache_size: int = Field(default=65536, ge=1)
        """Verdicts remembered, the least recently used dropped first."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """The gold answer."""
        return RewardTraits(answer=True, uses_gpu=False)

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._verifier: Verifier | None = None

    def start(self) -> None:
        """Start the verifier processes and let them judge a known pair."""
        self._open_verifier().start()

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Judge every response against its prompt's gold answer."""
        responses = [sample.text for group in groups for sample in group.samples]
        answers = [group.prompt.answer for group in groups for _ in group.samples]
        scores = iter(self.judge(responses, answers))
        return [GroupScores(tuple(next(scores) for _ in group.samples)) for group in groups]

    def judge(self, responses: Sequence[str], answers: Sequence[str | None]) -> list[Score]:
        """One score per (response, gold answer). Components: `correct` and `format` (an answer is marked)."""
        finals = [final_answer(text, self.config.accept_last_number, self.config.markers) for text in responses]
        golds = [None if answer is None else gold_answer(answer) for answer in answers]
        if self.config.strip_units:
            for index, (answer, gold) in enumerate(zip(finals, golds, strict=True)):
                if answer is not None and gold:
                    text, golds[index] = without_units(answer.text, gold)
                    finals[index] = replace(answer, text=text)
        pairs = [
            (answer.text, gold)
            for answer, gold in zip(finals, golds, strict=True)
            if answer is not None and gold and len(answer.text) <= MAX_ANSWER_CHARACTERS
        ]
        # A fifth of the call's deadline is kept for everything else, so that the verifier gives up before it is killed.
        verdicts = self._open_verifier().verdicts(pairs, budget_seconds=0.8 * self.config.timeout_seconds)
        return [self._score(answer, gold, verdicts) for answer, gold in zip(finals, golds, strict=True)]

    def close(self) -> None:
        """End the verifier processes."""
        if self._verifier is not None:
            self._verifier.close()

    def _score(self, answer: FinalAnswer | None, gold: str | None, verdicts: dict[tuple[str, str], str]) -> Score:
        if not gold:
            return Score.invalid("no_gold: the prompt has no gold answer")
        if answer is None:
            return self._valid(False, False, "no final answer found")
        if len(answer.text) > MAX_ANSWER_CHARACTERS:
            return self._valid(False, answer.marked, f"the answer is longer than {MAX_ANSWER_CHARACTERS} characters")
        verdict = verdicts[answer.text, gold]
        trace = f"answer {answer.text!r} ({answer.marker}), gold {gold!r}: {verdict}"
        if verdict in ("right", "wrong"):
            return self._valid(verdict == "right", answer.marked, trace)
        if verdict == "gold_unparsable":
            return Score.invalid(f"gold_unparsable: math-verify cannot read the gold answer {gold!r}", trace)
        return Score.invalid(verdict, trace)

    def _valid(self, correct: bool, marked: bool, trace: str) -> Score:
        components = {"correct": float(correct), "format": float(marked)}
        value = components["correct"] + self.config.format_weight * components["format"]
        return Score(value=value, components=components, trace=trace)

    def _open_verifier(self) -> Verifier:
        if self._verifier is None:
            self._verifier = Verifier(self.config.processes, self.config.item_timeout_seconds, self.config.cache_size)
        return self._verifier
