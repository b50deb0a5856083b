"""Asks the judge: cache, call, strict parsing, retry after an unreadable answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections import OrderedDict
from pathlib import Path

from rewards.judge.question import NoVerdict, Question, Verdict
from rewards.services.answers import Unparsable
from rewards.services.chat import CallFailed, ChatClient
from rewards.services.control_tokens import without_control_tokens

LOCK_SECONDS = 10.0
"""Seconds that a worker waits for another worker's write."""


class VerdictCache:
    """LRU cache in memory; with `file`, also on disk: shared between workers, reused by later runs, never evicted."""

    def __init__(self, size: int, file: Path | None) -> None:
        self._size = size
        self._memory: OrderedDict[str, Verdict] = OrderedDict()
        self._disk: sqlite3.Connection | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._disk = sqlite3.connect(file, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
            self._disk.execute("pragma journal_mode=wal")
            self._disk.execute("create table if not exists verdicts (key text primary key, verdict text not null)")

    def get(self, key: str) -> Verdict | None:
        verdict = self._memory.get(key)
        if verdict is None and self._disk is not None:
            row = self._disk.execute("select verdict from verdicts where key = ?", (key,)).fetchone()
            if row is not None:
                values, reasoning = json.loads(row[0])
                verdict = Verdict(tuple(values), reasoning)
        if verdict is not None:
            self._remember(key, verdict)
        return verdict

    def put(self, key: str, verdict: Verdict) -> None:
        self._remember(key, verdict)
        if self._disk is not None:
            text = json.dumps([verdict.values, verdict.reasoning])
            self._disk.execute("insert or replace into verdicts values (?, ?)", (key, text))

    def close(self) -> None:
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _remember(self, key: str, verdict: Verdict) -> None:
        self._memory[key] = verdict
        self._memory.move_to_end(key)
        if len(self._memory) > self._size:
            self._memory.popitem(last=False)


SHOWN_CHARACTERS = 200


class Judge:
    """Used from one event loop; equal questions are asked once."""

    def __init__(self, client: ChatClient, cache: VerdictCache, max_reasks: int) -> None:
        self._client, self._cache, self._max_reasks = client, cache, max_reasks
        endpoint = client.endpoint
        self._identity = [endpoint.base_url, endpoint.model, endpoint.fields]
        self._open: dict[str, asyncio.Task[Verdict | NoVerdict]] = {}

    async def ask(self, question: Question, deadline: float) -> Verdict | NoVerdict:
        """Return the judge's verdict, or why there is none. `deadline` is on `time.monotonic`."""
        content = [self._identity, question.kind, without_control_tokens(question.messages)]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        verdict = self._cache.get(key)
        if verdict is not None:
            return verdict
        if key not in self._open:
            self._open[key] = asyncio.create_task(self._ask(key, question, deadline))
        try:
            return await self._open[key]
        finally:
            self._open.pop(key, None)

    async def close(self) -> None:
        self._cache.close()
        await self._client.close()

    async def _ask(self, key: str, question: Question, deadline: float) -> Verdict | NoVerdict:
        chat, wrong, answer = question.messages, "", ""
        for _ in range(self._max_reasks + 1):
            try:
                answer = await self._client.answer(without_control_tokens(chat), question.fields, deadline)
                verdict = question.read(answer)
            except CallFailed as error:
                return NoVerdict(str(error))
            except Unparsable as error:
                wrong = str(error)
                again = f"This cannot be read: {wrong}. Answer again. {question.instruction}"
                said = [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
                chat = [*question.messages, *said]
                continue
            self._cache.put(key, verdict)
            return verdict
        return NoVerdict(f"unparsable: {wrong}; asked {self._max_reasks + 1} times; {answer[:SHOWN_CHARACTERS]!r}")
