"""`environment=textarena`: TextArena's single-player games."""

from __future__ import annotations

from typing import Any

from rlkit.environments.adapters.game import Game, GameConfig
from rlkit.environments.base import EnvironmentFailure, Step


class TextArenaConfig(GameConfig):
    name: str = "GuessTheNumber-v0"
    """Name of the game, as for `textarena.make`."""


class TextArena(Game):
    """The reward comes at the end of the game; at least 1 is a success.

    The game's action wrappers are used. Its observation wrappers are not: they repeat the whole conversation.
    """

    Config = TextArenaConfig
    config: TextArenaConfig
    package = "textarena"

    def begin(self, seed: int) -> str:
        import textarena

        game: Any = textarena.make(self.config.name, **self.config.options)
        self._rewriters = []
        while isinstance(game, textarena.Wrapper):
            if isinstance(game, textarena.ActionWrapper):
                self._rewriters.append(game)
            game = game.env
        self._own_words = textarena.ObservationType.PLAYER_ACTION
        self._game = game
        game.reset(num_players=1, seed=seed)
        return self._heard()

    def play(self, text: str) -> Step:
        for wrapper in self._rewriters:
            text = wrapper.action(text)
        done, _ = self._game.step(text)
        if not done:
            return Step(self._heard(), success=False)
        rewards, _ = self._game.close()
        reward = float((rewards or {}).get(0, 0.0))
        return Step(reward=reward, done=True, success=reward >= 1)

    def _heard(self) -> str:
        """What the game has said since the last call."""
        player, said = self._game.get_observation()
        if player != 0:
            raise EnvironmentFailure(f"{self.config.name} is a game for several players")
        return "\n".join(message.strip("\n") for _, message, kind in said if kind != self._own_words)
