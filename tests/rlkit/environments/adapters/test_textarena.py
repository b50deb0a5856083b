"""`environment=textarena`, with the real package."""

from __future__ import annotations

import pytest
from adapter_fixture import act, begin, need

from rlkit.environments.adapters.textarena import TextArena, TextArenaConfig

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def package() -> None:
    need("textarena")


def test_a_game_to_its_end() -> None:
    game, opening = begin(TextArena, 3)
    assert "between 1 and 20 within 10 turns" in opening
    low, high, guesses = 1, 20, 0
    while True:
        guess = (low + high) // 2
        (step,) = act(game, f"I say [{guess}]" if guesses else str(guess))  # a bare number gets its brackets
        guesses += 1
        if step.done:
            break
        assert str(step.observation).startswith("The target number is"), "nothing that was said before"
        low, high = (guess + 1, high) if "higher" in str(step.observation) else (low, guess - 1)
    assert (step.reward, step.success) == (1.0, True) and guesses <= 5


def test_a_move_that_is_none_is_answered() -> None:
    game, _ = begin(TextArena, 3)
    first, second = act(game, "up", "up")
    assert "invalid move" in str(first.observation) and not first.done
    assert second.done and second.success is False and second.reward < 1


@pytest.mark.parametrize("name", ["2048-v0", "Minesweeper-v0", "Blackjack-v0", "Sudoku-v0"])
def test_episodes_side_by_side_are_those_alone(name: str) -> None:
    moves = ["[up]", "[1 1]", "[hit]", "[left]"]

    def alone(seed: int) -> list[object]:
        game, opening = begin(TextArena, seed, 9, name=name)
        return [opening, *act(game, *moves[:3])]

    expected = [alone(seed) for seed in range(2)]
    games = [begin(TextArena, seed, 9, name=name) for seed in range(2)]
    together: list[list[object]] = [[opening] for _, opening in games]
    for move in moves[:3]:
        for (game, _), heard in zip(games, together, strict=True):
            heard += act(game, move)
    assert together == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nim-v0", "AssertionError: The number of players has to be 2, received 1"),
        ("Nowhere-v0", "ValueError: Environment Nowhere-v0 not found in registry."),
        ("TwentyQuestions-v0", "OpenRouter API key not found"),
    ],
)
def test_what_cannot_be_played_is_refused(name: str, message: str) -> None:
    (said,) = TextArena.check(TextArenaConfig(name=name))
    assert said.startswith(f"textarena cannot start {name!r}") and message in said
