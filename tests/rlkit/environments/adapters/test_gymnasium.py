"""`environment=gymnasium`, with the real package."""

from __future__ import annotations

import pytest
from adapter_fixture import act, begin, need

from rlkit.environments.adapters.gymnasium import Gymnasium, GymnasiumConfig

pytestmark = pytest.mark.slow
DRY = {"is_slippery": False}


@pytest.fixture(autouse=True)
def package() -> None:
    need("gymnasium")


def test_a_walk_over_the_lake() -> None:
    lake, opening = begin(Gymnasium, options=DRY)
    assert opening.endswith("Actions: left, down, right, up.\n[S]FFF\nFHFH\nFFFH\nHFFG")
    steps = act(lake, "down", "I go\nDown.", "2", "not left, but right?", "Hm.", "down", "right")
    assert [step.observation for step in steps[:2]] == ["SFFF\n[F]HFH\nFFFH\nHFFG", "SFFF\nFHFH\n[F]FFH\nHFFG"]
    assert steps[4].observation == "Say one of: left, down, right, up." and steps[4].state == "10"
    assert [step.state for step in steps] == ["0", "4", "8", "9", "10", "10", "14"]
    assert [step.done for step in steps] == [False] * 6 + [True]
    assert (steps[-1].reward, steps[-1].success) == (1.0, True)


def test_a_hole_ends_the_walk() -> None:
    lake, _ = begin(Gymnasium, options=DRY, actions=("west", "south", "east", "north"), rules="")
    _, fallen = act(lake, "east", "south")
    assert (fallen.reward, fallen.done, fallen.success) == (0.0, True, False)


def test_slips_are_the_episodes_and_maps_are_the_tasks() -> None:
    words = ["right", "down"] * 3

    def walk(seed: int, chance: int) -> list[str]:
        lake, opening = begin(Gymnasium, seed, chance, options={"map_name": "random", "size": 6})
        return [opening, *(str(step.observation) for step in act(lake, *words))]

    assert walk(1, 1) == walk(1, 1)
    assert len({walk(1, chance)[0] for chance in range(4)}) == 1
    assert len({tuple(walk(1, chance)) for chance in range(4)}) > 1
    assert len({walk(seed, 1)[0] for seed in range(4)}) == 4


def test_the_cliff() -> None:
    cliff, opening = begin(Gymnasium, name="CliffWalking-v1")
    assert opening.endswith("\nx  C  C  C  C  C  C  C  C  C  C  T")
    (fallen,) = act(cliff, "right")
    assert (fallen.reward, fallen.done, fallen.success) == (-100.0, False, False)
    steps = act(cliff, "up", *["right"] * 11, "down")
    assert (sum(step.reward for step in steps), steps[-1].done, steps[-1].success) == (-13.0, True, True)


def test_a_ride() -> None:
    taxi, opening = begin(Gymnasium, 3, name="Taxi")
    assert opening.endswith("Taxi: row 0, column 2. Passenger: at R. Destination: Y.")
    steps = act(taxi, "pickup", "south", "south", "west", "west", "north", "north", "pickup")
    assert steps[0].reward == -10.0
    assert str(steps[-1].observation).endswith("Taxi: row 0, column 0. Passenger: in the taxi. Destination: Y.")
    (*_, arrived) = act(taxi, *["south"] * 4, "dropoff")
    assert (arrived.reward, arrived.done, arrived.success) == (20.0, True, True)


def test_cards() -> None:
    table, opening = begin(Gymnasium, 3, name="Blackjack-v1")
    assert opening.endswith("You hold 7. The dealer shows 10.")
    (stuck,) = act(table, "stick")
    assert stuck.done and stuck.reward in (-1.0, 0.0, 1.0) and stuck.success == (stuck.reward > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "CartPole-v1"}, "ValueError: its states are Box"),
        ({"name": "Pendulum-v1"}, "only Discrete ones can be named"),
        ({"name": "Nowhere-v0"}, "NameNotFound: Environment `Nowhere` doesn't exist."),
        ({"options": {"wet": True}}, "unexpected keyword argument 'wet'"),
        ({"actions": ("up", "down")}, "ValueError: environment.actions has 2 names, but there are 4 actions"),
    ],
)
def test_what_cannot_be_played_is_refused(options: dict[str, object], message: str) -> None:
    (said,) = Gymnasium.check(GymnasiumConfig(**options))
    assert said.startswith("gymnasium cannot start") and message in said
