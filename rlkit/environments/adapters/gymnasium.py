"""`environment=gymnasium`: games of Gymnasium with numbered actions and states, played in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlkit.environments.adapters.game import Game, GameConfig
from rlkit.environments.base import Step

_COLOURED = re.compile(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", re.DOTALL)


class GymnasiumConfig(GameConfig):
    name: str = "FrozenLake-v1"
    """Name of the game, as for `gymnasium.make`. Actions must be Discrete; states must be Discrete, tuples of these, or
    drawn as text (render mode `ansi`)."""
    actions: tuple[str, ...] = ()
    """Names of the actions, in order; empty: those of the four toy-text games, else their numbers."""
    rules: str | None = None
    """What the policy reads first; null: a few words for the four toy-text games, else none."""


class Gymnasium(Game):
    """The policy gives the name or number of an action; the last name in its text counts. Text without one changes
    nothing.

    FrozenLake with `options={map_name:random}` (and `size`, `p`) has a different map for each task.
    """

    Config = GymnasiumConfig
    config: GymnasiumConfig
    package = "gymnasium"

    def begin(self, seed: int) -> str:
        self._known = next((game for name, game in _KNOWN.items() if self.config.name.startswith(name)), _Known())
        self._env = _made(self.config.name, self.config.options, seed)
        self._first = int(self._env.action_space.start)
        count = int(self._env.action_space.n)
        self._names = self.config.actions or self._known.actions or tuple(str(self._first + i) for i in range(count))
        if len(self._names) != count:
            raise ValueError(f"environment.actions has {len(self._names)} names, but there are {count} actions")
        self._state, _ = self._env.reset(seed=seed)
        rules = self._known.rules if self.config.rules is None else self.config.rules
        return "\n".join(part for part in (rules, f"Actions: {', '.join(self._names)}.", self._seen()) if part)

    def chance(self, seed: int) -> None:
        self._env.unwrapped.np_random = np.random.default_rng(seed)

    def play(self, text: str) -> Step:
        before = str(self._state)
        action = self._action(text)
        if action is None:
            return Step(f"Say one of: {', '.join(self._names)}.", success=False, state=before)
        self._state, reward, terminated, truncated, _ = self._env.step(self._first + action)
        reward = float(reward)
        if terminated or truncated:
            won = bool(terminated) and self._known.won(reward)
            return Step(self._seen(), reward=reward, done=True, success=won, state=before)
        return Step(self._seen(), reward=reward, success=False, state=before)

    def close(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()

    def _action(self, text: str) -> int | None:
        said = text.strip()
        if re.fullmatch(r"\d{1,9}", said, re.ASCII) and said not in self._names:
            number = int(said) - self._first
            return number if 0 <= number < len(self._names) else None
        names = {name.casefold(): i for i, name in enumerate(self._names)}
        longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        named = re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", said.casefold())
        return names[named[-1]] if named else None

    def _seen(self) -> str:
        if self._known.seen is not None:
            return self._known.seen(self._env, self._state)
        if self._env.render_mode == "ansi":
            return _COLOURED.sub(r"[\1]", self._env.render()).strip("\n")
        return f"State: {_plain(self._state)}"


@dataclass(frozen=True)
class _Known:
    actions: tuple[str, ...] = ()
    rules: str = ""
    won: Callable[[float], bool] = lambda reward: reward > 0
    """Whether a game was won, by the reward with which it ended."""
    seen: Callable[[Any, Any], str] | None = None


def _made(name: str, options: dict[str, Any], seed: int) -> Any:
    """Create the game. Raises ValueError for one that cannot be played in words."""
    import gymnasium
    from gymnasium.spaces import Discrete, MultiDiscrete, Tuple

    if name.startswith("FrozenLake") and options.get("map_name") == "random":
        from gymnasium.envs.toy_text.frozen_lake import generate_random_map

        sizes = {key: options[key] for key in ("size", "p") if key in options}
        rest = {key: value for key, value in options.items() if key not in ("size", "p", "map_name")}
        options = {**rest, "desc": generate_random_map(**sizes, seed=seed)}
    env = gymnasium.make(name, disable_env_checker=True, **options)
    if "ansi" in env.metadata.get("render_modes", ()):
        env.close()
        env = gymnasium.make(name, disable_env_checker=True, render_mode="ansi", **options)
    if not isinstance(env.action_space, Discrete):
        raise ValueError(f"its actions are {env.action_space}; only Discrete ones can be named")
    space = env.observation_space
    parts = space.spaces if isinstance(space, Tuple) else [space]
    if env.render_mode != "ansi" and not all(isinstance(part, Discrete | MultiDiscrete) for part in parts):
        raise ValueError(f"its states are {space}, but it does not draw them as text")
    return env


def _plain(state: Any) -> str:
    if isinstance(state, tuple | list | np.ndarray):
        return ", ".join(str(int(part)) for part in state)
    return str(int(state))


def _lake(env: Any, state: Any) -> str:
    rows = [[cell.decode() for cell in row] for row in env.unwrapped.desc.tolist()]
    row, column = divmod(int(state), len(rows[0]))
    rows[row][column] = f"[{rows[row][column]}]"
    return "\n".join("".join(cells) for cells in rows)


def _taxi(env: Any, state: Any) -> str:
    row, column, passenger, goal = env.unwrapped.decode(int(state))
    places = "RGYB"
    picture = "\n".join("".join(cell.decode() for cell in line) for line in env.unwrapped.desc.tolist())
    where = "in the taxi" if passenger == len(places) else f"at {places[passenger]}"
    return f"{picture}\nTaxi: row {row}, column {column}. Passenger: {where}. Destination: {places[goal]}."


def _cards(env: Any, state: Any) -> str:
    held, shown, ace = (int(part) for part in state)
    return f"You hold {held}{' with an ace that counts 11' if ace else ''}. The dealer shows {shown}."


_KNOWN = {
    "FrozenLake": _Known(
        ("left", "down", "right", "up"),
        "Walk over the frozen lake (F) from S to G, and into no hole (H). You are where the brackets are.",
        seen=_lake,
    ),
    "CliffWalking": _Known(
        ("up", "right", "down", "left"),
        "Walk to T, and not over the cliff (C). You are x.",
        won=lambda reward: True,
    ),
    "Taxi": _Known(
        ("south", "north", "east", "west", "pickup", "dropoff"),
        "Drive the taxi to the passenger and pick them up, then to the destination, and drop them off. Walls are |.",
        seen=_taxi,
    ),
    "Blackjack": _Known(
        ("stick", "hit"), "Blackjack: come nearer to 21 than the dealer, and not beyond it.", seen=_cards
    ),
}
