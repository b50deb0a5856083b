"""One rank of the learner, as a process of its own: `python learner_rank.py RANK PORT MODEL OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from learner_fixture import build_learner, grpo_advantages, make_groups, smooth_steps, weights_of

from rlkit.experience import Group

RANKS = 2
SCENARIOS: dict[str, tuple[dict[str, Any], int]] = {
    # learner options, number of groups
    "zero 0": ({"zero_stage": 0, "tokens_per_microbatch": 60}, 5),
    "zero 1": ({"zero_stage": 1, "tokens_per_microbatch": 60}, 5),
    "zero 2": ({"zero_stage": 2, "tokens_per_microbatch": 60}, 5),
    "zero 3": ({"zero_stage": 3, "tokens_per_microbatch": 60}, 5),
    "one group": ({"zero_stage": 1}, 1),  # rank 1 has nothing to do
    "one group, no ZeRO": ({"zero_stage": 0}, 1),
    "one group, split": ({"zero_stage": 2, "tokens_per_microbatch": 20}, 1),
    "unequal": ({"zero_stage": 2, "tokens_per_microbatch": 20}, 2),  # an odd number of micro-batches
    "unequal, no ZeRO": ({"zero_stage": 0, "tokens_per_microbatch": 20}, 2),
    "two optimizer steps": ({"zero_stage": 1, "minibatches_per_step": 2}, 5),
}


def scenario_groups(count: int) -> list[Group]:
    """A single group must not be the one with the invalid sample only; lengths differ from group to group."""
    return make_groups(count=count, seed=5)


def outcome(model: Path, name: str, **place: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of two updates and the weights after them."""
    options, count = SCENARIOS[name]
    groups = scenario_groups(count)
    learner = smooth_steps(build_learner(model, learning_rate=0.1, **place, **options))
    metrics = [learner.update(groups, grpo_advantages(groups)) for _ in range(2)]
    return metrics, weights_of(learner)


def skipped_together(model: Path, stage: int, **place: int) -> list[float]:
    """Skipped updates where only one rank's micro-batches have a bad gradient, and then where none has."""
    groups = scenario_groups(4)
    good = grpo_advantages(groups)
    bad = grpo_advantages(groups)
    bad.tokens[-1][0] = float("nan")
    learner = build_learner(model, zero_stage=stage, **place)
    return [learner.update(groups, each)["policy/skipped_updates"] for each in (bad, good)]


def main(rank: int, port: int, model: Path, output: Path) -> None:
    place = {"rank": rank, "ranks": RANKS, "port": port}
    results: dict[str, Any] = {name: outcome(model, name, **place) for name in SCENARIOS}
    results["skipped"] = {stage: skipped_together(model, stage, **place) for stage in (0, 1)}
    torch.save(results, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
