"""The records that flow through a run (prompt, sample, group, score) and the buffer that holds them.

Importable without torch, Ray or vLLM: rewards and algorithms build on these types alone.
"""

from rlkit.experience.errors import UserError
from rlkit.experience.types import (
    Group,
    GroupScores,
    Message,
    PreferencePair,
    Prompt,
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
    "Sample",
    "Score",
    "Span",
    "SpanReward",
    "UserError",
]
