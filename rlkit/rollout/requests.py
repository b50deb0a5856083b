"""What rollout workers are asked for: groups, with seeds that depend on nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from rlkit.experience import Prompt


@dataclass(frozen=True)
class GroupRequest:
    id: str
    prompt: Prompt
    samples: int
    seed: int
    step: int
    greedy: bool = False
    """Also sample a greedy response (`Group.greedy`)."""
    temperature: float | None = None
    """Of the samples; None: the rollout's, 0: greedy."""
    max_response_tokens: int | None = None
    """None: the rollout's."""

    @property
    def responses(self) -> int:
        """Responses to generate; the greedy one is the last."""
        return self.samples + self.greedy


def sample_seed(seed: int, group_id: str, index: int | str) -> int:
    """A seed that depends on nothing else: results do not depend on which worker sampled what.

    `index`: of a sample; `INDEX.TURN` for an episode's turn after the first, `environment` for its environment.
    """
    digest = hashlib.blake2b(f"{seed}/{group_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
