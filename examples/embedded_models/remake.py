"""Make the embedded models.

    python -m examples.embedded_models.remake [out=FOLDER] [scale=full|fast] [seed=0] [work=FOLDER] [only=agent]

Writes `policy/`, `polar/` and `agent/` (Hugging Face folders) and `report.json` into `out`, which is by default the
package itself. With `only=agent` it writes only the agent and its part of the report. `docs/embedded.md` says how long
it takes and what each number of the report means. `work` keeps the stages' results; a stage whose result is already
there is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.cluster.processes import free_port
from rlkit.models.folder import EMBEDDED

if TYPE_CHECKING:
    from examples.embedded_models.scale import Scale

USAGE_ERROR = 2
DEFAULTS = {"out": str(EMBEDDED), "scale": "full", "seed": "0", "work": "", "only": ""}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for bad arguments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        options = _options(words)
    except ValueError as error:
        print(f"rlkit: {error}", file=sys.stderr)
        return USAGE_ERROR
    out, work = (Path(options[name]).expanduser() for name in ("out", "work"))
    make = remake_agent if options["only"] else remake
    if options["work"]:
        work.mkdir(parents=True, exist_ok=True)
        make(out, options["scale"], int(options["seed"]), work)
    else:
        with tempfile.TemporaryDirectory(prefix="rlkit_remake_") as temporary:
            make(out, options["scale"], int(options["seed"]), Path(temporary))
    return 0


def _options(arguments: Sequence[str]) -> dict[str, str]:
    from examples.embedded_models.scale import SCALES

    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in options:
            raise ValueError(
                f"{argument}: not understood; write out=FOLDER, scale=full|fast, seed=NUMBER, work=FOLDER or only=agent"
            )
        options[key] = value
    if options["scale"] not in SCALES:
        raise ValueError(f"scale={options['scale']}: must be one of {', '.join(SCALES)}")
    if options["only"] not in ("", "agent"):
        raise ValueError(f"only={options['only']}: must be agent")
    if not options["seed"].isdecimal():
        raise ValueError(f"seed={options['seed']}: must be a whole number")
    return options


class _Stages:
    """Keeps the result of each stage as `work/<name>.json`, next to its files."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, stage: Callable[[], Any]) -> Any:
        """Return the stage's result as read from JSON; compute it only if it is missing."""
        file = self.work / f"{name}.json"
        if file.is_file():
            kept = json.loads(file.read_text())
        else:
            started = time.monotonic()
            result = stage()
            kept = {"seconds": round(time.monotonic() - started, 1), "result": result}
            file.write_text(json.dumps(kept))
        self.seconds[name] = kept["seconds"]
        return kept["result"]


def remake(out: Path, scale_name: str, seed: int, work: Path) -> dict[str, Any]:
    """Make tokenizer, policy, discriminator and agent. Return the report in `out/report.json`."""
    from examples.embedded_models import polar_stages, stages
    from examples.embedded_models.sampling import PLAIN
    from examples.embedded_models.scale import SCALES
    from rlkit.data.arithmetic import draw_problems

    scale, stage = SCALES[scale_name], _Stages(work)
    _one_process()
    train, heldout = draw_problems(scale.data, "train"), draw_problems(scale.data, "heldout")
    judged, asked, labelled = (
        heldout[: scale.judged_problems],
        train[: scale.trajectory_prompts],
        train[: scale.policy_prompts],
    )
    tokenizer, base, policy, variant, pretraining, finetuning = (
        work / name for name in ("tokenizer", "base", "policy", "variant", "pretraining", "finetuning")
    )
    pretrained, polar = pretraining / "whole" / "model", finetuning / "whole" / "model"
    count = stages.ANSWERS_PER_PROBLEM

    stage("tokenizer", lambda: stages.make_tokenizer(train, scale, tokenizer))
    report: dict[str, Any] = {"scale": scale_name, "seed": seed, "problem_seed": scale.data.problem_seed}
    report["base"] = stage("base", lambda: stages.make_base(tokenizer, train, scale, seed, base))
    report["policy"] = stage("policy", lambda: stages.make_policy(base, train, scale, seed, policy))
    report["policy"] |= stage("policy_measures", lambda: stages.measure_policy(policy, judged, seed))
    pool = stage("pool", lambda: stages.sample_pool(base, train, asked, scale, seed, variant))
    sampled = stage("policy_samples", lambda: stages.answers_of(policy, labelled, count // 2, PLAIN, seed))
    report["polar_pretraining"] = stage(
        "polar_pretraining", lambda: polar_stages.pretrain(base, asked, pool, scale, seed, pretraining)
    )
    candidates = polar_stages.with_trajectories(sampled, pool, scale)
    report["polar_finetuning"] = stage(
        "polar_finetuning",
        lambda: polar_stages.finetune(pretrained, labelled, candidates, judged, scale, seed, finetuning),
    )
    answers = stage("heldout_samples", lambda: stages.answers_of(policy, judged, count, PLAIN, seed + 1))

    def measured(name: str, model: Path) -> Any:
        folder = work / name
        return stage(name, lambda: polar_stages.measure_discriminator(model, judged, answers, seed, folder))

    report["polar"] = measured("polar_measures", polar)
    report["polar_pretraining"]["measures"] = measured("pretrained_measures", pretrained)
    for name, folder in (("policy", policy), ("polar", polar)):
        _replace(folder, out / name)
        report[name] |= _facts(out / name)
    report["agent"] = _agent(out, scale, seed, work, stage)
    report["seconds"] = stage.seconds
    report["wall_seconds"] = round(sum(stage.seconds.values()), 1)
    return _reported(report, out)


def remake_agent(out: Path, scale_name: str, seed: int, work: Path) -> dict[str, Any]:
    """Make the agent. Return the report in `out/report.json`; its other parts stay unchanged."""
    from examples.embedded_models.scale import SCALES

    stage = _Stages(work)
    _one_process()
    file = out / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {"scale": scale_name, "seed": seed, "seconds": {}}
    report["agent"] = _agent(out, SCALES[scale_name], seed, work, stage)
    report["seconds"] |= stage.seconds
    return _reported(report, out)


def _agent(out: Path, scale: Scale, seed: int, work: Path, stage: _Stages) -> dict[str, Any]:
    from examples.embedded_models import agent_stages

    tokenizer, base, agent = (work / name for name in ("agent_tokenizer", "agent_base", "agent"))
    stage("agent_tokenizer", lambda: agent_stages.make_tokenizer(seed, tokenizer))
    report: dict[str, Any] = {"base": stage("agent_base", lambda: agent_stages.make_base(tokenizer, scale, seed, base))}
    report |= stage("agent", lambda: agent_stages.make_agent(base, scale, seed, agent))
    report |= stage("agent_measures", lambda: agent_stages.measure_agent(agent, scale, seed))
    _replace(agent, out / "agent")
    return report | _facts(out / "agent")


def _one_process() -> None:
    import torch

    from examples.embedded_models import stages
    from rlkit.learner.engine import init_process_group

    torch.set_num_threads(stages.THREADS)
    if not torch.distributed.is_initialized():
        init_process_group(0, 1, "127.0.0.1", free_port(), "cpu")


def _reported(report: dict[str, Any], out: Path) -> dict[str, Any]:
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return report


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def _facts(folder: Path) -> dict[str, Any]:
    """Return facts about the weights."""
    from safetensors import safe_open

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"parameters": parameters, "bytes": file.stat().st_size, "sha256": digest}


if __name__ == "__main__":
    sys.exit(main())
