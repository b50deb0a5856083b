"""Measures what a step costs driver and ranks besides the model's work, for 1 to 64 ranks with constant work per rank.

    python benchmarks/ranks.py                 # 2 groups x 16 samples x 1,024 tokens for each rank
    python benchmarks/ranks.py --ranks 8 64 --groups 4 --tokens 4096

Ranks are simulated one after another in this process; planning, serialisation and Ray's object store are real. The
algorithm is GRPO with 4 mini-batches. The columns are

- plan s: the driver plans the update (`policy_shares`) and the passes over all groups (`passes`);
- put s, MB: the driver puts the ranks' shares into the object store, and their size;
- rank get ms, MB: one rank fetches and unpickles its share (mean over ranks), and its size;
- rank tokens: tokens in one rank's forward passes of an update (the largest share), and for log-probs before it;
- before MB: what all ranks together received when each got the whole step (only the samples' arrays);
- before tokens: tokens of old log-probs when every rank computed all of them.

Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MINIBATCHES = 4


def make_groups(count: int, samples: int, tokens: int, prompt_tokens: int) -> list[Any]:
    import numpy as np

    from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score

    rng, groups = np.random.default_rng(0), []
    for g in range(count):
        responses = [
            Sample(
                index=i,
                token_ids=rng.integers(0, 150_000, length).astype(np.int32),
                logprobs=rng.standard_normal(length).astype(np.float32),
                text="",
                finish_reason="stop",
                policy_versions=(0, 0),
                seed=i,
            )
            for i, length in enumerate(rng.integers(tokens // 2, tokens + tokens // 2, samples).tolist())
        ]
        prompt = Prompt(f"p{g}", (Message("user", "?"),), tuple(rng.integers(0, 150_000, prompt_tokens).tolist()))
        scores = GroupScores(tuple(Score(float(rng.integers(0, 2))) for _ in range(samples)))
        groups.append(Group(f"g{g}", prompt, tuple(responses)).with_scores(scores))
    return groups


def measure(ray: Any, ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    from algorithms.base import Experience
    from algorithms.grpo import GRPO
    from rlkit.config.schema import LearnerConfig
    from rlkit.learner.batches import Microbatch
    from rlkit.learner.dealing import passes, policy_shares

    groups = make_groups(arguments.groups * ranks, arguments.samples, arguments.tokens, arguments.prompt_tokens)
    algorithm = GRPO(GRPO.Config(samples_per_prompt=arguments.samples))
    advantages = algorithm.advantages(Experience(groups, 1))
    config = LearnerConfig(
        ranks=ranks, minibatches_per_step=min(MINIBATCHES, len(groups)), tokens_per_microbatch=arguments.limit
    )
    began = time.perf_counter()
    shares, _ = policy_shares(groups, advantages, config, algorithm.needs())
    work = passes(groups, config)
    planned = time.perf_counter()
    references = [(ray.put(share), ray.put(of_rank)) for share, of_rank in zip(shares, work.microbatches, strict=True)]
    put = time.perf_counter()
    for pair in references:
        ray.get(list(pair))
    fetched = time.perf_counter()

    def tokens(microbatches: list[Microbatch]) -> int:
        return sum(sum(map(len, m.prompts)) + len(m.token_ids) for m in microbatches)

    of_update = [tokens([m for minibatch in s.minibatches for m, _ in minibatch.microbatches]) for s in shares]
    of_passes = [tokens(list(of_rank)) for of_rank in work.microbatches]
    sent = [len(pickle.dumps(pair, protocol=5)) for pair in zip(shares, work.microbatches, strict=True)]
    return {
        "plan": planned - began,
        "put": put - planned,
        "sent": sum(sent) / 1e6,
        "get": 1e3 * (fetched - put) / ranks,
        "share": max(sent) / 1e6,
        "update tokens": max(of_update),
        "pass tokens": max(of_passes),
        "before": ranks * len(pickle.dumps((groups, advantages), protocol=5)) / 1e6,
        "before tokens": sum(of_passes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--groups", type=int, default=2, help="for each rank")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="mean length of a response")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, default=16384, help="tokens per micro-batch")
    arguments = parser.parse_args()
    import ray

    ray.init(num_cpus=1, object_store_memory=2 * 2**30, include_dashboard=False, log_to_driver=False)
    print("| ranks | plan s | put s | put MB | rank get ms | rank MB | rank tokens, update | rank tokens, log-probs |"
          " before: MB | before: rank tokens, log-probs |")  # fmt: skip
    print("|---" * 10 + "|")
    for ranks in [arguments.ranks[0], *arguments.ranks]:  # the first is run twice, to warm up
        row = measure(ray, ranks, arguments)
        if ranks in arguments.ranks:
            print(
                f"| {ranks} | {row['plan']:.3f} | {row['put']:.3f} | {row['sent']:.1f} | {row['get']:.2f} "
                f"| {row['share']:.2f} | {row['update tokens']:,} | {row['pass tokens']:,} | {row['before']:,.0f} "
                f"| {row['before tokens']:,} |"
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
