"""Makes the embedded POLAR discriminator, by stages of `python -m rlkit.train_reward reward=polar`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from examples.embedded_models.pairs import correctness, final_answers, is_right, labelled_triplets, last_line, phrasing
from examples.embedded_models.scale import Scale, Training
from examples.embedded_models.stages import THREADS, Measures, warmup_steps
from rewards.polar.triplets import Triplet, expected_accuracy, write_triplets
from rlkit.config.overrides import quoted
from rlkit.data.arithmetic import STYLES, WordProblem, write_solution

AnswersByName = Mapping[str, Sequence[Sequence[str]]]
"""Variant -> its two answers to each prompt."""


class StageFailed(RuntimeError):
    """A command of `rlkit.train_reward` failed, with the reason on the screen."""


def train_reward(run_dir: Path, stage: str, seed: int, **keys: Any) -> dict[str, Any]:
    """Run `rlkit.train_reward reward=polar` with these keys (`data__path` is `data.path`). Return its summary.

    Raise StageFailed if it fails.
    """
    from rlkit import train_reward as command

    options = {"stage": stage, "seed": seed, "threads": THREADS, "run_dir": run_dir, **keys}
    arguments = ["reward=polar", *(f"{name.replace('__', '.')}={_value(value)}" for name, value in options.items())]
    print("  rlkit.train_reward", *arguments, flush=True)
    code = command.main(arguments)
    if code:
        raise StageFailed(f"rlkit.train_reward {' '.join(arguments)}: exit code {code}")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def with_trajectories(sampled: Sequence[Sequence[str]], answers: AnswersByName, scale: Scale) -> list[list[str]]:
    """Return, per problem, the embedded policy's answers and those of the pool's training policies, if any."""
    candidates = [list(texts) for texts in sampled]
    for variant in scale.pool:
        if not variant.heldout:
            for own, texts in zip(candidates, answers[variant.name], strict=False):
                own += texts
    return candidates


def pretrain(
    base: Path, problems: Sequence[WordProblem], answers: AnswersByName, scale: Scale, seed: int, work: Path
) -> Measures:
    """Train to distinguish the pool's training policies (equation 7); measure on the held-out ones.

    Starts from the language model `base`: first only on last lines, then on whole answers, into `work/whole/model`.
    """
    _make_empty(work)
    heldout = [variant.name for variant in scale.pool if variant.heldout]
    summaries, start = [], base
    for name, training in (("last_lines", scale.pretrain_last_lines), ("whole", scale.pretrain)):
        file = work / f"{name}.jsonl"
        _write_rows(file, _trajectories(problems, answers, scale, last_lines=name == "last_lines"))
        rows = {"data__path": file, "data__heldout_path": file, "data__style_column": "style"}
        options = {"reward__heldout_policies": heldout, **_options(start, training)}
        summaries.append(train_reward(work / name, "pretrain", seed, **rows, **options))
        start = work / name / "model"
    errors = {variant: 1 - float(correctness(problems, answers[variant.name]).mean()) for variant in scale.pool}
    measured = {
        name.removeprefix("after/same_versus_different_"): value
        for name, value in summaries[-1].items()
        if name.startswith("after/same_versus_different_")
    }
    return {
        "steps": sum(summary["steps"] for summary in summaries),
        "first_loss": summaries[0]["first_loss"],
        "last_loss": summaries[-1]["last_loss"],
        "policies": {
            variant.name: {"error_rate": round(error, 4), "heldout": variant.heldout}
            for variant, error in errors.items()
        },
        "heldout_policies": {
            "triplets": measured["triplets"],
            "same_versus_different_accuracy": measured["accuracy"],
            "attainable": measured["attainable"],
            "attainable_from_error_rates": expected_accuracy({v: e for v, e in errors.items() if v.heldout}, phrasing),
        },
    }


def finetune(
    start: Path,
    problems: Sequence[WordProblem],
    sampled: Sequence[Sequence[str]],
    judged: Sequence[WordProblem],
    scale: Scale,
    seed: int,
    work: Path,
) -> Measures:
    """Train to tell right from wrong with the gold solution as reference (equation 8), into `work/whole/model`.

    First only on last lines, then on whole answers; `judged` are the held-out problems.
    """
    _make_empty(work)
    heldout = work / "heldout.jsonl"
    written = labelled_triplets(judged, [[] for _ in judged], seed)
    write_triplets(chain.from_iterable(islice(written, len(judged))), heldout)
    summaries = []
    for name, training, groups in (
        ("last_lines", scale.finetune_last_lines, final_answers(problems, seed)),
        ("whole", scale.finetune, labelled_triplets(problems, sampled, seed)),
    ):
        file = work / f"{name}.jsonl"
        write_triplets(islice(chain.from_iterable(groups), training.steps * training.batch), file)
        rows = {"data__path": file, "data__heldout_path": heldout}
        options = _options(start, training)
        summaries.append(train_reward(work / name, "finetune", seed, **rows, **options))
        start = work / name / "model"
    return {
        "steps": sum(summary["steps"] for summary in summaries),
        "first_loss": summaries[0]["first_loss"],
        "last_loss": summaries[-1]["last_loss"],
    }


def measure_discriminator(
    model: Path, problems: Sequence[WordProblem], sampled: Sequence[Sequence[str]], seed: int, work: Path
) -> Measures:
    """Measure right-versus-wrong accuracy on held-out problems: for answers written by rule, in the reference's
    phrasing and in another; and for sampled answers against the first reference, as `reward=polar` compares them."""
    _make_empty(work)
    nothing: list[list[str]] = [[] for _ in problems]
    measures: Measures = {"problems": len(problems)}
    for name, groups in (
        ("same_phrasing", islice(labelled_triplets(problems, nothing, seed, crossed=False), len(problems))),
        ("crossed_phrasing", islice(labelled_triplets(problems, nothing, seed, crossed=True), len(problems))),
        ("policy_samples", _sampled_pairs(problems, sampled)),
    ):
        file = work / f"{name}.jsonl"
        write_triplets(chain.from_iterable(groups), file)
        summary = train_reward(work / name, "evaluate", seed, data__path=file, reward__model_path=model)
        measures[f"right_versus_wrong_{name}"] = summary["right_versus_wrong_accuracy"]
    return measures


def _options(start: Path, training: Training) -> dict[str, Any]:
    """AdamW with a short warm-up and cosine decay to 3 %."""
    return {
        "reward__model_path": start,
        "reward__steps": training.steps,
        "reward__batch_size": training.batch,
        "reward__learning_rate": training.learning_rate,
        "reward__warmup_share": warmup_steps(training.steps) / training.steps,
        "reward__min_learning_rate_ratio": 0.03,
        "reward__tokens_per_microbatch": 8192,
    }


def _trajectories(
    problems: Sequence[WordProblem], answers: AnswersByName, scale: Scale, last_lines: bool
) -> Iterator[dict[str, Any]]:
    for index, problem in enumerate(problems):
        for variant in scale.pool:
            for text in answers[variant.name][index]:
                yield {
                    "prompt": problem.question,
                    "policy": variant.name,
                    "style": phrasing(variant),
                    "response": last_line(text) if last_lines else text,
                }


def _sampled_pairs(problems: Sequence[WordProblem], sampled: Sequence[Sequence[str]]) -> Iterator[list[Triplet]]:
    """Yield all (right, wrong) pairs of a problem's distinct sampled answers."""
    for problem, texts in zip(problems, sampled, strict=True):
        reference = write_solution(problem.steps, problem.thing, STYLES[0])
        distinct = list(dict.fromkeys(texts))
        right = [text for text in distinct if is_right(text, problem.answer)]
        wrong = [text for text in distinct if not is_right(text, problem.answer)]
        yield [Triplet(problem.question, reference, a, b) for a in right for b in wrong]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _value(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_value, value)) + "]"
    return quoted(str(value))
