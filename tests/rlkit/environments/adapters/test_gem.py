"""`environment=gem`, with the real package."""

from __future__ import annotations

import pytest
from adapter_fixture import act, begin, need

from rlkit.environments.adapters.gem import Gem, GemConfig

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def package() -> None:
    need("gem")


def test_a_game_to_its_end() -> None:
    game, opening = begin(Gem, 3)
    assert "between 1 and 10 (inclusive) within 4 turns" in opening and opening.endswith("Enter your next guess.")
    low, high, steps = 1, 10, []
    while not steps or not steps[-1].done:
        guess = (low + high) // 2
        steps += act(game, rf"\boxed{{{guess}}}")
        low, high = (guess + 1, high) if "higher" in str(steps[-1].observation) else (low, guess - 1)
    assert (steps[-1].reward, steps[-1].success) == (1.0, True)
    assert all(step.success is False and step.reward == 0 for step in steps[:-1])


@pytest.mark.parametrize("name", ["game:Game2048-v0-easy", "game:Minesweeper-v0-easy", "rg:chain_sum"])
def test_episodes_side_by_side_are_those_alone(name: str) -> None:
    moves = [r"\boxed{up}", r"\boxed{left}"]

    def alone(seed: int) -> list[object]:
        game, opening = begin(Gem, seed, 9, name=name)
        return [opening, *act(game, *moves)]

    expected = [alone(seed) for seed in range(2)]
    games = [begin(Gem, seed, 9, name=name) for seed in range(2)]
    together: list[list[object]] = [[opening] for _, opening in games]
    for move in moves:
        for (game, _), heard in zip(games, together, strict=True):
            heard += act(game, move)
    assert together == expected


def test_what_cannot_be_played_is_refused() -> None:
    (said,) = Gem.check(GemConfig(name="game:Nowhere"))
    assert said == "gem cannot start 'game:Nowhere': ValueError: Environment game:Nowhere not found in registry."
