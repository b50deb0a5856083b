"""From problems to prompts: the chat template is applied and tokenised exactly once."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlkit.data.base import BadRow, DataError, Problem
from rlkit.data.stored import stored
from rlkit.experience import Message, Prompt

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

CHUNK = 512
_PROBE = "Tom  has 3 apples,\n and 12.5% of £7?"
_CUT = "\ufdd0"
"""Marks token boundaries in a rendered text. A noncharacter, which Unicode reserves for internal use."""


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. Raises DataError if that fails.

    Warns if transformers replaces the saved tokenizer by a class that splits text differently.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"model.path={path}: its tokenizer cannot be loaded ({reason})") from error
    saved = Path(path) / "tokenizer.json"
    if saved.is_file():
        from tokenizers import Tokenizer

        expected = Tokenizer.from_file(str(saved)).encode(_PROBE, add_special_tokens=False).ids
        if tokenizer.encode(_PROBE, add_special_tokens=False) != expected:
            warnings.warn(
                f"{path}: transformers chose {type(tokenizer).__name__} for this model_type, which splits text "
                "differently from the saved tokenizer.json; if the model was trained with the latter, change its "
                "model_type.",
                stacklevel=2,
            )
    return tokenizer


class ChatTemplate:
    """A model's chat template, or that of a Jinja file. Raises DataError if there is none.

    Only the assistant's messages can contain special tokens. In those of others their text is tokenised as plain text,
    so that it cannot forge a role or an end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str | Path | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`arguments`: variables in addition to those that every template has."""
        self.tokenizer, self.arguments = tokenizer, arguments or {}
        self.shared: dict[int, int] = {}
        """One int object per token of the vocabulary, not per token of the data: a quarter of the memory."""
        self._text = _read_template(path, tokenizer)
        self._arguments_as_text = False

    def texts(
        self, chats: Sequence[Sequence[Message]], *, ask: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[str | BadRow]:
        """Render conversations as texts; where the template refuses one, give the reason (a row without an origin).

        `ask`: end where the assistant answers; `tools`: schemas. Raises DataError if the template is not valid Jinja.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        schemas = self._guarded(list(tools)) or None

        def text(conversations: Sequence[Sequence[Message]]) -> list[str | BadRow]:
            messages = [[self._fields(message) for message in chat] for chat in conversations]
            rendered: list[str | BadRow] = self.tokenizer.apply_chat_template(
                messages,
                tools=schemas,
                chat_template=self._text,
                add_generation_prompt=ask,
                tokenize=False,
                **self.arguments,
            )
            return rendered

        if not chats:
            return []
        try:
            return text(chats)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from error
        except TypeError:
            if self._arguments_as_text or not any(message.calls for chat in chats for message in chat):
                raise
            self._arguments_as_text = True  # some templates take the arguments of calls as JSON texts
            return self.texts(chats, ask=ask, tools=tools)
        except TemplateError:
            texts: list[str | BadRow] = []  # a conversation was refused: find out which
            for chat in chats:
                try:
                    texts += text([chat])
                except TemplateError as error:
                    texts.append(BadRow("", f"the chat template refuses this conversation: {error}"))
            return texts

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of pieces of rendered text, each tokenised separately."""
        if not texts:
            return []
        pieces = [text.split(_CUT) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        encoded = self.tokenizer(flat, add_special_tokens=False, return_attention_mask=False)
        token_ids: list[list[int]] = encoded["input_ids"]
        if len(flat) == len(texts):
            return token_ids
        rest = iter(token_ids)
        return [[token for _ in of_text for token in next(rest)] for of_text in pieces]

    def guarded(self, text: str) -> str:
        """Insert a cut into every special token, or token that frames messages, which the text spells out."""
        while (cut := self._frame.sub(lambda match: match[0][0] + _CUT + match[0][1:], text)) != text:
            text = cut
        return text

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.guarded(value)
        if isinstance(value, Mapping):
            return {key: self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list | tuple) else value

    def _fields(self, message: Message) -> dict[str, Any]:
        """Return the message in the form in which transformers passes it to templates."""
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            fields["name"] = message.name
        if message.call_id:
            fields["tool_call_id"] = message.call_id
        if message.role != "assistant":
            fields = self._guarded(fields)
        if message.calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)
                        if self._arguments_as_text
                        else dict(call.arguments),
                    },
                }
                for call in message.calls
            ]
        return fields

    @cached_property
    def specials(self) -> frozenset[str]:
        """The texts of special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return frozenset({*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)})

    @cached_property
    def _frame(self) -> re.Pattern[str]:
        # In some models the tokens that begin a message are not marked as special.
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        names = self.specials | {name for name in added if name in self._between_messages}
        longest_first = sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _between_messages(self) -> str:
        """Return the text that the template adds to a conversation; empty if it refuses the test conversation."""
        from jinja2 import TemplateError

        chat = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user", "assistant", "user")]
        try:
            text = self.tokenizer.apply_chat_template(chat, chat_template=self._text, tokenize=False, **self.arguments)
        except TemplateError:
            return ""
        return str(text).replace(_PROBE, _CUT)


class Asked(NamedTuple):
    problem: Problem
    prompt: Prompt
    text: str
    """The prompt as the template renders it."""


def ask(problems: Sequence[Problem], template: ChatTemplate, max_tokens: int) -> tuple[list[Asked], list[BadRow]]:
    """Return prompts with the sampler's token ids, and the problems that cannot be rendered.

    Bad rows: prompts longer than `max_tokens`, or refused by the template. Raises DataError for two BOS tokens.
    """
    asked: list[Asked] = []
    bad: list[BadRow] = []
    texts = template.texts([problem.question for problem in problems], ask=True)
    rendered = iter(template.token_ids([text for text in texts if isinstance(text, str)]))
    for problem, text in zip(problems, texts, strict=True):
        if isinstance(text, BadRow):
            bad.append(replace(text, origin=problem.origin))
            continue
        ids = next(rendered)
        if len(ids) > max_tokens:
            reason = f"the prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens={max_tokens}"
            bad.append(BadRow(problem.origin, reason, "Raise rollout.max_prompt_tokens", len(ids)))
            continue
        prompt = Prompt(
            id=problem.id,
            messages=problem.messages,
            token_ids=tuple(template.shared.setdefault(token, token) for token in ids),
            references=problem.references,
            answer=problem.answer,
            columns=problem.columns,
        )
        asked.append(Asked(problem, prompt, text))
    bos = template.tokenizer.bos_token_id
    if bos is not None and any(prompt.token_ids[:2] == (bos, bos) for _, prompt, _ in asked):
        raise DataError(
            f"the chat template begins with the BOS token {template.tokenizer.bos_token!r} twice: remove one "
            "(model.chat_template names a template file to use instead)."
        )
    return asked, bad


def render(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    chat_template: str | Path | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[Sequence[Prompt], list[BadRow]]:
    """Return prompts and the problems that cannot be rendered, as `ask` does; `chat_template`: path of a Jinja file.

    Raises DataError without a template, or for two BOS tokens.
    """
    template = ChatTemplate(tokenizer, chat_template, template_arguments)
    bad: list[BadRow] = []

    def prompts() -> Iterator[Prompt]:
        for some in chunks(problems):
            asked, unusable = ask(some, template, max_prompt_tokens)
            bad.extend(unusable)
            yield from (item.prompt for item in asked)

    return stored(prompts()), bad


def chunks(problems: Sequence[Problem]) -> Iterator[Sequence[Problem]]:
    """Yield the chunks that are rendered and tokenised together."""
    return (problems[start : start + CHUNK] for start in range(0, len(problems), CHUNK))


def renderer(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | Path | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Callable[[Sequence[Message] | str], tuple[int, ...]]:
    """Return a function that renders one prompt that is not in the data, or a plain text.

    It raises DataError if the template refuses a prompt.
    """
    template = ChatTemplate(tokenizer, chat_template, template_arguments)

    def rendered(messages: Sequence[Message] | str) -> tuple[int, ...]:
        if isinstance(messages, str):
            return tuple(template.token_ids([messages])[0])
        (text,) = template.texts([messages], ask=True)
        if isinstance(text, BadRow):
            raise DataError(text.reason)
        return tuple(template.token_ids([text])[0])

    return rendered


def _read_template(path: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if path is None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: name a Jinja file "
                "with model.chat_template=<path>."
            )
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template={path} cannot be read: {error}") from error
