"""Finds prompts and recorded responses that are too long before anything heavy is loaded: with only the chat template
and tokenizer.json, without transformers, among the longest texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.data.base import DataError, Problem
from rlkit.models.usable import default_template

if TYPE_CHECKING:
    from jinja2 import Template

MOST_TEXTS = 256
"""Most texts that are tokenised, unless more than this many may be skipped."""
MOST_CHARACTERS = 2**20
LARGEST_TOKENIZER = 24 * 2**20
"""Most bytes of a tokenizer.json that takes less than a second to read."""


def too_long_prompts(
    problems: Sequence[Problem],
    folder: Path,
    chat_template: str | Path | None,
    limit: int,
    allowed: int,
    arguments: Mapping[str, Any] | None = None,
) -> list[tuple[int, str]]:
    """Return (tokens, origin) of prompts of more than `limit` tokens, longest texts first; if there are more than
    `allowed`, enough of them to prove it.

    `chat_template`: path of a Jinja file; `arguments`: its further variables. Empty where nothing can be counted here
    (`uncountable`). Raises DataError if tokenizer.json cannot be read, and OSError or ValueError for other files.
    """
    template = _template(folder, chat_template)
    if template is None:
        return []
    most = max(MOST_TEXTS, allowed + 1)
    by_text = sorted(problems, key=lambda problem: -sum(len(message.content) for message in problem.question))
    variables = {**_special_tokens(folder), **(arguments or {})}
    return _too_long(_rendered(by_text[:most], template, variables), folder, limit, allowed)


def too_long_responses(problems: Sequence[Problem], folder: Path, limit: int, allowed: int) -> list[tuple[int, str]]:
    """Return (tokens, origin) of the longest recorded response of each row, as in `too_long_prompts`. Tokens that the
    template adds are not counted.

    Raises DataError if tokenizer.json cannot be read.
    """
    longest: dict[str, str] = {}
    for problem in problems:
        for response in problem.responses:
            text, origin = "\n".join(m.content for m in response.messages), response.origin or problem.origin
            longest[origin] = max(text, longest.get(origin, ""), key=len)
    texts = sorted(((text, origin) for origin, text in longest.items()), key=lambda item: -len(item[0]))
    return _too_long(texts[: max(MOST_TEXTS, allowed + 1)], folder, limit, allowed)


def _too_long(texts: Iterable[tuple[str, str]], folder: Path, limit: int, allowed: int) -> list[tuple[int, str]]:
    if uncountable(folder):
        return []
    count: Callable[[str], int] | None = None
    proven: list[tuple[int, str]] = []
    characters = 0
    for text, origin in texts:
        characters += len(text)
        if len(text.encode(errors="replace")) <= limit or characters > MOST_CHARACTERS:  # a token has at least one byte
            break
        count = count or _counter(folder)
        tokens = count(text)
        if tokens > limit:
            proven.append((tokens, origin))
            if len(proven) > allowed:
                break
    return proven


def uncountable(folder: Path) -> str:
    """Return why tokens cannot be counted here; empty if they can."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return "without a tokenizer.json"
    return "tokenizer.json is large" if file.stat().st_size > LARGEST_TOKENIZER else ""


def _template(folder: Path, named: str | Path | None) -> str | None:
    if named is None:
        return default_template(folder)
    file = Path(named).expanduser()
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config


def _special_tokens(folder: Path) -> dict[str, str]:
    tokens = {name: value for name, value in _tokenizer_config(folder).items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _rendered(problems: Sequence[Problem], template: str, variables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (text, origin) as transformers renders it, without conversations that the template refuses."""
    from jinja2 import TemplateError

    try:
        compiled = _compiled(template)
    except TemplateError:  # reported at the start, or by the check of a user's template
        return
    for problem in problems:
        messages = [{"role": message.role, "content": message.content} for message in problem.question]
        try:
            text = compiled.render({**variables, "messages": messages, "add_generation_prompt": True})
        except TemplateError:
            continue
        yield text, problem.origin


@lru_cache(maxsize=8)  # one for all splits
def _compiled(template: str) -> Template:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))


def _counter(folder: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises it by this name
        raise DataError(f"{file} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
