"""`python -m rlkit.evaluate [RUN|CHECKPOINT|MODEL] [key=value ...]`: score a model's answers, with intervals.

python -m rlkit.evaluate FOLDER data=jsonl data.path=test.jsonl reward=rule evaluate.samples=16
python -m rlkit.evaluate runs/x checkpoints=all                  a curve, compared question by question
python -m rlkit.evaluate model=endpoint model.url=http://127.0.0.1:8000/v1 data=arithmetic
python -m rlkit.evaluate data=responses data.path=responses.jsonl reward=rule    recorded answers: nothing is sampled
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.assessment.command import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error, 2 for a wrong configuration, 130, 143."""
    return command("evaluate", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
