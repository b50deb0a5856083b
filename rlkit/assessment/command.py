"""Runs `rlkit.evaluate` and `rlkit.generate`, from their arguments to an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rich.console import Console

from rlkit.assessment.config import Evaluating, load_evaluation
from rlkit.assessment.schema import EvaluateConfig, EvaluatedModel, EvaluateRun
from rlkit.config.command import asks_for_help, exit_code, print_warnings, split_off_file
from rlkit.config.help import print_section
from rlkit.config.messages import all_fields
from rlkit.config.report import problems_if_few
from rlkit.config.schema import RolloutConfig
from rlkit.data.base import DataSource

MARKDOWN = "--markdown"
HELP_END = """
  data=NAME, reward=NAME, verifier=NAME, environment=NAME, rollout.KEY, cluster.KEY and --config FILE are the same
  as for rlkit.train (python -m rlkit.train --help lists them). The reward judges; with verifier=NAME, the verifier
  judges and the reward chooses the best of k answers. --markdown prints Markdown tables."""


def command(name: str, usage: str | None, arguments: Sequence[str] | None) -> int:
    return exit_code(lambda words: _run(name, usage or "", words), arguments, has_dry_run=True)


def _run(name: str, usage: str, words: list[str]) -> int:
    if asks_for_help(words):
        _print_help(usage)
        return 0
    file, overrides = split_off_file([word for word in words if word != MARKDOWN])
    evaluating = load_evaluation(overrides, file, judged=name == "evaluate")
    if evaluating.config.dry_run:
        print_warnings(evaluating.warnings)
        print(_plan(evaluating))
        print("The configuration is valid; nothing was started (dry_run=true).")
        return 0
    from rlkit.assessment.run import evaluate

    return evaluate(evaluating, name, markdown=MARKDOWN in words)


def _print_help(usage: str) -> None:
    console = Console()
    console.print(usage + HELP_END, highlight=False, markup=False)
    own = [(name, EvaluateRun.model_fields[name]) for name in ("run", "checkpoints", "run_dir", "resume", "seed")]
    print_section(console, "What is evaluated", "", own, {"run_dir": ("runs/TIME_evaluate_MODEL_DATA", "")})
    print_section(console, "evaluate", EvaluateConfig.__doc__ or "", all_fields(EvaluateConfig, "evaluate."))
    print_section(console, "model", EvaluatedModel.__doc__ or "", all_fields(EvaluatedModel, "model."))
    print_section(console, "rollout", "", all_fields(RolloutConfig, "rollout."))


def _plan(evaluating: Evaluating) -> str:
    config = evaluating.config
    lines = [f"answers from {policy.path or 'the data'} (step {policy.step})" for policy in evaluating.policies]
    if evaluating.kind != "recorded":
        ways = [f"{config.evaluate.samples} sampled"] * bool(config.evaluate.samples)
        most, data, source = config.evaluate.questions, evaluating.data.cls, evaluating.source()
        held_out = evaluating.own_questions or data.load_set is DataSource.load_set
        known = len(problems_if_few(source, partial(source.load, "heldout") if held_out else source.load_set))
        if not known:
            count = f"at most {most}" if most else "all"
        else:
            count = f"{most} of {known}" if most and most < known else f"all {known}"
        questions = "held-out questions" if held_out else "questions"
        lines.append(f"asked: {count} {questions} of {data.__name__}")
        lines.append(f"to each question: {' and '.join([*ways, *(['1 greedy'] * config.evaluate.greedy)])}")
    for name, one in evaluating.sets.items():
        lines.append(f"also asked: evaluation.sets.{name} ({one.prompts or 'all'} questions)")
    for part, what in ((evaluating.judge, "judged by"), (evaluating.chooser, "best of k chosen by")):
        if part is not None:
            lines.append(f"{what} {part.cls.__name__}")
    return "\n".join([*lines, f"written to {config.run_dir}"])
