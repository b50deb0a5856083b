"""`reward=preference`: the raw score of a Bradley-Terry reward model for prompt and response."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.preference.inputs import ClassifierError, Encoded, Encoder, Layout, Unreadable, check_classifier, positions
from rlkit.experience import Group, GroupScores, Message, Score
from rlkit.models.folder import model_folder

if TYPE_CHECKING:
    from rewards.preference.scorers import Classifier

CANNED = ("Beijing.", "I don't know, and I would rather talk about something else.")
"""Responses of different lengths, so that the check at the start tests padding."""


class PreferenceReward(Reward):
    """Raw, unbounded logit of a sequence classifier with one label; differences are log-odds of preference.

    A sample longer than the model accepts is invalid (`too_long`); it is not truncated.
    """

    class Config(RewardConfig):
        model_path: str
        """Folder of a one-label `...ForSequenceClassification` with its tokenizer. Its Python code is never run."""
        layout: Layout = "chat"
        """chat: apply the tokenizer's chat template to the conversation; pair: the texts as (prompt, response)."""
        chat_template: str | None = None
        """Path of a Jinja chat template that replaces the tokenizer's own."""
        max_length: int | None = Field(default=None, ge=1)
        """Limit of prompt plus response, in tokens; longer samples are invalid. null: the model's and tokenizer's."""
        backend: Literal["auto", "packed", "padded"] = "auto"
        """packed: without padding, a group's prompt computed once (decoders with a linear head); padded: any model, as
        transformers runs it; auto: packed if it gives the same scores."""
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """auto: bfloat16 on CUDA, float32 on CPU. The head is always float32."""
        tokens_per_batch: int = Field(default=16384, ge=1)
        """Tokens per forward pass; shared prefixes count for each sequence."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(raw_scores=True)

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._encoder: Encoder | None = None
        self._scorer: Classifier | None = None

    @classmethod
    def check(cls, config: Any) -> list[str]:
        try:
            _longest(config, check_classifier(model_folder(config.model_path)))
        except ValueError as error:
            return [str(error)]
        if config.chat_template is not None and config.layout == "pair":
            return ["reward.chat_template has no effect with reward.layout=pair"]
        return []

    def start(self) -> None:
        """Load the model and score two canned answers. Raise ClassifierError."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from rewards.preference.scorers import load_scorer

        config, folder = self.config, model_folder(self.config.model_path)
        longest = _longest(config, check_classifier(folder))
        encoder = Encoder(folder, config.layout, config.chat_template, longest)
        self._encoder = encoder
        question = [Message("user", "What is the capital of China?")]
        self._scorer = load_scorer(
            folder,
            device=self.context.device,
            dtype=config.dtype,
            threads=self.context.threads,
            tokens_per_batch=config.tokens_per_batch,
            tokenizer_pad_id=encoder.tokenizer.pad_token_id,
            backend=config.backend,
            canned=[encoder.encode(question, answer) for answer in CANNED],
        )

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        if self._scorer is None:
            raise RuntimeError("PreferenceReward.start() was not called, or failed")
        inputs = [self._encoded(group) for group in groups]
        readable = [[item for item in group if isinstance(item, Encoded)] for group in inputs]
        values = (value for group in self._scorer.score([group for group in readable if group]) for value in group)
        return [
            GroupScores(tuple(Score.invalid(item) if isinstance(item, str) else _score(next(values)) for item in group))
            for group in inputs
        ]

    def close(self) -> None:
        self._scorer = None

    def _encoded(self, group: Group) -> list[Encoded | str]:
        assert self._encoder is not None
        inputs: list[Encoded | str] = []
        for sample in group.samples:
            try:
                inputs.append(self._encoder.encode(group.prompt.messages, sample.text))
            except Unreadable as error:
                inputs.append(str(error))
        return inputs


def _score(logit: float) -> Score:
    if not math.isfinite(logit):
        return Score.invalid(f"not_finite: the preference model's score is {logit}")
    return Score(value=logit, components={"preference": logit})


def _longest(config: PreferenceReward.Config, model: dict[str, Any]) -> int:
    """Return the longest input; raise ClassifierError if `max_length` is more than the model accepts."""
    room = positions(model)
    if config.max_length is not None and config.max_length > room:
        raise ClassifierError(
            f"reward.max_length={config.max_length} is more than {config.model_path} takes: {room} (null takes those)"
        )
    return config.max_length or room
