"""The filter language of the sample list, as parametrised SQL: `reward > 1 and correct = 0 and finish = "length"`.

    expression := and-ed ("or" and-ed)*          and-ed := negated ("and" negated)*
    negated    := "not" negated | "(" expression ")" | comparison
    comparison := field [operator value | "is" ["not"] "null" | "contains" text]
    value      := number | text in quotes | true | false | another field of numbers

Only constants of this package, and `?`, become SQL; whatever a person wrote is a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlkit.experience import UserError
from rlkit.experience.names import nearest

Kind = Literal["number", "text", "flag"]
Value = str | float | int

NUMBERS = (
    "id", "step", "sample", "reward", "advantage", "length", "correct", "verdict", "staleness", "group_size",
    "group_mean", "spread", "digits",
)  # fmt: skip
TEXTS = ("rank", "finish_reason", "dropped", "kind", "set", "decoding", "group_id", "prompt_id", "reason")
SQL: dict[str, tuple[str, Kind]] = {
    **{name: (f"rows.{name}", "number") for name in NUMBERS},
    **{name: (f'rows."{name}"', "text") for name in TEXTS},
    "above_mean": ("(rows.reward - rows.group_mean)", "number"),
    "finish": ("rows.finish_reason", "text"),
    "valid": ("rows.valid", "flag"),
    "tokens": (
        "EXISTS (SELECT 1 FROM token_rows t WHERE t.step = rows.step AND t.group_id = rows.group_id "
        "AND t.sample = rows.sample)",
        "flag",
    ),
}
FAMILIES = ("component", "rescored")
EXTRA = "(SELECT value FROM extra WHERE extra.name = (SELECT key FROM names WHERE names.name = ?) AND id = rows.id)"
"""Its parameter is `component:NAME` or `rescored:NAME`."""
OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
LONGEST, DEEPEST = 4000, 40
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<text>"(?:[^"]|"")*"|'(?:[^']|'')*')
      | (?P<operator><=|>=|!=|<>|==|=|<|>|\(|\))
      | (?P<name>[A-Za-z_][\w]*(?:[.:](?:"(?:[^"]|"")*"|[\w/@%.:-]+))?)
    )""",
    re.VERBOSE,
)


class FilterError(UserError):
    """The message says at which character, counted from 1, and what is possible there."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(f"filter, character {position + 1}: {message}")
        self.position = position


@dataclass(frozen=True)
class Sql:
    """A condition or a value, and its parameters in order."""

    text: str
    parameters: tuple[Value, ...] = ()
    kind: Kind = "number"


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


def compile_filter(text: str, names: Mapping[str, Collection[str]]) -> Sql:
    """`names`: those of the `component`s and of the `rescored` rewards that there are. Raises FilterError."""
    return _Parser(text, names).whole()


def field(name: str, names: Mapping[str, Collection[str]], position: int = 0) -> Sql:
    """A field's SQL: `reward`, `component.format` or `component:format`. Raises FilterError for an unknown one."""
    family, separator, rest = _family(name)
    if separator and family in FAMILIES:
        known = names.get(family, ())
        own = rest[1:-1].replace('""', '"') if rest.startswith('"') else rest
        if own not in known:
            listed = f"this run has {_listed(sorted(known))}" if known else f"this run has no {family}"
            raise FilterError(position, f"unknown {family} {own!r}: {listed}")
        return Sql(EXTRA, (f"{family}:{own}",))
    if name not in SQL:
        fields = [*SQL, *(f"{family}.{one}" for family in FAMILIES for one in sorted(names.get(family, ())))]
        meant = nearest(name, fields)
        raise FilterError(
            position,
            f"unknown field {name!r}: " + (f"did you mean {meant}?" if meant else f"there are {_listed(fields)}"),
        )
    sql, kind = SQL[name]
    return Sql(sql, (), kind)


def _family(name: str) -> tuple[str, str, str]:
    match = re.search(r"[.:]", name)
    return (name[: match.start()], match.group(), name[match.end() :]) if match else (name, "", "")


class _Parser:
    def __init__(self, text: str, names: Mapping[str, Collection[str]]) -> None:
        if len(text) > LONGEST:
            raise FilterError(LONGEST, f"a filter has at most {LONGEST} characters")
        self._text, self._names = text, names
        self._tokens, self._at, self._depth = _tokens(text), 0, 0

    def whole(self) -> Sql:
        sql = self._either()
        if self._token.kind != "end":
            raise self._error("expected 'and', 'or' or the end")
        return sql

    @property
    def _token(self) -> _Token:
        return self._tokens[self._at]

    def _error(self, expected: str) -> FilterError:
        token = self._token
        got = "the end" if token.kind == "end" else repr(token.text)
        return FilterError(token.start, f"{expected}, not {got}")

    def _word(self, *words: str) -> str | None:
        """Take the next token if it is one of these words or signs."""
        token = self._token
        text = token.text.lower() if token.kind == "name" else token.text
        if token.kind not in ("name", "operator") or text not in words:
            return None
        self._at += 1
        return text

    def _either(self) -> Sql:
        return self._joined("or", self._all)

    def _all(self) -> Sql:
        return self._joined("and", self._negated)

    def _joined(self, word: str, part: Callable[[], Sql]) -> Sql:
        parts = [part()]
        while self._word(word):
            parts.append(part())
        if len(parts) == 1:
            return parts[0]
        text = f" {word.upper()} ".join(one.text for one in parts)
        return Sql(f"({text})", tuple(p for one in parts for p in one.parameters), "flag")

    def _negated(self) -> Sql:
        self._depth += 1
        if self._depth > DEEPEST:
            raise FilterError(self._token.start, f"at most {DEEPEST} parentheses and 'not' inside one another")
        try:
            if self._word("not"):
                inner = self._negated()
                return Sql(f"(NOT {inner.text})", inner.parameters, "flag")
            if self._word("("):
                inner = self._either()
                if not self._word(")"):
                    raise self._error("expected ')'")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Sql:
        left = self._field("expected a field, 'not' or '('")
        if self._word("is"):
            negated = self._word("not")
            if not self._word("null"):
                raise self._error("expected 'null'" if negated else "expected 'null' or 'not null'")
            return Sql(f"({left.text} IS {'NOT ' if negated else ''}NULL)", left.parameters, "flag")
        if left.kind == "text" and self._word("contains"):
            value = self._value(left.kind)
            return Sql(f"(instr({left.text}, {value.text}) > 0)", (*left.parameters, *value.parameters), "flag")
        operator = self._word("==", "<>", *OPERATORS)
        if operator is None:
            if left.kind == "flag":
                return Sql(f"({left.text})", left.parameters, "flag")
            more = ", 'contains'" if left.kind == "text" else ""
            raise self._error(f"expected one of {' '.join(OPERATORS)}{more} or 'is null'")
        value = self._value(left.kind)
        sign = {"==": "=", "<>": "!="}.get(operator, operator)
        return Sql(f"({left.text} {sign} {value.text})", (*left.parameters, *value.parameters), "flag")

    def _field(self, expected: str) -> Sql:
        token = self._token
        if token.kind != "name" or token.text.lower() in ("and", "or", "is", "null", "contains"):
            raise self._error(expected)
        self._at += 1
        return field(token.text, self._names, token.start)

    def _value(self, kind: Kind) -> Sql:
        token = self._token
        if kind == "text":
            if token.kind != "text":
                raise self._error('expected a text in quotes, like "length"')
            self._at += 1
            quote = token.text[0]
            return Sql("?", (token.text[1:-1].replace(quote * 2, quote),))
        if self._word("true", "false"):
            return Sql("?", (int(token.text.lower() == "true"),))
        if token.kind == "number":
            self._at += 1
            return Sql("?", (float(token.text),))
        if kind == "flag":
            raise self._error("expected true or false")
        value = self._field("expected a number, or another field of numbers")
        if value.kind == "text":
            raise FilterError(token.start, f"expected a number: {token.text} is a text")
        return value


def _tokens(text: str) -> list[_Token]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            quote = text[start] in "\"'"
            raise FilterError(start, "this text has no closing quote" if quote else f"unexpected {text[start]!r}")
        tokens.append(_Token(match.lastgroup, match.group(match.lastgroup), match.start(match.lastgroup)))
        at = match.end()
    return [*tokens, _Token("end", "", len(text))]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
