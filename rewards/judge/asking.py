"""A question to the judge and its verdict: cache, call, strict reading, and asking again where it cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rewards.judge.cache import VerdictCache, key_of
from rewards.judge.client import CallFailed, ChatClient
from rewards.judge.control_tokens import harmless
from rewards.judge.questions import Question
from rewards.judge.verdicts import AnswerFormat, NoVerdict, Unparsable, Verdict

SHOWN_CHARACTERS = 200


class Judge:
    """Used from one event loop. Equal questions are asked once."""

    def __init__(
        self,
        client: ChatClient,
        cache: VerdictCache,
        *,
        identity: Any,
        answer_format: AnswerFormat,
        max_reasks: int,
        seed: int,
    ) -> None:
        """`identity`: what makes verdicts of this judge differ from another's (model, sampling), for the cache."""
        self.client, self._cache, self._identity = client, cache, identity
        self._format, self._max_reasks, self._seed = answer_format, max_reasks, seed
        self._open: dict[str, asyncio.Task[Verdict | NoVerdict]] = {}

    async def ask(self, question: Question, deadline: float) -> Verdict | NoVerdict:
        """The verdict; `deadline` is on `time.monotonic`."""
        messages = question.messages(self._format, self._seed)
        key = key_of(self._identity, self._format, harmless(messages))
        found = self._cache.get(key)
        if found is not None:
            return found
        if key not in self._open:
            self._open[key] = asyncio.create_task(self._ask(key, messages, question, deadline))
        try:
            return await self._open[key]
        finally:
            self._open.pop(key, None)

    async def _ask(
        self, key: str, messages: list[dict[str, str]], question: Question, deadline: float
    ) -> Verdict | NoVerdict:
        wrong, answer = "", ""
        for _ in range(self._max_reasks + 1):
            chat = messages if not wrong else [*messages, *self._correction(answer, wrong, question)]
            try:
                answer = await self.client.answer(harmless(chat), self._form(question), deadline)
                verdict = question.form.read(answer, self._format)
            except CallFailed as error:
                return NoVerdict(str(error))
            except Unparsable as error:
                wrong = str(error)
                continue
            self._cache.put(key, verdict)
            return verdict
        return NoVerdict(f"unparsable: {wrong}; asked {self._max_reasks + 1} times; {answer[:SHOWN_CHARACTERS]!r}")

    def _correction(self, answer: str, wrong: str, question: Question) -> list[dict[str, str]]:
        again = f"This cannot be read: {wrong}. Answer again. {question.form.instruction(self._format)}"
        return [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]

    def _form(self, question: Question) -> Mapping[str, Any]:
        if self._format == "json_object":
            return {"response_format": {"type": "json_object"}}
        if self._format == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": question.form.schema()}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        return {}
