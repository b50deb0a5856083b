"""Runs an evaluation from a checked configuration to results.json: answers are written as they are judged, and every
number is computed from what was written."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import yaml

from rlkit.assessment.benchmark import labelled, standing
from rlkit.assessment.config import Evaluating, Policy
from rlkit.assessment.measures import changed, differences, lines_of, measured
from rlkit.assessment.questions import data_hash, load_questions, load_recorded
from rlkit.assessment.report import Findings, results
from rlkit.assessment.rows import (
    LONG,
    Asked,
    Decoding,
    Row,
    answer_rows,
    answered,
    causes,
    cut_to_whole_lines,
    read_rows,
    written_rows,
)
from rlkit.assessment.sources import Answers, Machinery, machinery, recorded
from rlkit.cluster.waiting import blocking
from rlkit.config.command import print_error
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.config.parts import OWN, Part
from rlkit.experience import Group, GroupScores, Prompt, Score, UserError
from rlkit.experience.scores import RewardFailed
from rlkit.rollout.requests import GroupRequest
from rlkit.saving import Stop
from rlkit.supervision import supervised
from rlkit.tracking.progress import printable
from rlkit.tracking.run_folder import RunFolder, write_atomically
from rlkit.tracking.tracker import Tracker
from rlkit.view.rows import said

END_SECONDS = 120.0
"""Time limit for actors, threads and Ray to end."""
MOST_AT_ONCE = 64
"""Groups in one call of a judge."""
SHOWN = 3
"""Number of answers printed if nobody judges them."""
MESSAGES = 8
"""Progress messages on the screen per model."""


def evaluate(evaluating: Evaluating, command: str = "evaluate", *, markdown: bool = False) -> int:
    """Run the evaluation. Returns 0, or after a message 1 (an error), 130 (Ctrl-C) or 143 (SIGTERM)."""
    config, resumes = evaluating.config, evaluating.config.resume == "auto"
    try:
        folder = RunFolder(config.run_dir, resume=resumes)
        if resumes and folder.config.exists():
            _refuse_another(folder, evaluating)
        cut_to_whole_lines(folder.samples)
    except ConfigError as error:
        return print_error(error)
    except UserError as error:
        return print_error(error)
    folder.write_config(evaluating.text(command))
    found: list[Findings] = []

    async def work(tracker: Tracker, closing: contextlib.ExitStack) -> None:
        try:
            found.extend(await _evaluate(evaluating, folder, tracker))
        finally:
            closing.enter_context(blocking("the end", "actors and threads", END_SECONDS, "END_SECONDS"))

    console = "plain" if config.tracking.console in ("auto", "live") else config.tracking.console
    tracking = config.tracking.model_copy(update={"console": console})
    code = supervised(
        folder,
        lambda: Tracker(tracking, folder, total_steps=max(policy.step for policy in evaluating.policies)),
        config.trainer.report_waits_after,
        evaluating.warnings,
        work,
    )
    if found and evaluating.judge is None and evaluating.kind != "recorded":
        for row in islice(written_rows(folder.path), SHOWN):
            print(f"\n{printable(said(row['prompt'], last=True))}\n  {printable(row['response'])}")
        print(f"\n{sum(one.answers for of_set in found for one in of_set.measured)} answers are in {folder.samples}")
    elif found:
        report = "\n\n".join(one.markdown() if markdown else one.text() for one in found)
        print(f"\n{report}\n\n{folder.path}/results.json has all numbers, samples.jsonl every answer.")
    elif folder.samples.exists() and folder.samples.stat().st_size:
        again = f"run_dir={folder.path} resume=auto"
        print(f"The answers so far are kept; to continue, run the same command with {again}", file=sys.stderr)
    return code


async def _evaluate(evaluating: Evaluating, folder: RunFolder, tracker: Tracker) -> list[Findings]:
    """Return the findings of each set, those of the main questions first."""
    task, began = asyncio.current_task(), time.time()
    assert task is not None
    stop = Stop(task)
    tracker.phase("reading data")
    asked, groups = _read(evaluating, tracker)
    rows = read_rows(folder.path, LONG)
    folder.keep_only({folder.samples.name: folder.samples.stat().st_size})  # its metrics are computed again
    with contextlib.ExitStack() as session:
        try:
            async with machinery(evaluating, folder, tracker, session) as machine:
                with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
                    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has replaced the handler of the first
                        asyncio.get_running_loop().add_signal_handler(number, stop.on, number)
                if evaluating.kind == "recorded":
                    await _judge_recorded(machine, _left(groups, rows))
                for policy in evaluating.policies if evaluating.kind != "recorded" else ():
                    await _ask(machine, policy, asked, rows)
        except asyncio.CancelledError:
            stop.check()  # raises it by its name
            raise
    rows = read_rows(folder.path, LONG)
    found = [findings(evaluating, rows, name) for name in asked]
    data = {name: {"sha256": data_hash(prompts), "questions": len(prompts)} for name, prompts in asked.items()}
    own = found[0].measured
    if evaluating.judge is not None or evaluating.kind == "recorded":
        for one in own:
            if one.line.decoding != "greedy" or len({m.line.decoding for m in own}) == 1:
                beside = [m for some in found for m in some.measured if m.line.step == one.line.step and m is not one]
                metrics = {name: value for m in beside for name, value in m.metrics().items()}
                tracker.evaluation(one.line.step, one.headline, {**metrics, **one.metrics()})
    write_atomically(folder.path / "results.json", results(found, evaluating.plain(), data))
    summary = {"kind": "evaluation", "wall_seconds": round(time.time() - began, 3), "answers": len(rows)}
    folder.write_summary({**summary, "mean": own[-1].mean.value})
    return found


def findings(evaluating: Evaluating, rows: Sequence[Row], name: str = OWN) -> Findings:
    """Compute the findings of a set. Raises RewardFailed if none of its answers was judged."""
    rows = [row for row in rows if row.get("set", OWN) == name]
    why = causes(rows)
    found = [measured(line, evaluating.chooser is not None) for line in lines_of(rows, name)]
    if evaluating.judge is not None and not any(one.mean.questions for one in found):
        counted = ", ".join(f"{count} x {kind}" for kind, count in why.items())
        example = next((row["unjudged"] for row in rows if row.get("unjudged")), "")
        raise RewardFailed(f"no answer could be judged: {counted}; for example {example}")
    compared = []
    for decoding in dict.fromkeys(one.line.decoding for one in found):
        first, *others = [one.line for one in found if one.line.decoding == decoding]
        compared += [(f"step {first.step}", line, own) for line, own in differences(first, others)]
    unlike: set[str] = set()
    if (named := evaluating.config.evaluate.against) is not None:
        for theirs in lines_of(read_rows(named, LONG), name):
            ours = [
                one.line for one in found if (one.line.decoding, one.line.graded) == (theirs.decoding, theirs.graded)
            ]
            compared += [(f"{named}, step {theirs.step}", line, own) for line, own in differences(theirs, ours)]
            unlike.update(*(changed(theirs, line) for line in ours))
    names = _judge_name(evaluating), _name(evaluating.chooser)
    other_questions = {str(named): len(unlike)} if unlike else {}
    return Findings(found, compared, *names, why, standing(evaluating, rows), name, other_questions)


def _read(evaluating: Evaluating, tracker: Tracker) -> tuple[dict[str, Sequence[Prompt]], Sequence[Group]]:
    """Return the questions by set, and recorded answers."""
    if evaluating.kind != "recorded":
        return load_questions(evaluating, tracker), ()
    groups = load_recorded(evaluating, tracker)
    return {OWN: [group.prompt for group in groups]}, groups


def _left(groups: Sequence[Group], rows: Sequence[Row]) -> list[Group]:
    done = answered(rows)
    return [replace(group, step=0) for group in groups if (0, group.id) not in done]


async def _judge_recorded(machine: Machinery, groups: Sequence[Group]) -> None:
    machine.tracker.phase(f"judging {sum(len(group.samples) for group in groups)} recorded answers")
    await _write(machine, 0, {group.id: (OWN, "recorded") for group in groups}, recorded(groups))


async def _ask(
    machine: Machinery, policy: Policy, prompts: Mapping[str, Sequence[Prompt]], rows: Sequence[Row]
) -> None:
    """Sample and judge the answers that are still missing."""
    requests, asked = requested(machine.evaluating, policy, prompts)
    done = answered(rows)
    theirs = {str(row["group_id"]): row["prompt_id"] for row in rows if int(row["step"]) == policy.step}
    for request in requests:
        if theirs.get(request.id, request.prompt.id) != request.prompt.id:
            raise UserError(f"the data have changed since {request.id} was answered: name another run_dir")
    left = [request for request in requests if (policy.step, request.id) not in done]
    if not left:
        return
    async with machine.answers(policy) as answers:
        machine.tracker.phase(f"step {policy.step}: {len(left)} x {left[0].samples} answers")
        await _write(machine, policy.step, asked, answers.generate(left), answers)


def requested(
    evaluating: Evaluating, policy: Policy, prompts: Mapping[str, Sequence[Prompt]]
) -> tuple[list[GroupRequest], dict[str, Asked]]:
    """Return the requests to a model for all sets, and for each group its set and how it is answered."""
    config, requests, asked = evaluating.config, list[GroupRequest](), dict[str, Asked]()
    ways: list[tuple[Decoding, int, float | None, str]] = []
    if config.evaluate.samples:
        ways.append(("sampled", config.evaluate.samples, None, ""))
    if config.evaluate.greedy:
        ways.append(("greedy", 1, 0.0, "greedy-"))
    for decoding, samples, temperature, word in ways:
        for name, of_set in prompts.items():
            start = f"evaluation-{policy.step}-{f'{name}.' * bool(name)}{word}"
            for i, prompt in enumerate(of_set):
                one = GroupRequest(f"{start}{i}", prompt, samples, config.seed, policy.step, temperature=temperature)
                requests.append(one)
                asked[one.id] = (name, decoding)
    return requests, asked


async def _write(
    machine: Machinery,
    step: int,
    asked: Mapping[str, Asked],
    stream: AsyncIterator[list[Group]],
    answers: Answers | None = None,
) -> None:
    """Judge groups as they come, with several calls in parallel, and write their rows."""
    waiting: asyncio.Queue[Group | None] = asyncio.Queue()
    judge, evaluating = machine.evaluating.judge, machine.evaluating
    lengths, failures = ({}, {}) if answers is None else (answers.lengths, answers.failures)
    written, total, began = 0, max(1, len(asked)), time.monotonic()

    async def sample() -> None:
        async for groups in stream:
            for group in groups:
                waiting.put_nowait(group)
        waiting.put_nowait(None)

    async def score() -> None:
        nonlocal written
        while (first := await waiting.get()) is not None:
            groups = [first]
            while len(groups) < MOST_AT_ONCE and not waiting.empty():
                if (another := waiting.get_nowait()) is None:
                    waiting.put_nowait(None)
                    break
                groups.append(another)
            judged, *chosen = await asyncio.gather(*(one.judge(_known(groups, evaluating)) for one in machine.judges))
            for i, group in enumerate(judged):
                best = chosen[0][i] if chosen else None
                rows = answer_rows(step, asked[group.id], group, best, judge, lengths, failures)
                if evaluating.kind == "recorded":
                    rows = labelled(rows, groups[i], evaluating)
                machine.folder.append_samples(list(rows))
            before, written = written, written + len(groups)
            if written * MESSAGES // total > before * MESSAGES // total and time.monotonic() - began > 5:
                machine.tracker.message(f"{written} of {total} groups of answers are judged")
        waiting.put_nowait(None)  # for the other tasks

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sample())
            for _ in range(1 if judge is None else judge.config.workers):
                tasks.create_task(score())
    except ExceptionGroup as several:
        raise several.exceptions[0] from several


def _known(groups: Sequence[Group], evaluating: Evaluating) -> list[Group]:
    """Without a judge, mark answers without labels as unjudged, which is not a failure."""
    if evaluating.judge is not None:
        return list(groups)
    return [
        group if group.scores else group.with_scores(GroupScores((Score.none(),) * len(group.samples)))
        for group in groups
    ]


def _judge_name(evaluating: Evaluating) -> str:
    return _name(evaluating.judge) or ("the data's labels" if evaluating.kind == "recorded" else "nobody")


def _name(part: Part | None) -> str | None:
    return None if part is None else part.cls.__name__


def _refuse_another(folder: RunFolder, evaluating: Evaluating) -> None:
    """Raises ConfigError if the folder's evaluation has a different configuration."""
    written: Any = yaml.safe_load(folder.config.read_text()) or {}
    free = ("run_dir", "resume", "dry_run", "cluster", "tracking", "trainer")
    ours = {key: value for key, value in evaluating.plain().items() if key not in free}
    theirs = {key: value for key, value in written.items() if key not in free}
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        folder.close()
        message = f"its answers were made with another configuration ({', '.join(changed)}): name another run_dir"
        raise ConfigError([ConfigIssue(f"run_dir={folder.path}", message)])
