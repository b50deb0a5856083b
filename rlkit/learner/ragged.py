"""One number per response token for whole groups: what log-probs and values have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from rlkit.experience import Group
from rlkit.models.packing import PackedBatch, Tree, pack, split_by_tokens


def per_token(
    forward: Callable[[PackedBatch], Tensor], groups: Sequence[Group], tokens_per_microbatch: int, device: str
) -> list[np.ndarray]:
    """`forward` gives [R] for a packed batch; returns [T] float32 for every sample of every group, in order."""
    trees = [Tree(g.prompt.token_ids, tuple(s.token_ids.tolist() for s in g.samples)) for g in groups]
    found: dict[int, list[np.ndarray]] = {}
    for members in split_by_tokens([tree.tokens for tree in trees], tokens_per_microbatch):
        rows = forward(pack([trees[i] for i in members]).to(device)).float().cpu().numpy()
        lengths = [len(suffix) for i in members for suffix in trees[i].suffixes]
        pieces = iter(np.split(rows, np.cumsum(lengths)[:-1]))
        for i in members:
            found[i] = [next(pieces) for _ in trees[i].suffixes]
    return [piece for i in range(len(trees)) for piece in found[i]]
