"""The stories of the arithmetic task: who has what, and how it grows, shrinks and multiplies."""

from __future__ import annotations

from dataclasses import dataclass

NAMES: tuple[tuple[str, str], ...] = (
    ("Tom", "He"),
    ("Ana", "She"),
    ("Ben", "He"),
    ("Mia", "She"),
    ("Sam", "He"),
    ("Eva", "She"),
    ("Max", "He"),
    ("Lea", "She"),
)
"""Names with their pronoun."""


@dataclass(frozen=True, slots=True)
class Situation:
    """Sentence patterns: `{n}` name, `{p}` pronoun, `{t}` thing counted, `{a}` amount, `{b}` change, `{k}` factor."""

    name: str
    things: tuple[str, ...]
    start: str
    """How many there are at first: `{a}`."""
    start_groups: str
    """`{k}` groups of `{a}`: the first step is a multiplication."""
    add: tuple[str, ...]
    subtract: tuple[str, ...]
    multiply: tuple[str, ...]
    question: str


SITUATIONS: tuple[Situation, ...] = (
    Situation(
        name="collection",
        things=("apples", "coins", "cards", "shells"),
        start="{n} has {a} {t}.",
        start_groups="{n} has {k} bags of {a} {t}.",
        add=("{p} finds {b} more.", "{p} buys {b} more."),
        subtract=("{p} loses {b}.", "{p} gives away {b}."),
        multiply=("Then {n} gets {k} times as many.",),
        question="How many {t} does {n} have now?",
    ),
    Situation(
        name="bus",
        things=("riders",),
        start="A bus has {a} {t}.",
        start_groups="{k} groups of {a} {t} are on a bus.",
        add=("{b} more get on.",),
        subtract=("{b} get off.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are on the bus now?",
    ),
    Situation(
        name="bakery",
        things=("cakes", "rolls"),
        start="A baker makes {a} {t}.",
        start_groups="A baker makes {k} trays of {a} {t}.",
        add=("The baker makes {b} more.",),
        subtract=("The baker sells {b}.",),
        multiply=("Then the baker makes it {k} times as many.",),
        question="How many {t} does the baker have now?",
    ),
    Situation(
        name="savings",
        things=("dollars",),
        start="{n} saves {a} {t}.",
        start_groups="{n} saves {a} {t} a week for {k} weeks.",
        add=("{p} earns {b} {t}.",),
        subtract=("{p} spends {b} {t}.",),
        multiply=("Then {n} gets {k} times as much.",),
        question="How many {t} does {n} have now?",
    ),
    Situation(
        name="library",
        things=("books",),
        start="A shelf has {a} {t}.",
        start_groups="A library has {k} shelves of {a} {t}.",
        add=("{b} {t} come back.",),
        subtract=("{b} {t} are lent.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are there now?",
    ),
    Situation(
        name="farm",
        things=("hens", "goats"),
        start="A farm has {a} {t}.",
        start_groups="A farm has {k} groups of {a} {t}.",
        add=("The farm buys {b} more.",),
        subtract=("The farm sells {b}.",),
        multiply=("Then the farm has {k} times as many.",),
        question="How many {t} does the farm have now?",
    ),
    Situation(
        name="game",
        things=("points",),
        start="{n} has {a} {t}.",
        start_groups="{n} gets {a} {t} in each of {k} rounds.",
        add=("Then {n} wins {b} {t}.",),
        subtract=("Then {n} loses {b} {t}.",),
        multiply=("Then {n} gets {k} times as many.",),
        question="How many {t} does {n} have now?",
    ),
    Situation(
        name="garden",
        things=("roses", "trees"),
        start="{n} plants {a} {t}.",
        start_groups="{n} plants {k} rows of {a} {t}.",
        add=("{p} plants {b} more.",),
        subtract=("{b} {t} die.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are there now?",
    ),
    Situation(
        name="tank",
        things=("liters",),
        start="A tank has {a} {t}.",
        start_groups="A tank gets {k} cans of {a} {t}.",
        add=("{b} {t} get in.",),
        subtract=("{b} {t} leak.",),
        multiply=("Then there are {k} times as many.",),
        question="How many {t} are in the tank now?",
    ),
)
