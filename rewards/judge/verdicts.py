"""A judge's answer, read strictly: what cannot be read is an error and never a score.

The verdict is taken from the structured answer alone: the whole answer must be one JSON object, or its last line the
verdict. A verdict that the judge quotes from a response it was given therefore does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

AnswerFormat = Literal["json_schema", "json_object", "text"]
SHARES = {"A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5)}
_NUMBER = r"[-+]?\d+(?:\.\d+)?"


class Unparsable(ValueError):
    """The judge's answer is not in the form asked for; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said about the responses in one question."""

    values: tuple[float, ...]
    """One per response, 0 to 1; for two that were compared: their shares of the win."""
    reasoning: str


@dataclass(frozen=True, slots=True)
class NoVerdict:
    """The judge could not be asked or understood."""

    reason: str
    """`class: details`"""


@dataclass(frozen=True, slots=True)
class Form:
    """The verdict that is asked for: scores of `responses` responses, or the winner of two."""

    kind: Literal["scores", "winner"]
    responses: int
    low: float = 0.0
    high: float = 1.0
    reasons: bool = True
    """Whether reasons are asked for, before the verdict."""

    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer. Reasoning comes first, so that the verdict follows from it."""
        whole = float(self.low).is_integer() and float(self.high).is_integer()
        limits = {"minimum": int(self.low), "maximum": int(self.high)} if whole else {}
        score = {"type": "integer" if whole else "number", **limits}
        verdict: dict[str, Any]
        if self.kind == "winner":
            verdict = {"winner": {"type": "string", "enum": list(SHARES)}}
        elif self.responses == 1:
            verdict = {"score": score}
        else:
            names = self.names()
            inner = {"properties": dict.fromkeys(names, score), "required": names, "additionalProperties": False}
            verdict = {"scores": {"type": "object", **inner}}
        properties = {**({"reasoning": {"type": "string"}} if self.reasons else {}), **verdict}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def names(self) -> list[str]:
        """What responses are called in the question and in the answer."""
        return ["A", "B"] if self.kind == "winner" else [str(i + 1) for i in range(self.responses)]

    def instruction(self, answer_format: AnswerFormat) -> str:
        """How to answer, for the judge."""
        scale = f"from {self.low:g} (worst) to {self.high:g} (best)"
        if answer_format == "text":
            line = {
                "winner": "`Winner: A`, `Winner: B` or `Winner: tie`",
                "scores": f"`Score: N`, where N goes {scale}"
                if self.responses == 1
                else f"`Scores: N, N, ...` with one number {scale} per response, in their order",
            }[self.kind]
            if not self.reasons:
                return f"Answer with one line and nothing else: {line}."
            return f"Give your reasons first. Then end your answer with a line of its own: {line}."
        example: dict[str, Any] = {"reasoning": "..."} if self.reasons else {}
        if self.kind == "winner":
            example["winner"] = "A"
            meaning = 'winner is "A", "B" or "tie"'
        elif self.responses == 1:
            example["score"] = self.high
            meaning = f"score is a number {scale}"
        else:
            example["scores"] = dict.fromkeys(self.names(), self.high)
            meaning = f"scores has a number {scale} for every response"
        return f"Answer with one JSON object and nothing else: {json.dumps(example)}, where {meaning}."

    def read(self, answer: str, answer_format: AnswerFormat) -> Verdict:
        """The verdict in an answer. Raises Unparsable."""
        text = answer.rpartition("</think>")[2].strip()  # judges that think aloud
        if not text:
            raise Unparsable("the answer is empty")
        if answer_format == "text":
            return self._read_text(text)
        found = _json_object(text)
        reasoning = found.get("reasoning", "")
        if self.kind == "winner":
            winner = found.get("winner")
            if winner not in SHARES:
                raise Unparsable(f'winner is {winner!r}, not "A", "B" or "tie"')
            return Verdict(SHARES[winner], str(reasoning))
        scores = [found.get("score")] if self.responses == 1 else self._in_order(found.get("scores"))
        return Verdict(tuple(self._scaled(score) for score in scores), str(reasoning))

    def _in_order(self, scores: Any) -> list[Any]:
        names = self.names()
        if not isinstance(scores, Mapping) or set(scores) != set(names):
            raise Unparsable(f"scores must be an object with a number for each of {', '.join(names)}")
        return [scores[name] for name in names]

    def _read_text(self, text: str) -> Verdict:
        reasoning, _, last = text.rpartition("\n")
        line = last.strip().strip("*_`").strip()
        if self.kind == "winner":
            winner = re.fullmatch(r"winner\s*:[\s*]*(a|b|tie)\.?", line, re.IGNORECASE)
            if not winner:
                raise Unparsable(f"the last line is not `Winner: A`, `Winner: B` or `Winner: tie` but {last[:80]!r}")
            return Verdict(SHARES[{"a": "A", "b": "B"}.get(winner[1].lower(), "tie")], reasoning)
        count = self.responses
        match = re.fullmatch(
            rf"scores?\s*:[\s*]*({_NUMBER}(?:\s*,\s*{_NUMBER}){{{count - 1}}})\.?", line, re.IGNORECASE
        )
        if not match:
            raise Unparsable(f"the last line is not `Score: ` with {count} number(s) but {last[:80]!r}")
        return Verdict(tuple(self._scaled(float(number)) for number in match[1].split(",")), reasoning)

    def _scaled(self, score: Any) -> float:
        """0 to 1. A score off the scale is an error: nobody knows what the judge meant."""
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not self.low <= score <= self.high:
            raise Unparsable(f"a score is {score!r}, not a number from {self.low:g} to {self.high:g}")
        return (score - self.low) / (self.high - self.low)


def _json_object(text: str) -> dict[str, Any]:
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise Unparsable(f"the answer is not one JSON object: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise Unparsable("the answer is not one JSON object: nested too deeply") from error
    except Unparsable:
        raise
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise Unparsable(f"the answer cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Unparsable(f"the answer is not a JSON object but {type(found).__name__}")
    return found


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unparsable("the answer has a key twice")
    return found
