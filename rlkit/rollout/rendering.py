"""An episode's conversation as token ids: the first prompt, the bridge from each turn to the next, parsed calls."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from rlkit.data.base import BadRow
from rlkit.data.rendering import ChatTemplate
from rlkit.environments.tool import Tool
from rlkit.experience import Message, ToolCall, UserError
from rlkit.rollout.calls import NAMES, OF_VLLM, CallFormat, call_format

REMEDY = (
    "use a template that leaves earlier turns unchanged (model.chat_template=<file>), or set its variables to do so "
    "(model.chat_template_arguments)"
)
RERENDER = (
    ", or have the conversation rendered again for every turn, whose tokens then form rows of their own "
    "(environment.history=rerender)"
)
_ASKS = Message("user", "Hi")
_THINKING, _ANSWER = "<think>\nwhy\n</think>\n\n", "yes"
_Said = tuple[tuple[str, str, str, str], ...]


class RenderingError(UserError):
    """Raised if the chat template cannot render a conversation, or not as a continuation of the tokens so far."""


class Bridge(NamedTuple):
    """What is between one turn and the next: `drop` sampled tokens are replaced by `ids`."""

    drop: int
    ids: list[int]


def continuation(
    ids: Sequence[int], turn: Sequence[int], prompt: Sequence[int], ends: Container[int] | None
) -> Bridge | None:
    """Return how a prompt continues `ids`, which end with the sampled `turn`; None if it does not begin with them.

    The token that ended the turn may be replaced by one of `ends` (None: by any token).
    """
    if list(prompt[: len(ids)]) == list(ids):
        return Bridge(0, list(prompt[len(ids) :]))
    kept, rest = len(ids) - 1, list(prompt[len(ids) - 1 :])
    replaced = ends is None or bool(rest and rest[0] in ends)
    return Bridge(1, rest) if replaced and len(turn) > 1 and list(prompt[:kept]) == list(ids[:kept]) else None


class Renderer:
    def __init__(
        self,
        template: ChatTemplate,
        tools: Sequence[Tool],
        stop_token_ids: Sequence[int],
        calls: str = "auto",
        history: Literal["append", "rerender"] = "append",
    ) -> None:
        """`calls`: how the policy writes tool calls; `history`: as in the environment's configuration."""
        self.template, self.tools, self.history = template, tuple(tools), history
        self._schemas = [tool.schema() for tool in tools]
        self._calls = calls
        self._stops = {stop: template.tokenizer.decode([stop]) for stop in sorted(stop_token_ids)}
        # Games repeat the same few observations.
        self._after = lru_cache(maxsize=1024)(self._ids_after)
        self._length = lru_cache(maxsize=1024)(self._token_count)

    def whole(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt of a turn after these messages. Raises RenderingError."""
        if any(message.role == "system" for message in messages):
            self._check("system")
        return self.template.token_ids([self._text(messages)])[0]

    def bridge(self, token_ids: Sequence[int], messages: Sequence[Message]) -> Bridge:
        """Return the bridge from a turn's sampled tokens, through the environment's whole answer, to the next turn.

        It closes a truncated turn. Raises RenderingError.
        """
        for role in {"tool" if message.role == "tool" else "user" for message in messages}:
            self._check(role)
        end, *after = self._after(tuple((m.role, m.content, m.name, m.call_id) for m in messages))
        last = token_ids[-1] if len(token_ids) else None
        if last == end:
            return Bridge(0, after)
        # A stop token other than that with which the template ends a turn, or begins the next role, is replaced. (Not
        # if the turn has no other token: each must have something to train on.)
        return Bridge(int(last in self._stops and len(token_ids) > 1), [end, *after])

    def behind(self, ids: Sequence[int], turn: Sequence[int], prompt: Sequence[int]) -> Bridge | None:
        """Return how a rendered conversation continues `ids`, which end with the sampled `turn`, or None."""
        return continuation(ids, turn, prompt, self._stops if turn[-1] in self._stops else ())

    def spoken(self, token_ids: Sequence[int]) -> Message:
        """Return a turn as others read it; if its calls cannot be parsed, it is plain text."""
        text, calls = self.parse(token_ids)
        if any(call.error for call in calls):
            text, calls = str(self.template.tokenizer.decode(token_ids, skip_special_tokens=True)), ()
        return Message("assistant", text, calls=calls)

    def parse(self, token_ids: Sequence[int]) -> tuple[str, tuple[ToolCall, ...]]:
        """Return a turn's text without calls and special tokens, and its calls. Calls inside thinking do not count."""
        ids = [int(token) for token in token_ids]
        tokenizer = self.template.tokenizer
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if self.reader is None:
            return text, ()
        raw = str(tokenizer.decode(ids[:-1] if ids and ids[-1] in self._stops else ids, skip_special_tokens=False))
        thinking, mark, answer = raw.rpartition("</think>")
        if not mark and raw.lstrip().startswith("<think>"):
            return text, ()
        rest, calls = self.reader.read(answer)
        if not calls:
            return text, ()
        for special in self.template.specials:
            rest = rest.replace(special, "")
        ids_of_calls = {call.id for call in calls}
        if "" in ids_of_calls or len(ids_of_calls) < len(calls):
            calls = tuple(replace(call, id=_call_id(i)) for i, call in enumerate(calls))
        return thinking + mark + rest, calls

    def shortened(self, message: Message, limit: int) -> Message:
        """Return the message with at most `limit` tokens of content: the middle of a longer one is cut out."""
        content, most = message.content, 8 * limit  # characters: a program may print megabytes
        if len(content) <= 2 * most and self._length(content) <= limit:
            return message
        head, tail = (self.template.token_ids([self.template.guarded(t)])[0] for t in (content[:most], content[-most:]))
        notes = (f"\n[... {len(content)} characters, cut here ...]\n", "[...]", "")
        note = next(note for note in notes if self._length(note) <= limit // 2)
        keep = limit - self._length(note)
        while True:
            sides = head[: keep - keep // 2], tail[len(tail) - keep // 2 :]
            first, last = (str(self.template.tokenizer.decode(side)).strip("\ufffd") for side in sides)
            short = first + note + last
            excess = self._length(short) - limit
            if excess <= 0:
                return replace(message, content=short)
            keep = max(keep - excess, 0)

    def problems(self) -> list[str]:
        """Return why episodes cannot be played with this template, with the remedy."""
        problems = [self._message(role) for role in (["tool"] if self.tools else ["user"]) if role in self.breaks]
        if self.tools and not problems and self.reader is None:
            written = self._written_call
            how = f"writes tool calls as {written!r}, which no known format reads" if written else "writes no calls"
            names = ", ".join(NAMES)
            problems.append(
                f"the chat template {how}: name their format with environment.calls ({names}, or vllm:NAME)"
            )
        return problems

    def cautions(self) -> list[str]:
        """Return what the environment must not do with this template; an episode that does it ends the run."""
        roles = [role for role in self.breaks if role != ("tool" if self.tools else "user")]
        cautions = [self._message(role) for role in roles]
        if self.tools and self.tools[0].name not in self._text([_ASKS]):
            cautions.append("the chat template does not tell the policy which tools there are; the environment must")
        return cautions

    def _check(self, role: str) -> None:
        if role in self.breaks:
            raise RenderingError(self._message(role))

    def _message(self, role: str) -> str:
        where = {"system": "with a system message", "tool": "after a tool's answer"}.get(role, "after a user's answer")
        anew = self.history == "append" and role != "system" and self._unreadable(role) is None
        return f"the chat template cannot continue {where}: {self.breaks[role]}; {REMEDY}{RERENDER if anew else ''}"

    @cached_property
    def breaks(self) -> dict[str, str]:
        """By role, why a conversation cannot continue: after its tokens (`history=append`), or at all."""
        if self.history == "rerender":
            roles = ["tool", "user"] if self.tools else ["user"]
            return {role: why for role in roles if (why := self._unreadable(role)) is not None}
        tries: dict[str, list[tuple[tuple[str, ...], dict[str, bool]]]] = {
            role: [((role,), {}), ((role,), {"thinks": True}), ((role, role), {})]
            for role in (["tool", "user"] if self.tools else ["user"])
        }
        breaks: dict[str, str] = {}
        for role, conversations in tries.items():
            if role == "user" and "tool" in tries and "tool" not in breaks:
                conversations.append((("tool", "user"), {}))
            whys = (self._why(roles, **how) for roles, how in conversations)
            if why := next(filter(None, whys), None):
                breaks[role] = why
        sound = [role for role in tries if role not in breaks]
        if sound and (why := self._why((sound[0],), system=True)):
            breaks["system"] = why
        return breaks

    def _why(self, roles: Sequence[str], thinks: bool = False, system: bool = False) -> str | None:
        """Return what goes wrong in a conversation in which these roles answer the policy: how the template's rendering
        differs from what the bridges produce. None if nothing does."""
        chat = [*([Message("system", "Be brief.")] if system else []), _ASKS]
        try:
            appended = self._text(chat)
            for number, role in enumerate(roles):
                said = [Message(role, f"reply {number}", *self._names(0, role))]
                chat += [self._called(said) if role == "tool" else Message("assistant", _ANSWER), *said]
                if thinks:
                    chat[-2] = replace(chat[-2], content=_THINKING + _ANSWER)
                whole, bridge = self._text(chat), self._text_after(said)
                if not whole.startswith(appended):
                    return _difference(appended, whole)
                rest = whole[len(appended) :]
                answer = rest.removesuffix(bridge)
                if not bridge or answer == rest:
                    return _difference(bridge, rest[-len(bridge) :])
                if said[0].content not in bridge:
                    return f"it leaves out what a {role} says"
                # Some templates write only the call, without the text before it.
                if thinks and _ANSWER in answer and "why" not in answer:
                    return "it drops the thinking of earlier turns"
                if not thinks and role != "tool" and answer.strip() != _ANSWER:
                    return _difference(_ANSWER, answer)
                appended = whole
        except RenderingError as error:
            return str(error)
        return None

    def _unreadable(self, role: str) -> str | None:
        """Return why the policy cannot read this role's answer; None if it can."""
        said = [Message(role, "reply 0", *self._names(0, role))]
        answer = self._called(said) if role == "tool" else Message("assistant", _ANSWER)
        try:
            read = said[0].content in self._text([_ASKS, answer, *said])
            return None if read else f"it leaves out what a {role} says"
        except RenderingError as error:
            return str(error)

    @cached_property
    def reader(self) -> CallFormat | None:
        """The reader of calls; None: there are no tools, or the template writes calls in an unknown format."""
        if not self.tools:
            return None
        tokenizer = self.template.tokenizer
        if self._calls != "auto":
            return call_format(self._calls, self.tools, tokenizer)
        names = [*NAMES, *(name for mark, name in OF_VLLM.items() if mark in self._written_call)]
        (call,) = self._example.calls
        for name in names:
            known = call_format(name, self.tools, tokenizer)
            _, calls = known.read(self._written_call)
            if [(c.name, c.arguments, c.error) for c in calls] == [(call.name, call.arguments, "")]:
                return known
        return None

    @cached_property
    def _written_call(self) -> str:
        """How the template writes a call; empty if it does not write any."""
        said = [Message("tool", "1", *self._names(0, "tool"))]
        try:
            rest = self._rest(self._example, said)
        except RenderingError:
            return ""
        return rest[: self._end(rest)].strip()

    @property
    def _example(self) -> Message:
        tool = self.tools[0]
        properties: Mapping[str, Any] = tool.parameters.get("properties", {})
        needed = tool.parameters.get("required", ())
        arguments = {name: _EXAMPLES.get(properties[name].get("type"), "a") for name in needed if name in properties}
        return Message("assistant", "", calls=(ToolCall(tool.name, arguments, _call_id(0)),))

    def _names(self, number: int, role: str) -> tuple[str, tuple[ToolCall, ...], str]:
        """Return (name, calls, call_id) of a message."""
        return (self.tools[0].name, (), _call_id(number)) if role == "tool" and self.tools else ("", (), "")

    def _called(self, results: Sequence[Message]) -> Message:
        guarded = self.template.guarded  # the policy may invent names, an agent's client ids
        calls = (ToolCall(guarded(message.name), {}, guarded(message.call_id)) for message in results)
        return Message("assistant", "", calls=tuple(calls))

    def _ids_after(self, said: _Said) -> tuple[int, ...]:
        """Return the token that ends a turn, and what follows up to the next turn."""
        messages = [
            Message(role, self.template.guarded(content), name=name, call_id=id) for role, content, name, id in said
        ]
        text = self._text_after(messages)
        ids = self.template.token_ids([text])[0]
        if ids[0] not in self._stops:
            raise RenderingError(f"the tokenizer does not read the end of a turn as a token: {text[:20]!r}")
        return tuple(ids)

    def _text_after(self, messages: Sequence[Message]) -> str:
        """Return what the template writes from the end of a turn on. Raises RenderingError."""
        results = [
            replace(
                message,
                name=message.name or self._names(0, "tool")[0] or "tool",
                call_id=message.call_id or _call_id(i),
            )
            if message.role == "tool"
            else message
            for i, message in enumerate(messages)
        ]
        called = self._called([message for message in results if message.role == "tool"])
        # Some templates write only one call at a time, but accept answers to several; others do not support calls.
        answers = [Message("assistant", _ANSWER)]
        if called.calls:
            answers = [called, replace(called, calls=called.calls[:1]), *answers]
        for answer in answers:
            try:
                rest = self._rest(answer, results)
                return rest[self._end(rest) :]
            except RenderingError as error:
                refused = error
        raise refused

    def _rest(self, answer: Message, messages: Sequence[Message]) -> str:
        """Return what the template writes from the answer to a question on."""
        asked = self._asked
        whole = self._text([_ASKS, answer, *messages])
        if not whole.startswith(asked):
            raise RenderingError(_difference(asked, whole))
        return whole[len(asked) :]

    def _end(self, rest: str) -> int:
        places = [place for stop in self._stops.values() if (place := rest.find(stop)) >= 0]
        if not places:
            stops = ", ".join(map(repr, self._stops.values()))
            raise RenderingError(f"it does not end a turn with {stops}, as the policy does, but writes {rest[:60]!r}")
        return min(places)

    @cached_property
    def _asked(self) -> str:
        return self._text([_ASKS])

    def _text(self, messages: Sequence[Message]) -> str:
        (text,) = self.template.texts([messages], ask=True, tools=self._schemas)
        if isinstance(text, BadRow):
            raise RenderingError(text.reason)
        return text

    def _token_count(self, text: str) -> int:
        return len(self.template.token_ids([self.template.guarded(text)])[0])


_EXAMPLES: Mapping[str | None, Any] = {
    "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "string": "a"
}  # fmt: skip


def _call_id(number: int) -> str:
    return f"call{number:05d}"  # nine letters and digits: Mistral's templates refuse others


def _difference(before: str, after: str) -> str:
    start = next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)
    start = min(len(before), len(after)) if start is None else start
    begin = max(0, start - 20)
    return f"{before[begin : start + 30]!r} becomes {after[begin : start + 30]!r} once the conversation continues"
