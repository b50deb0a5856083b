"""The sample list's filter language, compiled to parametrised SQL: `reward > 1 and correct = 0 and finish = "length"`.

    expression := and-ed ("or" and-ed)*          and-ed := negated ("and" negated)*
    negated    := "not" negated | "(" expression ")" | comparison
    comparison := field [operator value | "is" ["not"] "null" | "contains" text]
    value      := number | text in quotes | true | false | another field of numbers

Only constants of this package, and `?`, become SQL; everything that the user typed is a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rlkit.experience import UserError
from rlkit.experience.names import nearest
from rlkit.view.index import COLUMNS

Kind = Literal["number", "text", "flag"]
Names = Mapping[str, Mapping[str, str]]
"""`component` or `rescored` -> name of each component or rescored reward -> its column."""


@dataclass(frozen=True)
class Sql:
    """A condition or a value, with its parameters in order."""

    text: str
    parameters: tuple[Any, ...] = ()
    kind: Kind = "number"


SQL: dict[str, tuple[str, Kind]] = {
    **{
        name: (f'rows."{name}"', "text" if kind == "TEXT" else "number")
        for name, kind in COLUMNS.items()
        if name not in ("start", "bytes")
    },
    "above_mean": ("(rows.reward - rows.group_mean)", "number"),
    "finish": ("rows.finish_reason", "text"),
    "valid": ("rows.valid", "flag"),
    "tokens": (
        "EXISTS (SELECT 1 FROM token_rows t WHERE t.step = rows.step AND t.group_id = rows.group_id "
        "AND t.sample = rows.sample)",
        "flag",
    ),
}
OPERATORS = {sign: sign for sign in ("=", "!=", "<", "<=", ">", ">=")} | {"==": "=", "<>": "!="}
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
    """A wrong filter. The message names the character, counted from 1, and what is possible there."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(f"filter, character {position + 1}: {message}")
        self.position = position


def compile_filter(text: str, names: Names) -> Sql:
    """Compile a filter to SQL. Raises FilterError."""
    if len(text) > LONGEST:
        raise FilterError(LONGEST, f"a filter has at most {LONGEST} characters")
    parser = _Parser(_tokens(text), names)
    sql = parser.expression()
    if parser.token.kind != "end":
        raise parser.error("expected 'and', 'or' or the end")
    return sql


def field(name: str, names: Names, position: int = 0) -> Sql:
    """Return a field's SQL: `reward`, `component.format` or `component:format`. Raises FilterError if it is unknown."""
    family, separator, own = re.fullmatch(r"(\w*)([.:]?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if separator and family in ("component", "rescored"):
        own = own[1:-1].replace('""', '"') if own.startswith('"') else own
        known = names.get(family, {})
        if own not in known:
            listed = f"this run has {', '.join(sorted(known))}" if known else f"this run has no {family}"
            raise FilterError(position, f"unknown {family} {own!r}: {listed}")
        return Sql(f"rows.{known[own]}")
    if name not in SQL:
        fields = [*SQL, *(f"{family}.{one}" for family in names for one in sorted(names[family]))]
        meant = nearest(name, fields)
        possible = f"did you mean {meant}?" if meant else f"the fields are {', '.join(fields)}"
        raise FilterError(position, f"unknown field {name!r}: {possible}")
    sql, kind = SQL[name]
    return Sql(sql, (), kind)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


def _tokens(text: str) -> list[_Token]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            start = len(text) - len(text[at:].lstrip())
            quote = text[start] in "\"'"
            raise FilterError(start, "this text has no closing quote" if quote else f"unexpected {text[start]!r}")
        tokens.append(_Token(match.lastgroup, match.group(match.lastgroup), match.start(match.lastgroup)))
        at = match.end()
    return [*tokens, _Token("end", "", len(text))]


class _Parser:
    """One method per rule of the grammar; `token` is the next token."""

    def __init__(self, tokens: list[_Token], names: Names) -> None:
        self._tokens, self._names, self._depth = tokens, names, 0

    @property
    def token(self) -> _Token:
        return self._tokens[0]

    def error(self, expected: str) -> FilterError:
        got = "the end" if self.token.kind == "end" else repr(self.token.text)
        return FilterError(self.token.start, f"{expected}, not {got}")

    def _take(self, *words: str) -> str | None:
        """Consume and return the next token if it is one of these words or signs."""
        text = self.token.text.lower() if self.token.kind == "name" else self.token.text
        if self.token.kind not in ("name", "operator") or text not in words:
            return None
        self._tokens.pop(0)
        return text

    def expression(self) -> Sql:
        return self._joined("or", lambda: self._joined("and", self._negated))

    def _joined(self, word: str, part: Callable[[], Sql]) -> Sql:
        parts = [part()]
        while self._take(word):
            parts.append(part())
        if len(parts) == 1:
            return parts[0]
        text = f" {word.upper()} ".join(one.text for one in parts)
        return Sql(f"({text})", tuple(p for one in parts for p in one.parameters), "flag")

    def _negated(self) -> Sql:
        self._depth += 1
        if self._depth > DEEPEST:
            raise FilterError(self.token.start, f"parentheses and 'not' may be nested at most {DEEPEST} deep")
        if self._take("not"):
            inner = self._negated()
            sql = Sql(f"(NOT {inner.text})", inner.parameters, "flag")
        elif self._take("("):
            sql = self.expression()
            if not self._take(")"):
                raise self.error("expected ')'")
        else:
            sql = self._comparison()
        self._depth -= 1
        return sql

    def _comparison(self) -> Sql:
        left = self._field("expected a field, 'not' or '('")
        if self._take("is"):
            negated = "NOT " if self._take("not") else ""
            if not self._take("null"):
                raise self.error("expected 'null'" if negated else "expected 'null' or 'not null'")
            return Sql(f"({left.text} IS {negated}NULL)", (), "flag")
        if left.kind == "text" and self._take("contains"):
            value = self._value(left.kind)
            return Sql(f"(instr({left.text}, {value.text}) > 0)", value.parameters, "flag")
        operator = self._take(*OPERATORS)
        if operator is None:
            if left.kind == "flag":
                return Sql(f"({left.text})", (), "flag")
            more = ", 'contains'" if left.kind == "text" else ""
            raise self.error(f"expected one of {' '.join(list(OPERATORS)[:6])}{more} or 'is null'")
        value = self._value(left.kind)
        return Sql(f"({left.text} {OPERATORS[operator]} {value.text})", value.parameters, "flag")

    def _field(self, expected: str) -> Sql:
        if self.token.kind != "name" or self.token.text.lower() in ("and", "or", "is", "null", "contains"):
            raise self.error(expected)
        token = self._tokens.pop(0)
        return field(token.text, self._names, token.start)

    def _value(self, kind: Kind) -> Sql:
        token = self.token
        if kind == "text":
            if token.kind != "text":
                raise self.error('expected text in quotes, like "length"')
            self._tokens.pop(0)
            return Sql("?", (token.text[1:-1].replace(token.text[0] * 2, token.text[0]),))
        if word := self._take("true", "false"):
            return Sql("?", (int(word == "true"),))
        if token.kind == "number":
            self._tokens.pop(0)
            return Sql("?", (float(token.text),))
        if kind == "flag":
            raise self.error("expected true or false")
        value = self._field("expected a number, or another numeric field")
        if value.kind == "text":
            raise FilterError(token.start, f"expected a number: {token.text} is text")
        return value
