"""What rewards have in common that look at tokens alone."""

from __future__ import annotations

from typing import Any

from rewards.base import Reward


class TokenReward(Reward):
    """Counts or compares a response's tokens: it reads no text and loads no model."""

    @classmethod
    def uses_gpu(cls, config: Any) -> bool:
        """No: it counts."""
        return False

    @classmethod
    def judges_texts(cls, config: Any) -> bool:
        """No: it looks at tokens."""
        return False
