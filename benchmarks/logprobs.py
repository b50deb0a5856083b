"""Measures time and memory of the head's log-probs, forward and backward, at a large vocabulary, by chunk size.

    python benchmarks/logprobs.py --rows 1024      # vocabulary 151,936, hidden size 896, fp32, one thread

Each chunk size runs in a separate process. CPU seconds are the minimum over the repeats, because the machine may be
shared. Memory is the peak resident size minus that of weight, hidden states and their gradients, which every chunk size
needs. Prints one JSON line per chunk size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def measure(rows: int, vocabulary: int, width: int, elements: int, repeats: int, entropy: bool) -> dict[str, float]:
    import torch

    from rlkit.models.logprobs import selected_logprobs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward, backward = [], []
    for _ in range(repeats):
        began = time.process_time()
        logprobs, entropies = selected_logprobs(hidden, weight, targets, elements_per_chunk=elements)
        loss = logprobs.mean() + (0.01 * entropies.mean() if entropy else 0)
        forward.append(time.process_time() - began)
        began = time.process_time()
        loss.backward()
        backward.append(time.process_time() - began)
        hidden.grad = weight.grad = None
    gradients = 4 * width * (vocabulary + rows)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) - gradients
    return {
        "rows_per_chunk": min(rows, max(1, elements // vocabulary)),
        "forward_seconds": round(min(forward), 2),
        "backward_seconds": round(min(backward), 2),
        "extra_gib": round(peak / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--elements", type=int, nargs="*", default=[2**40, 2**26, 2**25, 2**24])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--entropy", action="store_true", help="with an entropy term in the loss")
    arguments = parser.parse_args()
    options = ["--rows", "--vocabulary", "--width", "--repeats"]
    if len(arguments.elements) == 1:
        print(
            json.dumps(
                measure(
                    arguments.rows,
                    arguments.vocabulary,
                    arguments.width,
                    arguments.elements[0],
                    arguments.repeats,
                    arguments.entropy,
                )
            )
        )
        return
    for elements in arguments.elements:
        command = [sys.executable, __file__, "--elements", str(elements), *["--entropy"][: arguments.entropy]]
        for option in options:
            command += [option, str(getattr(arguments, option[2:]))]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
