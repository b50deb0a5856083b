"""Measures the peak memory of reading data: `python benchmarks/data_memory.py [MIB] [IN_MEMORY_MIB]`.

Makes a file of preference pairs of MIB mebibytes (1 to 3 kB a row), reads and renders it as a run does, draws prompts,
and prints the memory that the process used. At most IN_MEMORY_MIB of the data stay in memory (rlkit/data/stored.py).
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlkit.data import stored
from rlkit.data.conversations import render_recorded
from rlkit.data.order import PromptOrder
from rlkit.data.recorded import PairsSource

DRAWN = 2000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_rng = random.Random(0)
_WORDS = ["".join(_rng.choices("etaoinshrdlu", k=_rng.randint(2, 8))) for _ in range(3000)]
SENTENCES = [" ".join(_rng.choices(_WORDS, k=_rng.randint(5, 25))).capitalize() + "." for _ in range(2000)]


def write(path: Path, size: int) -> None:
    rng, written = random.Random(1), 0
    with path.open("w") as file:
        while written < size:
            row = {
                key: " ".join(rng.choices(SENTENCES, k=rng.randint(3, 11))) for key in ("prompt", "chosen", "rejected")
            }
            written += file.write(json.dumps(row) + "\n")


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    core.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[1])
    fast.chat_template = TEMPLATE
    return fast


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    if len(sys.argv) > 2:
        stored.IN_MEMORY_BYTES = int(sys.argv[2]) * 2**20
    fast = tokenizer()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        file = Path(folder) / "pairs.jsonl"
        write(file, size * 2**20)
        before, began = peak_mib(), time.monotonic()
        problems, _ = PairsSource(PairsSource.Config(path=str(file)), seed=0).load("train")
        read, middle = peak_mib(), time.monotonic()
        prompts, _ = render_recorded(problems, fast, [fast.eos_token_id], 4096, 4096)
        rendered, end = peak_mib(), time.monotonic()
        order = PromptOrder(prompts, 0)
        ids = [prompt.id for prompt in order.take(DRAWN)]
    print(
        f"{size} MiB, {len(prompts)} pairs; of a prompt {sum(len(p.token_ids) for p in prompts[:100]) / 100:.0f} tokens"
    )
    print(f"peak before {before:.0f} MiB; +{read - before:.0f} when read ({middle - began:.0f} s); ", end="")
    print(f"+{rendered - before:.0f} when rendered ({end - middle:.0f} s); +{peak_mib() - before:.0f} in the end")
    print(f"first ids {ids[:3]}, order {order.state_dict()['fingerprint'][:16]}")


if __name__ == "__main__":
    main()
