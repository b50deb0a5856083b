"""The tool `search`: BM25 over a file, or a retrieval server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import httpx
from pydantic import Field, model_validator

from rewards.services.http import HttpClient, HttpError, Limits, TransientError, excerpt, get, json_body
from rlkit.environments.base import EnvironmentFailure
from rlkit.environments.tool import tool
from rlkit.environments.tools.base import STEP_SHARE, LocalPath, Session, ToolOptions
from rlkit.environments.tools.bm25 import BM25
from rlkit.experience import UserError

_CONCURRENT = 32


@dataclass(frozen=True)
class _Corpus:
    texts: Sequence[str]
    index: BM25


class SearchSession(Session):
    @tool
    async def search(self, query: str) -> str:
        """Search documents for words and read the best ones.

        query: words to look for
        """
        count = self.options.documents
        if isinstance(self.shared, _Corpus):
            texts = [self.shared.texts[number] for number, _ in self.shared.index.best(query, count)]
        else:
            texts = await self._asked(query, count)
        return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1)) or "nothing was found"

    async def _asked(self, query: str, count: int) -> list[str]:
        # Search-R1's server reads a list of queries; others with the same protocol read a single one.
        body = json_body({"query": query, "queries": [query], "topk": count, "return_scores": True})
        try:
            texts = await self.shared.post(body, time.monotonic() + STEP_SHARE * self.seconds, _documents)
        except HttpError as error:
            raise EnvironmentFailure(f"search: {error}") from error
        return list(texts)[:count]


class Search(ToolOptions):
    kind: Literal["search"] = "search"
    session: ClassVar[type[Session]] = SearchSession
    corpus: LocalPath | None = None
    """File with one JSON object per line, searched with BM25."""
    text_column: str = "text"
    """Column of the corpus that is searched and read."""
    title_column: str | None = None
    """Column of the corpus with a title, which is searched and read as well."""
    url: str | None = None
    """Instead of a corpus: the address of a retrieval server with Search-R1's protocol, e.g.
    http://127.0.0.1:8000/retrieve."""
    documents: int = Field(default=3, ge=1)
    """Maximum number of documents that a search returns."""

    @model_validator(mode="after")
    def _corpus_or_server(self) -> Self:
        if (self.corpus is None) == (self.url is None):
            raise ValueError("needs corpus, a JSONL file, or url, the address of a retriever (not both)")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://, not {self.url!r}")
        if self.url is not None and (self.text_column, self.title_column) != ("text", None):
            raise ValueError("text_column and title_column are for a corpus; a retriever's documents have `contents`")
        return self

    def repeats(self) -> bool:
        """Whether there is a corpus: a server is not known to repeat its answers."""
        return self.corpus is not None

    def check(self, seconds: float) -> list[str]:
        if self.corpus is None:
            return []
        try:
            next(_texts(self.corpus, self.text_column, self.title_column))
        except StopIteration:
            return [f"search: {self.corpus} is empty"]
        except UserError as error:
            return [f"search: {error}"]
        return []

    def prepare(self) -> _Corpus | HttpClient:
        """Load the corpus or find the server. Raises UserError."""
        if self.corpus is not None:
            texts = list(_texts(self.corpus, self.text_column, self.title_column))
            return _Corpus(texts, BM25(texts))
        assert self.url is not None
        try:
            get(self.url, 10.0)
        except TransientError as error:
            raise UserError(f"search: no retriever answers there: {error}") from error
        return HttpClient([self.url], Limits(concurrent=_CONCURRENT))


def _texts(corpus: Path, text_column: str, title_column: str | None) -> Iterator[str]:
    """Yield the texts of the corpus. Raises UserError with file and line."""
    columns = [text_column] if title_column is None else [title_column, text_column]
    try:
        with corpus.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield "\n".join(_column(line, column, f"{corpus}, line {number}") for column in columns)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{corpus} cannot be read: {error}") from error


def _column(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not a JSON object")
    if not isinstance(row.get(column), str):
        raise UserError(f"{where} has no text in {column!r}; it has {', '.join(sorted(row))}")
    text: str = row[column]
    return text


def _documents(answer: httpx.Response) -> list[str]:
    """Return the texts of `{"result": [[{"document": {"contents": ...}, "score": ...}, ...]]}`, also without the list
    over queries, without scores, or with `text` (and `title`) instead of `contents`."""
    try:
        result: Any = answer.json()["result"]
        if result and isinstance(result[0], list):
            result = result[0]
        return [_document(one.get("document", one)) for one in result]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"does not answer like a retriever ({type(error).__name__}: {error}): {excerpt(answer)}"
        raise TransientError(str(answer.url), problem) from error


def _document(document: Any) -> str:
    if isinstance(document, str):
        return document
    if "contents" in document:
        return str(document["contents"])
    return "\n".join(str(document[name]) for name in ("title", "text") if name in document or name == "text")
