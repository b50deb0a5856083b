"""`environment=gem`: games of GEM (the package gem-llm)."""

from __future__ import annotations

from typing import Any

from rlkit.environments.adapters.game import Game, GameConfig
from rlkit.environments.base import Step


class GemConfig(GameConfig):
    name: str = "game:GuessTheNumber-v0-easy"
    """The game, as `gem.make` calls it."""


class Gem(Game):
    """GEM's rewards, turn by turn; a game that ends with 1 or more is a success."""

    Config = GemConfig
    config: GemConfig
    package = "gem"

    def begin(self, seed: int) -> str:
        import gem

        self._game = gem.make(self.config.name, **self.config.options)
        return _said(*self._game.reset(seed=seed))

    def play(self, text: str) -> Step:
        observation, reward, terminated, truncated, info = self._game.step(text)
        reward, done = float(reward), bool(terminated or truncated)
        return Step(_said(observation, info), reward=reward, done=done, success=done and reward >= 1)


def _said(observation: Any, info: Any) -> str:
    """With the request for an action, which GEM's own wrappers add, too."""
    return "\n".join(part for part in (str(observation).strip("\n"), (info or {}).get("suffix", "")) if part)
