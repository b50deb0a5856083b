"""The records of a run, and the buffer. Importable without torch, Ray or vLLM."""

from rlkit.experience.errors import UserError
from rlkit.experience.types import (
    Group,
    GroupScores,
    Message,
    PreferencePair,
    Prompt,
    Recorded,
    Sample,
    Score,
    Span,
    SpanReward,
)

__all__ = [
    "Group",
    "GroupScores",
    "Message",
    "PreferencePair",
    "Prompt",
    "Recorded",
    "Sample",
    "Score",
    "Span",
    "SpanReward",
    "UserError",
]
