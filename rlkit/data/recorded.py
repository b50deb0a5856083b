"""Problems with recorded responses: preference pairs, responses with labels or scores, conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from rlkit.data.base import BadRow, DataConfig, DataError, Problem, Response
from rlkit.data.cells import Chat, Row, RowError, cell, chat, label, number, prompt_of, text, turns
from rlkit.data.files import DataSetConfig, HfSource
from rlkit.data.rows import Parts
from rlkit.experience import Message, PreferencePair

PROMPTS = ("prompt", "question")
TEXTS = ("response", "completion", "solution")
LISTS = ("responses", "completions")
LABELS = ("label", "is_correct", "labels", "correctness")
SCORES = ("score", "reward", "scores", "rewards")
CHATS = ("messages", "conversations", "conversation")


class RecordedConfig(DataSetConfig):
    """JSON Lines, JSON, CSV or Parquet files, or anything that `datasets` loads, named by `path`."""

    prompt_column: str | None = None
    """The prompt: a text or a list of chat messages. null: `prompt` or `question`. In a row without it, the responses
    are whole conversations."""
    weight_column: str | None = None
    """A row's weight in the loss (a number, 0 or more); null: 1."""

    numbers: ClassVar[tuple[str, ...]] = ("weight_column",)
    """Keys that name columns with numbers."""
    usual: ClassVar[tuple[str, ...]] = PROMPTS
    """Names of columns that need no key."""

    def named_columns(self) -> dict[str, str]:
        named = {key: column for key, column in self if key.endswith("_column") and isinstance(column, str)}
        return named | super().named_columns()

    def text_columns(self) -> frozenset[str]:
        columns = frozenset((*self.usual, *self.named_columns().values()))
        return columns - {*LABELS, *SCORES, *(getattr(self, key) for key in self.numbers)}

    def used_columns(self) -> frozenset[str]:
        return frozenset((*self.usual, *self.named_columns().values()))


class RecordedSource(HfSource):
    """A source whose problems have responses."""

    def provides(self) -> frozenset[str]:
        return super().provides() | {"responses"}


class PairsConfig(RecordedConfig):
    numbers: ClassVar[tuple[str, ...]] = ("weight_column", "probability_column", "margin_column")

    chosen_column: str = "chosen"
    """The preferred response: a text, a message or a list of messages. It is a whole conversation if the row has no
    prompt or if the list begins with a role other than the assistant's."""
    rejected_column: str = "rejected"
    """The other response; a whole conversation must begin like the chosen one."""
    probability_column: str | None = None
    """The probability that chosen is preferred (0 to 1: a soft label); null: 1."""
    margin_column: str | None = None
    """By how much chosen is better (a number); null: unknown."""


class PairsSource(RecordedSource):
    """`data=pairs data.path=pairs.jsonl`: rows with prompt, chosen (value 1) and rejected (value 0)."""

    Config: ClassVar[type[DataConfig]] = PairsConfig

    def provides(self) -> frozenset[str]:
        return super().provides() | {"pairs", "labels"}

    def _read(self, row: Row, origin: str) -> Parts:
        config: PairsConfig = self.config
        prompt = _prompt(row, config)
        chosen = _conversation(prompt, cell(row, config.chosen_column), config.chosen_column)
        rejected = _conversation(prompt, cell(row, config.rejected_column), config.rejected_column)
        for column, messages in ((config.chosen_column, chosen), (config.rejected_column, rejected)):
            if not messages[-1].content.strip():
                raise RowError(f"{column} is empty")
        if chosen == rejected:
            raise RowError(f"{config.chosen_column} and {config.rejected_column} are equal")
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        if shared is None:
            raise RowError(f"one of {config.chosen_column} and {config.rejected_column} is the beginning of the other")
        if shared == 0 or {chosen[shared].role, rejected[shared].role} != {"assistant"}:
            raise RowError(
                f"the prompts of {config.chosen_column} and {config.rejected_column} differ (message {shared + 1})"
            )
        probability = _number(row, config.probability_column, 1.0)
        margin = None if config.margin_column is None else number(row, config.margin_column)
        if not 0 <= probability <= 1:
            raise RowError(f"{config.probability_column} is {probability:g}, not between 0 and 1")
        responses = (Response(chosen[shared:], 1.0, origin=origin), Response(rejected[shared:], 0.0, origin=origin))
        pair = PreferencePair(0, 1, probability, margin, _weight(row, config))
        return Parts(chosen[:shared], responses, (pair,))


class ResponsesConfig(RecordedConfig):
    usual: ClassVar[tuple[str, ...]] = (*PROMPTS, *TEXTS, *LISTS, *LABELS, *SCORES)

    response_column: str | None = None
    """The response (a text or chat messages) or a list of responses; null: `response`, `completion`, `solution`,
    `responses` or `completions`. In rows without such a column: the key of the response in columns that are objects,
    one per response."""
    label_column: str | None = None
    """The response's label (true, false or a number from 0 to 1), or a list of labels; in objects, the label's key.
    null: `label`, `is_correct`, `labels` or `correctness`, if rows have it."""
    score_column: str | None = None
    """A score (any number) instead of a label. null: `score`, `reward`, `scores` or `rewards`, if rows have it and no
    label."""

    @model_validator(mode="after")
    def _label_or_score(self) -> ResponsesConfig:
        if self.label_column is not None and self.score_column is not None:
            raise ValueError("label_column and score_column exclude each other: set one of them")
        return self

    def named_columns(self) -> dict[str, str]:
        named = super().named_columns()  # rows may have these inside objects
        return {k: v for k, v in named.items() if k not in ("response_column", "label_column", "score_column")}

    def text_columns(self) -> frozenset[str]:
        return super().text_columns() | ({self.response_column} if self.response_column else frozenset())

    def used_columns(self) -> frozenset[str]:
        own = (self.response_column, self.label_column, self.score_column)
        return super().used_columns() | {column for column in own if column}


class ResponsesSource(RecordedSource):
    """`data=responses data.path=responses.jsonl`: responses with labels or scores; rows with the same prompt form one
    problem."""

    Config: ClassVar[type[DataConfig]] = ResponsesConfig
    gather: ClassVar[bool] = True

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self._names: tuple[str, str | None, bool] | None = None

    def provides(self) -> frozenset[str]:
        try:
            labels = {"labels"} if self._layout()[1] is not None else set()
        except (DataError, RowError):
            labels = set()  # check() reports why
        return super().provides() | labels

    def _layout(self) -> tuple[str, str | None, bool]:
        """Return the names of responses and labels, and whether they are in objects, judging by the first rows.

        Raises RowError if no row has a response, or DataError.
        """
        if self._names is None:
            config: ResponsesConfig = self.config
            rows = [row for _, row in self._head("train") if isinstance(row, Mapping)]
            inside = not any(_response_name(row, config) for row in rows)
            if inside:
                rows = [value for row in rows for value in row.values() if isinstance(value, Mapping)]
            response = next((name for row in rows if (name := _response_name(row, config))), None)
            if response is None:
                columns = ", ".join(self._columns("train") or ())
                raise RowError(f"no column with a response (it has {columns}); name it with data.response_column")
            named = config.label_column or config.score_column
            usual = next((name for name in (*LABELS, *SCORES) if any(row.get(name) is not None for row in rows)), None)
            self._names = (response, named or usual, inside)
        return self._names

    def _read(self, row: Row, origin: str) -> Parts:
        config: ResponsesConfig = self.config
        response, label_name, inside = self._layout()
        prompt, weight = _prompt(row, config), _weight(row, config)
        prompts: list[Chat] = []
        responses = []
        for value, judged, where in labelled(row, response, label_name, inside):
            conversation = _conversation(prompt, value, where)
            start = len(prompt) if prompt and conversation[: len(prompt)] == prompt else len(conversation) - 1
            prompts.append(conversation[:start])
            responses.append(Response(conversation[start:], _value(judged, label_name, config), weight, origin=origin))
        if len(set(prompts)) > 1:
            raise RowError("its responses have different prompts")
        return Parts(prompts[0], tuple(responses))


def labelled(row: Row, response: str, name: str | None, inside: bool) -> Iterator[tuple[Any, Any, str]]:
    """Yield (response, label, where) of a row: a single one, lists of responses and labels, or (`inside`) columns that
    are objects with both. Raises RowError."""
    if inside:
        objects = {column: v for column, v in row.items() if isinstance(v, Mapping) and v.get(response) is not None}
        if not objects:
            raise RowError(f"no column is an object with {response!r}")
        for column, value in objects.items():
            try:
                yield value[response], cell(value, name) if name else None, f"{column}.{response}"
            except RowError as error:
                raise RowError(f"in {column}: {error}") from error
        return
    value = cell(row, response)
    labels: Any = cell(row, name) if name else None
    if not _is_list_of_responses(value):
        yield value, labels, response
        return
    if not value:
        raise RowError(f"{response} is an empty list")
    if name and not (isinstance(labels, Sequence) and len(labels) == len(value)):
        raise RowError(f"{response} and {name} must be lists of equal length")
    for i, item in enumerate(value):
        yield item, labels[i] if name else None, f"{response}[{i}]"


class ChatConfig(RecordedConfig):
    usual: ClassVar[tuple[str, ...]] = (*PROMPTS, *TEXTS, *CHATS, "system")

    messages_column: str | None = None
    """The conversation: a list of `{"role": ..., "content": ...}` or of ShareGPT's `{"from": ..., "value": ...}`. null:
    `messages`, `conversations` or `conversation`; without these, the row has a prompt and a response."""
    response_column: str | None = None
    """The response in a row with a prompt. null: `response`, `completion` or `solution`."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's messages are in the loss. If a message has its own key `train` (true or false) or
    `weight` (1 or 0), these keys decide for its conversation."""


class ChatSource(RecordedSource):
    """`data=chat data.path=chats.jsonl`: conversations to imitate."""

    Config: ClassVar[type[DataConfig]] = ChatConfig

    def _read(self, row: Row, origin: str) -> Parts:
        config: ChatConfig = self.config
        if row.get("tools"):
            raise RowError("it has tools, which are not rendered: remove such rows, or the column")
        messages, own = self._messages(row)
        trained = self._trained(messages, own)
        if not any(trained):
            raise RowError("no message of the assistant is trained on")
        first, end = trained.index(True), len(trained) - trained[::-1].index(True)
        if first == 0:
            raise RowError("it begins with a message of the assistant: there is nothing to answer")
        if messages[first - 1].role == "assistant":
            raise RowError(f"messages {first} and {first + 1} are both the assistant's")
        empty = next((i for i, ours in enumerate(trained) if ours and not messages[i].content.strip()), None)
        if empty is not None:
            raise RowError(f"message {empty + 1} is an empty answer (its key train=false leaves it out of the loss)")
        if messages[-1].role != "assistant":
            self.note(f"conversations end with a message of the {messages[-1].role}, which is left out", origin)
        if any(message.role == "system" for message in messages[1:end]):
            self.note("conversations have a system message after the beginning, which is rendered in place", origin)
        answer = Response(messages[first:end], 1.0, _weight(row, config), tuple(trained[first:end]), origin)
        return Parts(messages[:first], (answer,))

    def _messages(self, row: Row) -> tuple[Chat, Sequence[bool | None]]:
        """Return the messages and the mask that each one sets itself."""
        config: ChatConfig = self.config
        name = config.messages_column or _first(row, CHATS)
        if name is not None:
            value = cell(row, name)
            messages = chat(value, name)
            own = [_own_mask(item, f"{name}[{i}]") for i, item in enumerate(value)]
            if messages[0].role != "system" and row.get("system"):
                return (Message("system", text(cell(row, "system"), "system")), *messages), [None, *own]
            return messages, own
        response = config.response_column or _first(row, TEXTS)
        if response is None:
            has = ", ".join(column for column, value in row.items() if value is not None) or "none"
            forms = f"none of {', '.join(CHATS)}, or a prompt with one of {', '.join(TEXTS)}"
            raise RowError(f"{forms} (it has {has})", "Name the conversation with data.messages_column")
        messages = _conversation(_prompt(row, config), cell(row, response), response)
        return messages, [None] * len(messages)

    def _trained(self, messages: Chat, own: Sequence[bool | None]) -> list[bool]:
        assistant = [message.role == "assistant" for message in messages]
        if any(mask is not None for mask in own):
            return [bool(mask) and ours for mask, ours in zip(own, assistant, strict=True)]
        if self.config.train_on == "last":
            last = max((i for i, ours in enumerate(assistant) if ours), default=-1)
            return [i == last for i in range(len(messages))]
        return assistant


def _own_mask(item: Mapping[str, Any], what: str) -> bool | None:
    if item.get("tool_calls"):
        raise RowError(f"{what} has tool calls, which are not rendered: write them into its content")
    for key in ("train", "weight"):
        value = item.get(key)
        if value is not None:
            if value not in (0, 1):
                raise RowError(f"{what}.{key} must be 0, 1, true or false, not {value!r}")
            return bool(value)
    return None


def _prompt(row: Row, config: RecordedConfig) -> Chat:
    """Return the row's prompt; empty if it has none."""
    name = config.prompt_column or _first(row, PROMPTS)
    return () if name is None else prompt_of(row, name)


def _conversation(prompt: Chat, value: Any, what: str) -> Chat:
    """Return the prompt followed by a response, which may repeat the prompt."""
    messages = turns(value, what)
    if messages[0].role == "assistant":
        if not prompt:
            raise RowError(f"{what} has no prompt before it, and the row has none (data.prompt_column names it)")
        return prompt + messages
    asked = prompt[1:] if prompt and prompt[0].role == "system" and messages[0].role != "system" else prompt
    start = 1 if messages[0].role == "system" and asked and asked[0].role != "system" else 0
    if messages[start : start + len(asked)] != asked:
        raise RowError(f"{what} is a conversation that does not begin with the prompt")
    return prompt[: len(prompt) - len(asked)] + messages


def _first(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _response_name(row: Row, config: ResponsesConfig) -> str | None:
    if config.response_column is not None:
        return config.response_column if row.get(config.response_column) is not None else None
    return _first(row, (*TEXTS, *LISTS))


def _is_list_of_responses(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not (value and isinstance(value[0], Mapping))


def _value(judged: Any, name: str | None, config: ResponsesConfig) -> float:
    if name is None:
        return 1.0
    if config.score_column is not None or (config.label_column is None and name in SCORES):
        return number({name: judged}, name)
    return label(judged, name)


def _number(row: Row, column: str | None, default: float) -> float:
    return default if column is None else number(row, column)


def _weight(row: Row, config: RecordedConfig) -> float:
    weight = _number(row, config.weight_column, 1.0)
    if weight < 0:
        raise RowError(f"{config.weight_column} is {weight:g}, less than 0")
    return weight


def split_off_the_scale(problems: Sequence[Problem]) -> tuple[list[Problem], list[BadRow]]:
    """Return the problems whose responses have labels from 0 (bad) to 1 (good), and the rows of the others."""
    good: list[Problem] = []
    bad: list[BadRow] = []
    for problem in problems:
        wrong = {r.origin or problem.origin: r.value for r in problem.responses if not 0 <= r.value <= 1}
        if not wrong:
            good.append(problem)
        bad += [
            BadRow(origin, f"its score {value:g} is not a label, 0 (bad) to 1 (good)")
            for origin, value in wrong.items()
        ]
    return good, bad
