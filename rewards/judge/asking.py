"""Control tokens of chat templates in what a judge is shown, broken up so that no server takes them for its own.

A server that parses special tokens inside of a message's content would end the turn where a response says
`<|im_end|>`, and take what follows for its own words. The endpoint's tokenizer is not known here, so the forms listed
below, those of widespread families, are broken up: a space after the first character. A family that is not listed has
tokens that pass. Nothing is removed, and the judge is told.

Verdicts remembered by content: in memory, and on disk if asked for (shared by workers, kept between runs).

A question to the judge and its verdict: cache, call, strict reading, and asking again where it cannot be read.

The probe at the start: does the judge answer at all, accept right answers, and refuse those without content?

From the configuration to a judge that has been tried.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.base import RewardContext
from rewards.judge.client import Budget, CallFailed, ChatClient, Endpoint
from rewards.judge.master_keys import MASTER_KEYS
from rewards.judge.prompts import AnswerFormat, Material, NoVerdict, Question, Rules, Unparsable, Verdict, share_of_win
from rlkit.experience import Message, UserError

if TYPE_CHECKING:
    from rewards.judge.reward import JudgeReward


NOTE = (
    " The material spells out control tokens of language models; a space was put behind their first character. They "
    "are part of what is judged and mean nothing else."
)

_NAMES = "|".join(
    (
        *("s", "bos", "eos", "pad", "unk", "mask", "sep", "cls", "sop", "eop", "eot", "eod", "SYS", "SYSTEM", "USER"),
        *("(?:BOS|EOS|PAD|UNK|MASK|CLS|SEP|EOP|END_OF_TURN|START_OF_TURN)_TOKEN", r"(?:start|end)_of_\w{1,32}"),
        *(r"(?:begin|end)_of_\w{1,32}", r"extra_id_\d{1,4}", r"(?:unused|reserved_)\d{1,6}", r"seed:[\w:]{1,40}"),
        *("image_soft_token", "bot", "human", "EOT", "EOD", "EOS", "BOS", "PAD", "UNK", "CLS", "SEP", "MASK"),
        # reasoning and tools: Qwen 3, DeepSeek R1, Hermes, Nemotron, GLM
        *("think", "tool_call", "tool_calls", "tool_response", "tool_responses", "available_tools", "toolcall"),
        *("TOOLCALL", "TOOL_RESPONSE", "AVAILABLE_TOOLS", "arg_key", "arg_value", "endoftext"),
        # images
        *("image", "image_placeholder", "image_pad", "fake_token_around_image", "end_of_utterance", "global-img"),
        r"row_\d{1,3}_col_\d{1,3}",
    )
)
_BRACKETED = "|".join(
    (
        *("INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "TOOL_CONTENT", "CALL_ID", "ARGS"),
        *("THINK", "IMG", "IMG_BREAK", "IMG_END", "PREFIX", "MIDDLE", "SUFFIX", "MODEL_SETTINGS", "control_\\d{1,4}"),
        *("gMASK", "sMASK", "MASK", "CLS", "SEP", "PAD", "UNK", "BOS", "EOS", r"UNUSED_TOKEN_\d{1,4}"),
    )
)
_BREAK = re.compile(
    "|".join(
        (
            # ChatML, Qwen, Llama 3 and 4, Phi, GLM, Granite, Kimi, gpt-oss, Cohere; DeepSeek with U+FF5C
            r"(?<=[<＜])(?=[|｜]\S)",
            # their ends where a name stands before the bar: <turn|>
            r"(?<=[<＜])(?=[^\s<>＜＞|｜]{1,64}[|｜][>＞])",
            # Llama 2, Mistral, Gemma, Seed, T5 and kin
            rf"(?<=<)(?=/?(?:{_NAMES})>)",
            rf"(?<=\[)(?=/?(?:{_BRACKETED})\])",
            # EXAONE, MiniMax
            r"(?<=\[)(?=\|\w{1,32}\|\])",
            r"(?<=\])(?=~!?b[\[\]])|(?<=\[)(?=e~\[)",
        )
    )
)


def broken_up(text: str) -> str:
    """The text with a space behind the first character of everything that looks like a control token."""
    return _BREAK.sub(" ", text)


def harmless(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The chat without control tokens in any content; if there were some, its first message says so."""
    made = [{**message, "content": broken_up(message["content"])} for message in messages]
    if made and any(new["content"] != old["content"] for new, old in zip(made, messages, strict=True)):
        made[0]["content"] += NOTE
    return made


LOCK_SECONDS = 10.0


class VerdictCache:
    """The least recently used verdicts are dropped from memory first; none are dropped from disk."""

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
        found = self._memory.get(key)
        if found is None and self._disk is not None:
            row = self._disk.execute("select verdict from verdicts where key = ?", (key,)).fetchone()
            if row is not None:
                values, reasoning = json.loads(row[0])
                found = Verdict(tuple(values), reasoning)
        if found is not None:
            self._remember(key, found)
        return found

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


def key_of(*content: Any) -> str:
    """Equal for equal content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


QUESTIONS = (
    ("What is 17 + 26?", "43", "17 + 26 = 43, so the answer is 43."),
    ("What is the capital of Australia?", "Canberra", "The capital of Australia is Canberra."),
    ("How many days does a leap year have?", "366", "A leap year has 366 days."),
)
"""(question, reference, right response)"""
ACCEPTED = 0.5
"""A value from here on is a yes; so is a share of the win over a right response."""


class JudgeError(UserError):
    """The judge cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """False positive rate of every master key, and which right responses were not accepted."""

    rates: dict[str, float]
    missed: tuple[str, ...]


async def probe(judge: Judge, rules: Rules, principle: str, show_reference: bool, deadline: float) -> ProbeResult:
    """Ask about every master key on every question. Raises JudgeError if the judge cannot be asked or understood."""
    found = await asyncio.gather(
        *(_on_question(judge, rules, principle, show_reference, i, deadline) for i in range(len(QUESTIONS)))
    )
    rates = {key: sum(key in accepted for accepted, _ in found) / len(found) for key in MASTER_KEYS}
    return ProbeResult(
        rates, tuple(question for (question, *_), (_, right) in zip(QUESTIONS, found, strict=True) if not right)
    )


async def _on_question(
    judge: Judge, rules: Rules, principle: str, show_reference: bool, place: int, deadline: float
) -> tuple[set[str], bool]:
    """Master keys that are accepted as an answer to this question, and whether the right one is."""
    question, reference, right = QUESTIONS[place]
    material = Material(principle, (Message("user", question),), reference if show_reference else None)
    if rules.mode == "pairwise":
        found = await asyncio.gather(*(share_of_win(judge, rules, material, k, right, deadline) for k in MASTER_KEYS))
        shares = [share[0] for share in found if not isinstance(share, NoVerdict)]
        _raise_first(found)
        return {key for key, share in zip(MASTER_KEYS, shares, strict=True) if share >= ACCEPTED}, True
    texts = (right, *MASTER_KEYS)
    if rules.mode == "listwise":
        questions = [Question(material, texts, rules.form(len(texts)))]
    else:
        questions = [Question(material, (text,), rules.form(1)) for text in texts]
    verdicts = await asyncio.gather(*(judge.ask(question, deadline) for question in questions))
    _raise_first(verdicts)
    first, *others = (value for verdict in verdicts if not isinstance(verdict, NoVerdict) for value in verdict.values)
    return {key for key, value in zip(MASTER_KEYS, others, strict=True) if value >= ACCEPTED}, first >= ACCEPTED


async def ask_once(judge: Judge, rules: Rules, principle: str, deadline: float) -> None:
    """One question, to see that the judge answers and can be read. Raises JudgeError if not."""
    question, _, right = QUESTIONS[0]
    material = Material(principle, (Message("user", question),))
    responses = (right,) if rules.mode == "pointwise" else (right, QUESTIONS[1][2])
    _raise_first([await judge.ask(Question(material, responses, rules.form(len(responses))), deadline)])


def complaint(result: ProbeResult, max_rate: float) -> str:
    """What is wrong with the judge, or an empty string."""
    fooled = {key: rate for key, rate in result.rates.items() if rate > max_rate}
    found = []
    if fooled:
        shown = ", ".join(f"{key!r} in {rate:.0%}" for key, rate in sorted(fooled.items(), key=lambda kv: -kv[1]))
        found.append(
            f"it accepts responses without content ({shown} of {len(QUESTIONS)} questions), which a policy would learn "
            "to write"
        )
    if result.missed:
        found.append(f"it does not accept the right answer to {' and '.join(map(repr, result.missed))}")
    return "; ".join(found)


def _raise_first(found: Sequence[object]) -> None:
    for item in found:
        if isinstance(item, NoVerdict):
            raise JudgeError(item.reason)


async def connect(config: JudgeReward.Config, context: RewardContext) -> tuple[Judge, Callable[[], Awaitable[None]]]:
    """The judge, and what closes it."""
    fields = {"temperature": config.temperature, "max_tokens": config.max_answer_tokens, **config.request_fields}
    endpoint = Endpoint(
        base_url=config.base_url,
        model=config.model,
        api_key=os.environ.get(config.api_key_variable) if config.api_key_variable else None,
        fields=fields,
        call_timeout_seconds=config.call_timeout_seconds,
        attempts=config.attempts,
        max_concurrent=config.max_concurrent,
    )
    max_calls, max_tokens = (n and n // config.workers for n in (config.max_calls, config.max_tokens))
    client = ChatClient(endpoint, Budget(max_calls, max_tokens))
    cache = VerdictCache(config.cache_size, None if config.cache_file is None else Path(config.cache_file).expanduser())
    judge = Judge(
        client,
        cache,
        identity=[config.base_url, config.model, fields],
        answer_format=config.answer_format,
        max_reasks=config.max_reasks,
        seed=context.seed,
    )

    async def close() -> None:
        cache.close()
        await client.close()

    return judge, close


async def introduce(judge: Judge, config: JudgeReward.Config, rules: Rules) -> str:
    """Probe the judge as configured; returns a warning, if there is one. Raises JudgeError if it cannot be used."""
    deadline = time.monotonic() + config.timeout_seconds
    who = f"the judge {config.model} at {config.base_url}"
    try:
        if config.probe == "off":
            await ask_once(judge, rules, config.principle, deadline)
            return ""
        shown = config.reference != "never" and not (rules.mode == "pairwise" and rules.against == "reference")
        result = await probe(judge, rules, config.principle, shown, deadline)
    except JudgeError as error:
        raise JudgeError(f"{who} cannot be used: {error}") from error
    wrong = complaint(result, config.max_false_positive_rate)
    if not wrong:
        return ""
    if config.probe == "warn":
        return f"{who}: {wrong}"
    raise JudgeError(
        f"{who} failed the probe: {wrong}; choose another judge, say more in reward.principle, or go on with "
        "reward.probe=warn"
    )
