"""POLAR's input: `prompt⊕reference <|reward|> prompt⊕candidate [UNUSED_TOKEN_130]`, plain text, no chat template.

It equals the official client's (arXiv 2507.05197, InternLM/POLAR) byte for byte, except for four bugs there: here,
markers in prompts and responses are removed; a prompt that has no room is dropped; responses are always truncated on
the right; whether an empty response keeps its line break is an option.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

from rlkit.experience import Group, GroupScores, Message, Score, UserError
from rlkit.experience.texts import encodable

if TYPE_CHECKING:
    from rlkit.models.packing import Tree

SEPARATOR = "<|reward|>"
MARKER = "[UNUSED_TOKEN_130]"
"""The last token, at which the score is read."""
RESERVED_TOKENS = 4
"""Room for two markers and two line breaks."""

Wrapper = Literal["sft", "pretrain"]
UnclosedThinking = Literal["empty", "keep"]


class Tokenizer(Protocol):
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...


class SerialisationError(UserError, ValueError): ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in tokens, including a BOS token if the tokenizer adds one."""

    max_length: int = 16384
    """For the whole input."""
    max_response_length: int = 4096
    """For reference and candidate each, truncated on the right. The prompt gets the rest, truncated on the left."""


class Serialiser:
    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        wrapper: Wrapper = "sft",
        newline_before_empty: bool = True,
    ) -> None:
        """Raise SerialisationError unless both markers are single tokens."""
        self._tokenizer = tokenizer
        self._limits = limits
        self._wrapper = wrapper
        self._newline_before_empty = newline_before_empty
        self.separator_id = self._single_token(SEPARATOR)
        self.marker_id = self._single_token(MARKER)
        self._encode_part = lru_cache(maxsize=4096)(self._encode_part_uncached)

    def text(self, prompt: str, reference: str, candidate: str, beside: Sequence[str] = ()) -> str:
        """Return the input's text. Tokenise it as a whole: merges across the joints matter.

        `beside`: the other candidates of a training comparison, so that all see the same part of the prompt.
        """
        prompt_ids, reference_ids, candidate_ids = (self._encode_part(part) for part in (prompt, reference, candidate))
        longest = self._limits.max_response_length
        reference_ids, candidate_ids = reference_ids[:longest], candidate_ids[:longest]
        widest = max([len(candidate_ids), *(min(longest, len(self._encode_part(text))) for text in beside)])
        budget = max(0, (self._limits.max_length - RESERVED_TOKENS - len(reference_ids) - widest) // 2)
        prompt_ids = prompt_ids[len(prompt_ids) - min(budget, len(prompt_ids)) :]
        shared = self._decode_part(prompt_ids)
        return (
            self._join(shared, self._decode_part(reference_ids))
            + SEPARATOR
            + self._join(shared, self._decode_part(candidate_ids))
            + MARKER
        )

    def token_ids(self, text: str) -> list[int]:
        """Tokenise; raise SerialisationError unless the input has one separator and ends in the marker."""
        ids = list(self._tokenizer.encode(text, add_special_tokens=True))
        if ids.count(self.separator_id) != 1 or ids.count(self.marker_id) != 1 or ids[-1] != self.marker_id:
            raise SerialisationError(
                f"expected one {SEPARATOR} and one {MARKER}, the latter last; found {ids.count(self.separator_id)} and "
                f"{ids.count(self.marker_id)}, and token {ids[-1]} last (does the tokenizer append an end token?)"
            )
        return ids

    def _join(self, prompt: str, response: str) -> str:
        if self._wrapper == "pretrain" or (not response and not self._newline_before_empty):
            return prompt + response
        return prompt + "\n" + response

    def _encode_part_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(without_markers(encodable(text)), add_special_tokens=True))

    def _decode_part(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A special token inside a forged marker hides the marker until decoding drops that token.
        return without_markers(text)

    def _single_token(self, text: str) -> int:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise SerialisationError(
                f"the tokenizer splits {text} into {len(ids)} tokens; a POLAR tokenizer has it as one special token"
            )
        return ids[0]


def without_markers(text: str) -> str:
    """Remove the two markers, and any that their removal creates."""
    while SEPARATOR in text or MARKER in text:
        text = text.replace(SEPARATOR, "").replace(MARKER, "")
    return text


def prompt_text(messages: Sequence[Message]) -> str:
    """Return the messages' text without roles, which are not part of POLAR's input."""
    return "\n".join(message.content for message in messages)


def without_thinking(text: str, unclosed: UnclosedThinking = "empty") -> str:
    """Remove the `<think>...</think>` parts.

    A `</think>` without an opening tag (which the chat template wrote) closes a thought that began at the start. If a
    `<think>` is not closed, `empty` keeps only the text before it; `keep` keeps the thought, too.
    """
    opening, closing = "<think>", "</think>"
    if opening not in text and closing not in text:
        return text
    first_closing = text.find(closing)
    if first_closing >= 0 and not 0 <= text.find(opening) < first_closing:
        text = text[first_closing + len(closing) :]
    kept = ""
    while opening in text:
        before, _, rest = text.partition(opening)
        kept += before
        thought, closed, text = rest.partition(closing)
        if not closed:
            text = thought if unclosed == "keep" else ""
            break
    return (kept + text).strip()


Reduce = Literal["mean", "max"]


@dataclass(frozen=True)
class Comparison:
    """A group's responses with one reference."""

    tree: Tree
    """The distinct token sequences."""
    sequence_of: tuple[int | str, ...]
    """Per sample: the index of its suffix, or why it has none."""


@dataclass(frozen=True)
class GroupPlan:
    """One comparison per reference."""

    group: Group
    comparisons: tuple[Comparison, ...]

    def scores(self, values: Sequence[Sequence[float | str]], reduce: Reduce) -> GroupScores:
        """Combine logits (or reasons for their absence), one per comparison and suffix."""
        return GroupScores(tuple(self._score(i, values, reduce) for i in range(len(self.group.samples))))

    def _score(self, sample: int, values: Sequence[Sequence[float | str]], reduce: Reduce) -> Score:
        if not self.comparisons:
            return Score.invalid("no_reference: the prompt has no reference answer")
        raw: list[float] = []
        for comparison, logits in zip(self.comparisons, values, strict=True):
            sequence = comparison.sequence_of[sample]
            if isinstance(sequence, str):
                return Score.invalid(sequence)
            logit = logits[sequence]
            if isinstance(logit, str):
                return Score.invalid(logit)
            raw.append(logit)
        if not all(math.isfinite(logit) for logit in raw):
            return Score.invalid(f"not_finite: the discriminator's score is {raw}")
        value = max(raw) if reduce == "max" else sum(raw) / len(raw)
        return Score(value=value, components={"polar": value}, ensemble=tuple(raw) if len(raw) > 1 else ())


def plan_group(
    group: Group, serialiser: Serialiser, max_references: int, max_length: int, unclosed_thinking: UnclosedThinking
) -> GroupPlan:
    """Serialise every response with each reference. `max_length`: the model's limit in tokens."""
    question = prompt_text(group.prompt.messages)
    candidates = [without_thinking(sample.text, unclosed_thinking) for sample in group.samples]
    comparisons = []
    for reference in group.prompt.references[:max_references]:
        answer = without_thinking(reference, unclosed_thinking)
        encoded: dict[str, tuple[int, ...] | str] = {}
        for text in candidates:
            if text not in encoded:
                encoded[text] = _encode(serialiser, question, answer, text, max_length)
        comparisons.append(_compare([encoded[text] for text in candidates]))
    return GroupPlan(group, tuple(comparisons))


def _encode(
    serialiser: Serialiser, question: str, reference: str, candidate: str, max_length: int
) -> tuple[int, ...] | str:
    try:
        ids = tuple(serialiser.token_ids(serialiser.text(question, reference, candidate)))
    except SerialisationError as error:
        return f"serialisation: {error}"
    if len(ids) > max_length:
        return f"too_long: {len(ids)} tokens, more than the discriminator's {max_length}"
    return ids


def _compare(encoded: Sequence[tuple[int, ...] | str]) -> Comparison:
    from rlkit.models.packing import Tree  # needs torch, which configuration checks must not load

    sequences = list(dict.fromkeys(ids for ids in encoded if not isinstance(ids, str)))
    index = {ids: i for i, ids in enumerate(sequences)}
    return Comparison(Tree.of(sequences), tuple(ids if isinstance(ids, str) else index[ids] for ids in encoded))
