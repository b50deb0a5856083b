"""A data source of your own: problems made by a program, with the answers that verifiers and POLAR compare with."""

from __future__ import annotations

import random

from pydantic import Field

from rlkit.data.base import BadRow, DataConfig, DataSource, Problem, Split
from rlkit.experience import Message


class Sums(DataSource):
    """`What is 17 + 25?`, with a reference answer."""

    class Config(DataConfig):
        """Every field is a key: `data.largest=99`."""

        problems: int = Field(default=512, ge=2)
        """Problems in all; every eighth is held out."""
        largest: int = Field(default=20, ge=1)
        """Largest number in a problem."""

    def provides(self) -> frozenset[str]:
        """What rewards may ask for."""
        return frozenset({"answer", "references"})

    def load(self, split: Split) -> tuple[list[Problem], list[BadRow]]:
        """Equal configuration and seed give equal problems; the two splits share none."""
        rng = random.Random(self.seed)
        pairs = [
            (rng.randint(0, self.config.largest), rng.randint(0, self.config.largest))
            for _ in range(self.config.problems)
        ]
        unique = list(dict.fromkeys(pairs))
        chosen = [pair for i, pair in enumerate(unique) if (i % 8 == 0) == (split == "heldout")]
        return [self._problem(a, b) for a, b in chosen], []

    def _problem(self, a: int, b: int) -> Problem:
        return Problem(
            id=f"{a}+{b}",
            messages=(Message("user", f"A shop has {a} apples. {b} more come. How many apples are there?"),),
            references=(f"{a} plus {b} is {a + b}. #### {a + b}",),
            answer=str(a + b),
        )
