"""Times attention, forward and backward, with a group's prompt computed once and with it computed for each sample.

    python benchmarks/attention.py     # the shapes of W1 and W2 (benchmarks/speed.py), and of a long prompt

Also gives the queries and keys that attention holds, including padding, as multiples of the packed tokens. Prints a
JSON line for each shape. Both ways alternate, and seconds are the minimum CPU time over all repeats, because the
machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlkit.models import packing
from rlkit.models.attention import packed_attention

SHAPES = {
    # prompts, prompt tokens, samples, mean and maximum response tokens, heads, key heads, head width
    "demo": (8, 7, 8, 6, 12, 4, 4, 32),
    "W1": (8, 60, 8, 26, 32, 4, 4, 32),
    "W2": (8, 60, 8, 80, 256, 12, 12, 32),
    "even": (4, 512, 8, 512, 512, 4, 4, 32),
    "long answer": (4, 60, 8, 256, 256, 4, 4, 32),
    "long": (1, 2048, 16, 128, 128, 8, 2, 64),
}


def trees(prompts: int, prompt: int, samples: int, mean: int, most: int) -> list[packing.Tree]:
    rng = np.random.default_rng(0)
    draw = (lambda: most) if mean == most else (lambda: int(min(most, 1 + rng.geometric(1 / mean))))
    return [packing.Tree(range(prompt), [range(draw()) for _ in range(samples)]) for _ in range(prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.shapes:
        *sizes, heads, key_heads, width = SHAPES[name]
        batches = {}
        for way, least in (("once", 1), ("each", 10**9)):
            packing.LEAST_SHARED_PREFIX = least
            batches[way] = packing.pack(trees(*sizes))
            batches[way].buckets  # noqa: B018 - decided now
        tokens = len(batches["once"].token_ids)
        tensors = [torch.randn(1, h, tokens, width, requires_grad=True) for h in (heads, key_heads, key_heads)]
        times: dict[str, list[float]] = {way: [] for way in batches}
        outputs = {}
        for _ in range(arguments.repeats + 1):
            for way, batch in batches.items():
                began = time.process_time()
                output, _none = packed_attention(torch.nn.Identity(), *tensors, None, packed=batch)
                gradients = torch.autograd.grad(output.square().sum(), tensors)
                times[way].append(time.process_time() - began)
                outputs[way] = (output, *gradients)
        result = {"shape": name, "tokens": tokens}
        for way, batch in batches.items():
            result |= {
                f"{way}_seconds": round(min(times[way][1:]), 5),
                f"{way}_queries": round(sum(b.queries.numel() for b in batch.buckets) / tokens, 2),
                f"{way}_keys": round(sum(b.keys.numel() for b in batch.buckets) / tokens, 2),
                f"{way}_calls": len(batch.buckets),
            }
        result["difference"] = max(
            float(((a - b).abs().max() / b.abs().max()).detach())
            for a, b in zip(outputs["once"], outputs["each"], strict=True)
        )
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
