"""`environment=gem`: games of GEM (the package gem-llm)."""

from __future__ import annotations

from typing import Any

from rlkit.environments.adapters.game import Game, GameConfig
from rlkit.environments.base import Step
from rlkit.experience.extras import lacking

BY_ITSELF = "pip install --no-deps 'gem-llm>=0.1,<0.2'"
"""The package's dependencies conflict with Hydra: its math-verify needs another antlr4."""


class GemConfig(GameConfig):
    name: str = "game:GuessTheNumber-v0-easy"
    """Name of the game, as for `gem.make`."""


class Gem(Game):
    """Rewards are GEM's, turn by turn; a game that ends with a reward of at least 1 is a success."""

    Config = GemConfig
    config: GemConfig
    package = "gem"

    @classmethod
    def check(cls, config: GameConfig) -> list[str]:
        missing = lacking(cls.package)
        return [f"{message}, then {BY_ITSELF}" for message in missing] or super().check(config)

    def begin(self, seed: int) -> str:
        import gem

        self._game = gem.make(self.config.name, **self.config.options)
        return _said(*self._game.reset(seed=seed))

    def play(self, text: str) -> Step:
        observation, reward, terminated, truncated, info = self._game.step(text)
        reward, done = float(reward), bool(terminated or truncated)
        return Step(_said(observation, info), reward=reward, done=done, success=done and reward >= 1)


def _said(observation: Any, info: Any) -> str:
    """Add the request for an action, as GEM's own wrappers do."""
    return "\n".join(part for part in (str(observation).strip("\n"), (info or {}).get("suffix", "")) if part)
