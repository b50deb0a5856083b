"""`python -m rlkit.generate [RUN|CHECKPOINT|MODEL] [key=value ...]`: generate answers to the questions of any data.

python -m rlkit.generate FOLDER data=jsonl data.path=questions.jsonl evaluate.samples=4
python -m rlkit.generate runs/x/checkpoints/step_000060

Takes the arguments of rlkit.evaluate except `reward` and `verifier`; writes the answers to RUN_DIR/samples.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.assessment.command import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, like rlkit.evaluate."""
    return command("generate", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
