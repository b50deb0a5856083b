"""A tiny random model with a chat template, and responses whose outcome it can learn: right ones use low words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from learner_fixture import VOCABULARY, write_tiny_model, write_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<bos> ' + m['content'] + ' <bos> ' }}{% endfor %}"


def write_chat_model(folder: Path) -> Path:
    """Model and tokenizer in one folder; one token per word."""
    write_tiny_model(folder)
    write_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def write_rollouts(file: Path, prompts: int = 12, responses: int = 4, seed: int = 0) -> Path:
    """Rows of the layout `completions`: half of each prompt's responses are right; two lines each."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(prompts):
        texts, labels = [], []
        for i in range(responses):
            low, high = (3, VOCABULARY // 2) if i % 2 == 0 else (VOCABULARY // 2, VOCABULARY)
            lines = [" ".join(f"w{w}" for w in rng.integers(low, high, 4)) for _ in range(2)]
            texts.append("\n".join(lines))
            labels.append(i % 2 == 0)
        rows.append({"prompt": f"w{3 + p} w{4 + p}", "completions": texts, "correctness": labels})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
