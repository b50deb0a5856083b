"""What the servers that run a discriminator are sent, and what they answer: token ids in, raw logits out.

Token ids, not text: a server may tokenise differently (another BOS, another tokenizer class), and the score would
silently be that of another input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar


class WrongAnswer(ValueError):
    """An answer that is not in the server's wire format."""


class WireFormat(ABC):
    """How one kind of server is asked for scores."""

    path: ClassVar[str]

    @abstractmethod
    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        """The JSON of a request."""

    @abstractmethod
    def entries(self, answer: Any) -> list[Any]:
        """One entry per input, in order. Raises KeyError or TypeError for another format."""

    def scores(self, answer: Any, inputs: int) -> list[float]:
        """The raw logits of an answer to `inputs` inputs. Raises WrongAnswer."""
        try:
            entries = self.entries(answer)
        except (KeyError, TypeError, AttributeError) as error:
            raise WrongAnswer(f"an answer in another format ({type(error).__name__}: {error})") from error
        if len(entries) != inputs:
            raise WrongAnswer(f"{len(entries)} scores for {inputs} inputs")
        return [last_number(entry) for entry in entries]


class VllmWire(WireFormat):
    """`POST /pooling` of vLLM 0.8 and later: a score (sequence classifier), or one per token (InternLM2)."""

    path = "/pooling"

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        """Without `use_activation: false` vLLM answers the sigmoid of the score."""
        body: dict[str, Any] = {"input": [list(ids) for ids in inputs], "use_activation": False}
        return body if model is None else {**body, "model": model}

    def entries(self, answer: Any) -> list[Any]:
        return [entry["data"] for entry in sorted(answer["data"], key=lambda entry: int(entry["index"]))]


class SglangWire(WireFormat):
    """SGLang's own `POST /classify`, started with `--is-embedding`."""

    path = "/classify"

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"input_ids": [list(ids) for ids in inputs]}
        return body if model is None else {**body, "model": model}

    def entries(self, answer: Any) -> list[Any]:
        """A list; for a single input some versions answer with the object alone."""
        return [entry["embedding"] for entry in (answer if isinstance(answer, list) else [answer])]


class LmdeployWire(WireFormat):
    """`POST /pooling` of LMDeploy 0.9.1 and later, PyTorch engine."""

    path = "/pooling"

    def body(self, inputs: Sequence[Sequence[int]], model: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"input": [list(ids) for ids in inputs]}
        return body if model is None else {**body, "model": model}

    def entries(self, answer: Any) -> list[Any]:
        return [entry["data"] for entry in sorted(answer["data"], key=lambda entry: int(entry.get("index", 0)))]


WIRES: dict[str, WireFormat] = {"http_vllm": VllmWire(), "http_sglang": SglangWire(), "http_lmdeploy": LmdeployWire()}
"""Backend name -> wire format."""


def last_number(entry: Any) -> float:
    """The score in a number, a list of numbers or a list of lists: the last one, which stands at the last token.

    JSON knows no NaN, so null is one. Raises WrongAnswer if there is no number.
    """
    found = entry
    while isinstance(found, list) and found:
        found = found[-1]
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise WrongAnswer(f"{str(entry)[:80]!r} where a score belongs")
    try:
        return float(found)
    except OverflowError as error:
        raise WrongAnswer(f"a number of {len(str(found))} digits where a score belongs") from error
