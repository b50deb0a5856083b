"""What `reward=judge` asks, and the form of a verdict."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rewards.judge.question import Question, Verdict, conversation, fenced_chat
from rewards.services.answers import Unparsable, guided_decoding, json_object, strip_thinking
from rlkit.experience import Message

AnswerFormat = Literal["json_schema", "json_object", "text"]
Mode = Literal["pointwise", "pairwise", "listwise"]
Against = Literal["group", "reference"]

PRINCIPLE = (
    "A good response answers the question correctly and completely, is clear, and contains nothing false. "
    "A response that does not answer the question is bad, however well it is written."
)
SHARES = {"A": (1.0, 0.0), "B": (0.0, 1.0), "tie": (0.5, 0.5)}
"""Winner -> each response's share of the win."""
_NUMBER = r"[-+]?\d+(?:\.\d+)?"


@dataclass(frozen=True, slots=True)
class Form:
    kind: Literal["scores", "winner"]
    responses: int
    low: float = 0.0
    high: float = 1.0
    reasons: bool = True

    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer; reasoning comes first, so that the verdict follows from it."""
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
        return ["A", "B"] if self.kind == "winner" else [str(i + 1) for i in range(self.responses)]

    def instruction(self, answer_format: AnswerFormat) -> str:
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
        if answer_format == "text":
            return self._read_text(strip_thinking(answer))
        content = json_object(answer)
        reasoning = str(content.get("reasoning", ""))
        if self.kind == "winner":
            winner = content.get("winner")
            if winner not in SHARES:
                raise Unparsable(f'winner is {winner!r}, not "A", "B" or "tie"')
            return Verdict(SHARES[winner], reasoning)
        scores = [content.get("score")] if self.responses == 1 else self._in_order(content.get("scores"))
        return Verdict(tuple(self._scaled(score) for score in scores), reasoning)

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
        """Map a score to 0..1; raise Unparsable if it is off the scale."""
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not self.low <= score <= self.high:
            raise Unparsable(f"a score is {score!r}, not a number from {self.low:g} to {self.high:g}")
        return (score - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Material:
    principle: str
    conversation: tuple[Message, ...]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    mode: Mode
    low: float
    high: float
    against: Against
    neighbours: int | None
    swap: bool
    reasons: bool
    answer_format: AnswerFormat
    seed: int

    def questions(self, material: Material, texts: Sequence[str]) -> list[Question]:
        """Return questions about distinct texts; with `against=reference`, none reveals which text is the reference."""
        if self.mode == "pointwise":
            return [self.question(material, (text,)) for text in texts]
        order = shuffle(texts, material, self.seed)
        if self.mode == "listwise":  # shuffled, so that a position in the group gives no advantage
            return [self.question(material, tuple(order))] if order else []
        if self.against == "reference":
            reference = material.reference or ""
            pairs = [(text, reference) for text in texts if text != reference]
            material = Material(material.principle, material.conversation)
        else:
            pairs = opponents(order, self.neighbours)
        # Over both orders, a judge that always prefers the response it reads first gives 1/2.
        orders = [pair[::step] for pair in pairs for step in ((1, -1) if self.swap else (1,))]
        return [self.question(material, pair) for pair in orders]

    def question(self, material: Material, responses: tuple[str, ...]) -> Question:
        form = Form("scores", len(responses), self.low, self.high, self.reasons)
        task = "Score the response" + ("" if len(responses) == 1 else "s, each by itself and beside the others")
        if self.mode == "pairwise":
            form = Form("winner", len(responses), reasons=self.reasons)
            task = "Say which of the two responses is better; their order means nothing"
        names = ["RESPONSE"] if len(responses) == 1 else [f"RESPONSE {name}" for name in form.names()]
        blocks = [("CONVERSATION", conversation(material.conversation)), *zip(names, responses, strict=True)]
        task += " by the principle."
        if material.reference is not None:
            blocks.insert(1, ("REFERENCE ANSWER", material.reference))
            task += " The reference answer is correct."
        instruction = form.instruction(self.answer_format)
        contents = [message.content for message in material.conversation]
        messages = fenced_chat(
            f"You judge responses by this principle:\n{material.principle}",
            blocks,
            f"{task} {instruction}",
            self.seed,
            [material.principle, *contents, material.reference or "", *responses],
        )
        fields: dict[str, Any] = {}
        if self.answer_format == "json_schema":
            fields = guided_decoding(form.schema())
        elif self.answer_format == "json_object":
            fields = {"response_format": {"type": "json_object"}}
        read = partial(form.read, answer_format=self.answer_format)
        return Question(responses, messages, read, instruction, fields, self.answer_format)


def shuffle(texts: Sequence[str], material: Material, seed: int) -> list[str]:
    """Order by a hash of the texts."""
    salt = repr((seed, material.principle, material.conversation))
    return sorted(texts, key=lambda text: hashlib.sha256((salt + text).encode("utf-8", "surrogatepass")).digest())


def opponents(texts: Sequence[str], neighbours: int | None) -> list[tuple[str, str]]:
    """Pair each text with every other one, or with the next `neighbours` in a ring."""
    count = len(texts)
    if neighbours is None or 2 * neighbours >= count - 1:
        return list(itertools.combinations(texts, 2))
    return [(texts[i], texts[(i + step) % count]) for i in range(count) for step in range(1, neighbours + 1)]
