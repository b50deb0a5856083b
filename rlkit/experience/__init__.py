"""The records of a run, and the buffer. Importable without torch, Ray or vLLM."""

from rlkit.experience.errors import UserError
from rlkit.experience.types import (
    Episode,
    Group,
    GroupScores,
    Message,
    PreferencePair,
    Prompt,
    Recorded,
    Sample,
    Score,
    Segment,
    Span,
    SpanReward,
    ToolCall,
)

__all__ = [
    "Episode",
    "Group",
    "GroupScores",
    "Message",
    "PreferencePair",
    "Prompt",
    "Recorded",
    "Sample",
    "Score",
    "Segment",
    "Span",
    "SpanReward",
    "ToolCall",
    "UserError",
]
