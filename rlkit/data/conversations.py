"""Recorded responses as token ids: as the sampler would have returned them, ended as the chat template ends them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlkit.data.base import BadRow, DataError, Problem, Response
from rlkit.data.rendering import Asked, ChatTemplate, ask, chunks
from rlkit.data.stored import stored
from rlkit.experience import GroupScores, Message, Prompt, Recorded, Sample, Score, Span

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

_REMEDY = "name another template with model.chat_template"


def responses_of(problem: Problem) -> tuple[Response, ...]:
    """Return the problem's responses or, if it has none, its reference answers."""
    return problem.responses or tuple(
        Response((Message("assistant", reference),), origin=f"{problem.origin} reference {i + 1}")
        for i, reference in enumerate(problem.references)
    )


def render_recorded(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Collection[int],
    max_prompt_tokens: int,
    max_response_tokens: int,
    chat_template: str | Path | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[Sequence[Prompt], list[BadRow]]:
    """Return prompts with `recorded` responses, and the rows that cannot be used.

    `stop_token_ids` end a sampled response. Raises DataError for a template whose answers end with none of them, and
    where `render` does.
    """
    template = ChatTemplate(tokenizer, chat_template, template_arguments)
    bad: list[BadRow] = []

    def prompts() -> Iterator[Prompt]:
        ending: Ending | None = None
        for some in chunks(problems):
            asked, unusable = ask(some, template, max_prompt_tokens)
            bad.extend(unusable)
            if not asked:
                continue
            ending = ending or Ending.of(template, stop_token_ids, asked[0])
            for item, drafts in _drafts(asked, template, ending):
                recorded, unusable = _recorded(item.problem, drafts, max_response_tokens)
                bad.extend(unusable)
                if recorded is not None:
                    yield replace(item.prompt, recorded=recorded)

    return stored(prompts()), bad


@dataclass(frozen=True)
class Ending:
    """How a template ends an answer: with one of `stops`, followed by `tail`, which a sampler never returns."""

    stops: tuple[str, ...]
    tail: str
    space: bool
    """Whether the tokenizer adds a space before a text, so that the template's space is left out."""

    @classmethod
    def of(cls, template: ChatTemplate, stop_token_ids: Collection[int], asked: Asked) -> Ending:
        """Find it out with a short answer to a prompt of the data. Raises DataError."""
        stops = tuple(template.tokenizer.decode([stop]) for stop in sorted(stop_token_ids))
        names = ", ".join(repr(stop) for stop in stops)
        (text,) = template.texts([[*asked.prompt.messages, Message("assistant", "2")]], ask=False)
        if isinstance(text, BadRow):
            raise DataError(f"{text.reason} ({asked.problem.origin}, answered by '2'): {_REMEDY}.")
        if not text.startswith(asked.text):
            raise DataError(
                "the chat template renders an answer differently from how it asks for one "
                f"(...{asked.text[-40:]!r} is not how an answered conversation begins): {_REMEDY}, or other "
                "model.chat_template_arguments."
            )
        answer = text[len(asked.text) :]
        place = _first_stop(answer, stops)
        if place is None:
            raise DataError(
                f"the chat template does not end an answer: after it comes {answer.partition('2')[2]!r}, but a "
                f"response ends with {names}. Add that to the template ({_REMEDY}), or add the token that ends its "
                "answers to eos_token_id in the model's generation_config.json."
            )
        end = place[0] + len(place[1])
        before, inside, alone, bare = template.token_ids(
            [asked.text, asked.text + answer[:end], answer[:end], answer[1:end]]
        )
        continued = inside[len(before) :] if inside[: len(before)] == before else alone
        return cls(stops, answer[end:], answer.startswith(" ") and alone != continued == bare)

    def cut(self, answer: str) -> tuple[str, str] | BadRow:
        """Return (answer, the token that ends it). An answer that already has an end token does not get another."""
        place = _first_stop(answer, self.stops)
        if place is None:
            return BadRow("", "the chat template does not end this answer", f"Correct it, or {_REMEDY}")
        start, stop = place
        rest = answer[start + len(stop) :]
        doubled = next((s for s in self.stops if rest == s + self.tail), None)
        if rest != self.tail and doubled is None:
            return BadRow("", f"{stop!r} is in the middle of an answer, which it would end")
        return answer[self.space and answer.startswith(" ") : start], doubled or stop


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    places = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(places)[0], min(places)[2]) if places else None


class _Piece(NamedTuple):
    text: str
    trained: bool


class _Draft(NamedTuple):
    response: Response
    origin: str
    token_ids: list[int]
    text: str
    mask: np.ndarray | None
    spans: tuple[Span, ...]


def _drafts(
    asked: Sequence[Asked], template: ChatTemplate, ending: Ending
) -> Iterator[tuple[Asked, list[_Draft | BadRow]]]:
    """Yield per prompt a draft of each response, or why it cannot be used."""
    responses = [responses_of(item.problem) for item in asked]
    texts = _Texts(template, asked, responses)
    split = [
        [_pieces(item.text, response, texts.take(response), ending) for response in own]
        for item, own in zip(asked, responses, strict=True)
    ]
    wanted = (piece.text for own in split for pieces in own if not isinstance(pieces, BadRow) for piece in pieces)
    token_ids = iter(template.token_ids(list(wanted)))
    for item, own, parts in zip(asked, responses, split, strict=True):
        drafts: list[_Draft | BadRow] = []
        for response, pieces in zip(own, parts, strict=True):
            origin = response.origin or item.problem.origin
            if isinstance(pieces, BadRow):
                drafts.append(replace(pieces, origin=origin))
            else:
                ids = [next(token_ids) for _ in pieces]
                drafts.append(_draft(response, origin, pieces, ids, ending, template))
        yield item, drafts


class _Texts:
    """The conversations that the template must render for each response, all rendered at once."""

    def __init__(self, template: ChatTemplate, asked: Sequence[Asked], responses: Sequence[Sequence[Response]]) -> None:
        asks: list[tuple[Message, ...]] = []
        answered: list[tuple[Message, ...]] = []
        for item, own in zip(asked, responses, strict=True):
            for response in own:
                for turn in _trained(response):
                    if turn:
                        asks.append(item.prompt.messages + response.messages[:turn])
                    answered.append(item.prompt.messages + response.messages[: turn + 1])
        self._asks = iter(template.texts(asks, ask=True))
        self._answered = iter(template.texts(answered, ask=False))

    def take(self, response: Response) -> list[tuple[str | BadRow | None, str | BadRow]]:
        """Return per trained turn the conversation that asks for it (None: the prompt) and the answered one."""
        return [(next(self._asks) if turn else None, next(self._answered)) for turn in _trained(response)]


def _trained(response: Response) -> list[int]:
    masks = response.trained or [message.role == "assistant" for message in response.messages]
    return [i for i, trained in enumerate(masks) if trained]


def _pieces(
    prompt: str, response: Response, turns: list[tuple[str | BadRow | None, str | BadRow]], ending: Ending
) -> list[_Piece] | BadRow:
    """Return the assistant's turns, and the text between them, as texts whose token ids follow the prompt's."""
    pieces: list[_Piece] = []
    position, whole = len(prompt), turns[-1][1]
    for asks, answered in turns:
        start = prompt if asks is None else asks
        for text in (start, answered, whole):
            if isinstance(text, BadRow):
                return text
        assert isinstance(start, str) and isinstance(answered, str) and isinstance(whole, str)
        if not answered.startswith(start):
            return BadRow(
                "", "the chat template renders this answer differently from how it asks for it", _REMEDY.capitalize()
            )
        if not whole.startswith(answered):
            return BadRow(
                "",
                "the chat template renders an earlier answer differently once the conversation continues",
                f"Train only on the last answers (data.train_on=last), or {_REMEDY}",
            )
        answer = ending.cut(answered[len(start) :])
        if isinstance(answer, BadRow):
            return answer
        if len(start) > position:
            pieces.append(_Piece(whole[position : len(start)], False))
        pieces.append(_Piece("".join(answer), True))
        position = len(answered) - len(ending.tail)
    return pieces


def _draft(
    response: Response,
    origin: str,
    pieces: list[_Piece],
    token_ids: list[list[int]],
    ending: Ending,
    template: ChatTemplate,
) -> _Draft:
    if len(pieces) == 1:
        text = next(pieces[0].text.removesuffix(stop) for stop in ending.stops if pieces[0].text.endswith(stop))
        return _Draft(response, origin, token_ids[0], text, None, ())
    lengths = [len(ids) for ids in token_ids]
    ends = np.cumsum(lengths).tolist()
    mask = np.repeat([piece.trained for piece in pieces], lengths)
    turns = zip(pieces, ends, lengths, strict=True)
    spans = tuple(Span(end - length, end, "turn") for piece, end, length in turns if piece.trained)
    together = [token for ids in token_ids for token in ids]
    text = template.tokenizer.decode(together, skip_special_tokens=True)
    return _Draft(response, origin, together, text, mask, spans)


def _recorded(
    problem: Problem, drafts: Sequence[_Draft | BadRow], max_tokens: int
) -> tuple[Recorded | None, list[BadRow]]:
    """Combine the drafts. A row is used whole or not at all; of reference answers, the usable ones are enough."""
    if not drafts:
        return None, [BadRow(problem.origin, "it has no response")]
    unusable: dict[str, BadRow] = {}
    for draft in drafts:
        if isinstance(draft, BadRow):
            unusable.setdefault(draft.origin, draft)
        elif len(draft.token_ids) > max_tokens:
            tokens = len(draft.token_ids)
            reason = f"a response has {tokens} tokens, more than rollout.max_response_tokens={max_tokens}"
            unusable.setdefault(draft.origin, BadRow(draft.origin, reason, "Raise rollout.max_response_tokens", tokens))
    for pair in problem.pairs:
        one, other = drafts[pair.winner], drafts[pair.loser]
        if isinstance(one, _Draft) and isinstance(other, _Draft) and one.token_ids == other.token_ids:
            unusable[one.origin] = BadRow(one.origin, "chosen and rejected are equal once they are rendered")
    kept = {i: d for i, d in enumerate(drafts) if isinstance(d, _Draft) and d.origin not in unusable}
    rows = list(unusable.values())
    if not problem.responses:
        rows = [] if kept else [replace(rows[0], origin=problem.origin)]
    if not kept:
        return None, rows
    index = {old: new for new, old in enumerate(kept)}
    pairs = tuple(
        replace(pair, winner=index[pair.winner], loser=index[pair.loser])
        for pair in problem.pairs
        if pair.winner in index and pair.loser in index
    )
    samples = tuple(_sample(index[i], draft) for i, draft in kept.items())
    scores = tuple(Score(draft.response.value) for draft in kept.values())
    return Recorded(samples, GroupScores(scores, pairs)), rows


def _sample(index: int, draft: _Draft) -> Sample:
    return Sample(
        index=index,
        token_ids=np.array(draft.token_ids, dtype=np.int32),
        logprobs=None,
        text=draft.text,
        finish_reason="stop",
        policy_versions=(0, 0),
        seed=0,
        mask=draft.mask,
        spans=draft.spans,
        weight=draft.response.weight,
    )
