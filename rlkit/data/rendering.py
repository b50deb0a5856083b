"""From problems to prompts: the chat template, applied and tokenised exactly once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit.data.base import BadRow, DataError, Problem
from rlkit.experience import Message, Prompt

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

_PROBE = "Tom  has 3 apples,\n and 12.5% of £7?"


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Raises DataError if none loads.

    Warns where transformers replaces the saved tokenizer by a class that splits text differently.
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
                f"{path}: transformers chose {type(tokenizer).__name__} for this model_type; it splits text otherwise "
                "than the saved tokenizer.json; if the model was trained with the latter, change its model_type.",
                stacklevel=2,
            )
    return tokenizer


def render(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    chat_template: str | Path | None = None,
) -> tuple[list[Prompt], list[BadRow]]:
    """Prompts with the sampler's token ids, and the problems that cannot be rendered.

    `chat_template`: path of a Jinja file. Bad rows: prompts longer than `max_prompt_tokens`, or refused by the
    template. Raises DataError without a template, or for two BOS tokens.
    """
    template = _read_template(chat_template, tokenizer)
    prompts: list[Prompt] = []
    bad: list[BadRow] = []
    rendered = _token_ids(problems, tokenizer, template)
    shared: dict[
        int, int
    ] = {}  # one object per token of the vocabulary, not per token of the data: a quarter of the memory
    longest = max((len(ids) for ids in rendered if not isinstance(ids, str)), default=0)
    for problem, ids in zip(problems, rendered, strict=True):
        if isinstance(ids, str):
            bad.append(BadRow(problem.origin, ids))
        elif len(ids) > max_prompt_tokens:
            reason = f"the prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens={max_prompt_tokens}"
            bad.append(BadRow(problem.origin, reason, f"Raise rollout.max_prompt_tokens (the longest has {longest})"))
        else:
            prompts.append(
                Prompt(
                    id=problem.id,
                    messages=problem.messages,
                    token_ids=tuple(shared.setdefault(token, token) for token in ids),
                    references=problem.references,
                    answer=problem.answer,
                    columns=problem.columns,
                )
            )
    bos = tokenizer.bos_token_id
    if bos is not None and any(prompt.token_ids[:2] == (bos, bos) for prompt in prompts):
        raise DataError(
            f"the chat template begins with the BOS token {tokenizer.bos_token!r} twice: remove one "
            "(model.chat_template names a template file to use in its place)."
        )
    return prompts, bad


def renderer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | Path | None = None
) -> Callable[[Sequence[Message]], tuple[int, ...]]:
    """Renders one prompt that is no problem of the data. It raises DataError where the template refuses it."""
    template = _read_template(chat_template, tokenizer)

    def rendered(messages: Sequence[Message]) -> tuple[int, ...]:
        (ids,) = _token_ids([Problem("", tuple(messages))], tokenizer, template)
        if isinstance(ids, str):
            raise DataError(ids)
        return tuple(ids)

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


def _token_ids(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> list[list[int] | str]:
    """Per problem its token ids, or why the template refuses it."""
    from jinja2 import TemplateError, TemplateSyntaxError

    if not problems:
        return []
    chats = [[{"role": m.role, "content": m.content} for m in problem.messages] for problem in problems]

    def tokenise(conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        encoded = tokenizer.apply_chat_template(
            conversations, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return [list(ids) for ids in encoded["input_ids"]]

    try:
        return list(tokenise(chats))
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from error
    except TemplateError:
        results: list[list[int] | str] = []  # some conversation was refused: find out which
        for chat in chats:
            try:
                results += tokenise([chat])
            except TemplateError as error:
                results.append(f"the chat template refuses this conversation: {error}")
        return results
