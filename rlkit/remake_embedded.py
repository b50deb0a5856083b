"""`python -m rlkit.remake_embedded [out=FOLDER] [scale=full|fast] [seed=0]`: make the embedded models from nothing.

Writes `policy/` and `polar/` (Hugging Face folders) and `report.json` into `out`, which is by default the package
itself. `docs/embedded.md` says how long it takes and what each number of the report means.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkit.embedded import EMBEDDED

USAGE_ERROR = 2
DEFAULTS = {"out": str(EMBEDDED), "scale": "full", "seed": "0"}
THREADS = 1
"""Two are hardly quicker for models this small, and sums then depend on how they are split."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 for arguments that mean nothing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    try:
        options = _options(given)
    except ValueError as error:
        print(f"rlkit: {error}", file=sys.stderr)
        return USAGE_ERROR
    remake(Path(options["out"]).expanduser(), options["scale"], int(options["seed"]))
    return 0


def _options(arguments: Sequence[str]) -> dict[str, str]:
    from rlkit.embedded.scale import SCALES

    options = dict(DEFAULTS)
    for argument in arguments:
        key, given, value = argument.partition("=")
        if not given or key not in options:
            raise ValueError(f"{argument}: not understood; write out=FOLDER, scale=full|fast or seed=NUMBER")
        options[key] = value
    if options["scale"] not in SCALES:
        raise ValueError(f"scale={options['scale']}: must be one of {', '.join(SCALES)}")
    if not options["seed"].isdecimal():
        raise ValueError(f"seed={options['seed']}: must be a whole number")
    return options


def remake(out: Path, scale_name: str, seed: int) -> dict[str, Any]:
    """Make tokenizer, policy and discriminator; returns the report that is written to `out/report.json`."""
    import torch

    from rlkit.data.arithmetic import draw_problems
    from rlkit.data.prompts import load_tokenizer
    from rlkit.embedded import polar_stages, stages
    from rlkit.embedded.sampling import PLAIN
    from rlkit.embedded.scale import SCALES
    from rlkit.learner.engine import init_process_group

    scale, started = SCALES[scale_name], time.monotonic()
    torch.set_num_threads(THREADS)
    if not torch.distributed.is_initialized():
        init_process_group(0, 1, "127.0.0.1", _free_port(), "cpu")
    train, heldout = draw_problems(scale.data, "train"), draw_problems(scale.data, "heldout")
    judged = heldout[: scale.judged_problems]
    report: dict[str, Any] = {"scale": scale_name, "seed": seed, "problem_seed": scale.data.problem_seed}
    seconds: dict[str, float] = {}

    def timed(stage: str) -> None:
        seconds[stage] = round(time.monotonic() - started - sum(seconds.values()), 1)

    with tempfile.TemporaryDirectory(prefix="rlkit_remake_") as temporary:
        work = Path(temporary)
        stages.make_tokenizer(train, scale, work / "tokenizer")
        report["base"] = stages.make_base(work / "tokenizer", train, scale, seed, work / "base")
        timed("base")
        report["policy"] = stages.make_policy(work / "base", train, scale, seed, work / "policy")
        report["policy"] |= stages.measure_policy(work / "policy", judged, seed)
        timed("policy")
        asked = train[: scale.trajectory_prompts]
        pool = stages.sample_pool(work / "base", train, asked, scale, seed, work / "variant")
        timed("pool")
        tokenizer = load_tokenizer(work / "tokenizer")
        report["polar_pretraining"] = polar_stages.pretrain(
            tokenizer, work / "base", asked, pool, scale, seed, work / "pretrained"
        )
        timed("polar_pretraining")
        # Fine-tuning candidates: what the training policies of the pool wrote, and the embedded policy itself.
        count = max(scale.policy_prompts, scale.trajectory_prompts)
        sampled = stages.answers_of(work / "policy", train[: scale.policy_prompts], 8, PLAIN, seed)
        sampled += [[] for _ in range(count - len(sampled))]
        for variant, answers in pool.items():
            if not variant.heldout:
                for place, texts in enumerate(answers):
                    sampled[place] = [*sampled[place], *texts]
        report["polar_finetuning"] = polar_stages.finetune(
            work / "pretrained", train[:count], sampled, scale, seed, work / "polar"
        )
        timed("polar_finetuning")
        answers = stages.answers_of(work / "policy", judged, 8, PLAIN, seed + 1)
        report["polar"] = polar_stages.measure_discriminator(work / "polar", judged, answers, seed)
        report["polar_pretrained_only"] = polar_stages.measure_discriminator(work / "pretrained", judged, answers, seed)
        timed("measures")
        for name in ("policy", "polar"):
            _replace(work / name, out / name)
            report[name]["parameters"], report[name]["bytes"], report[name]["sha256"] = _facts(out / name)
    report["seconds"] = seconds
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return report


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _replace(source: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def _facts(folder: Path) -> tuple[int, int, str]:
    """Number of parameters, bytes and SHA-256 of the weights."""
    from safetensors import safe_open

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return parameters, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
