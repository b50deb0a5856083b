"""Judges a run's recorded answers with another reward: `rescored/NAME.jsonl` next to samples.jsonl, and a
comparison."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from rewards.base import RewardContext
from rlkit.assessment.judges import LocalJudge
from rlkit.assessment.rows import LONG, Row, cut_to_whole_lines, read_rows, written_rows
from rlkit.config.loading import Loading
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.config.parts import CONTRACTS, OWN, TARGET, Part, conf_dir, import_part, make_source
from rlkit.data.base import Problem
from rlkit.experience import Group, Message, Prompt, Sample, UserError
from rlkit.experience.names import nearest
from rlkit.experience.scores import total_reward
from rlkit.experience.section import Section, Seed
from rlkit.experience.statistics import Values, agreement, correlation, ranks
from rlkit.models.folder import model_folder
from rlkit.tracking.logs import CapturedOutput
from rlkit.tracking.progress import duration, printable
from rlkit.tracking.run_folder import json_text

SHOWN = 4
"""Number of answers shown, in each direction, on which the rewards disagree most."""
SHOWN_CHARACTERS = 160
GROUPS_AT_ONCE = 16
MESSAGE_SECONDS = 10.0
NOT_READ = frozenset(LONG) - {"response"}
"""Keys that are not read, because the comparison does not show them."""


class RescoreConfig(Section):
    """`python -m rlkit.rescore RUN reward=NAME`."""

    name: str | None = Field(default=None, pattern=r"^[\w.+-]+$")
    """Name of the file `rescored/NAME.jsonl`; null: the reward's."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the reward."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of each reward process."""
    startup_timeout_seconds: float = Field(default=600.0, gt=0)
    """Time limit for loading the reward."""
    seed: Seed = 0
    """Seed passed to the reward."""
    dry_run: bool = False
    """Validate only."""
    reward: dict[str, Any]
    """A swappable part: `_target_` and the fields of its `Config`."""


@dataclass(frozen=True)
class Rescoring:
    run: Path
    config: RescoreConfig
    part: Part

    @property
    def file(self) -> Path:
        return self.run / "rescored" / f"{self.config.name}.jsonl"


class _Loading(Loading):
    """Loads the reward as in a run, from the same option files; no other part or section."""

    def __init__(self, arguments: Sequence[str]) -> None:
        contracts = {"reward": CONTRACTS["reward"]}
        super().__init__(arguments, None, folder=conf_dir(), schema=RescoreConfig, contracts=contracts)
        for key, argument in self.overrides.typed.items():
            top = key.partition(".")[0]
            if top not in RescoreConfig.model_fields:
                guess = nearest(top, RescoreConfig.model_fields)
                self.problems.append(ConfigIssue(argument, f"has no effect here; {_instead(guess)}"))
        if not {"reward", f"reward.{TARGET}"} & set(self.overrides.typed):
            self.problems.append(ConfigIssue("reward", "choose the other reward: reward=NAME"))

    def _plain(self, composed: DictConfig) -> dict[str, Any]:
        kept = [name for name in composed if name == "hydra" or name in RescoreConfig.model_fields]
        return super()._plain(OmegaConf.masked_copy(composed, kept))

    def _run_config(self, known: Sequence[str]) -> None:
        plain = {key: value for key, value in self.tree.items() if key != "reward"}
        self.available["top"] = self._section(RescoreConfig, {**plain, "reward": {}}, "", known)

    def result(self, run: Path) -> Rescoring:
        part = self.parts.get("reward")
        if part is not None:
            self.problems += [ConfigIssue("reward", message) for message in part.cls.check(part.config)]
            self.problems += _unfit(part)
        if self.problems or part is None:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        section = {TARGET: self.tree["reward"][TARGET], **part.config.model_dump(mode="json")}
        name = self.available["top"].name or self.sources.options["reward"].strip("[]").replace(",", "+")
        return Rescoring(run, self.available["top"].model_copy(update={"reward": section, "name": name}), part)


def _instead(guess: str | None) -> str:
    return f"did you mean {guess}?" if guess else f"these keys do: {', '.join(RescoreConfig.model_fields)}"


def _unfit(part: Part) -> Iterator[ConfigIssue]:
    traits, name = part.cls.traits(part.config), part.cls.__name__
    if traits.update_when != "none" or traits.follows_policy:
        yield ConfigIssue("reward", f"{name} learns in a run; here it must judge all answers in the same way")
    if traits.environment:
        yield ConfigIssue("reward", f"{name} judges episodes as they were played; rows of samples.jsonl are texts")
    if traits.steps:
        yield ConfigIssue("reward", f"{name} needs the steps of responses, which rows of samples.jsonl do not have")


def load_rescoring(run: str, arguments: Sequence[str]) -> Rescoring:
    """Check the arguments. Raises ConfigError with every problem."""
    folder, loading = Path(run).expanduser(), _Loading(arguments)
    if not (folder / "samples.jsonl").is_file():
        of = next((parent for parent in folder.absolute().parents if (parent / "samples.jsonl").is_file()), None)
        why = f"there is no {folder}/samples.jsonl" if of is None else f"the answers are in its run, {of}"
        loading.problems.append(ConfigIssue(run, f"is not the folder of a run: {why}"))
    loading.validate()
    rescoring = loading.result(folder)
    if rescoring.file.exists() and _head(rescoring)["reward"] != next(_written(rescoring), {}).get("reward"):
        message = "already exists, from another reward: remove it, or choose name=NAME"
        raise ConfigError([ConfigIssue(str(rescoring.file), message)])
    return rescoring


def _head(rescoring: Rescoring) -> Row:
    """Return the first line of the file."""
    name, reward = rescoring.config.name, rescoring.config.reward
    head: Row = json.loads(json_text({"kind": "rescored", "name": name, "reward": reward, "time": time.time()}))
    return head


def _written(rescoring: Rescoring) -> Iterator[Row]:
    return written_rows(rescoring.file.parent, rescoring.file.name)


def rescore(rescoring: Rescoring) -> str:
    """Judge the answers that the file does not have yet; return a comparison of both rewards. Raises UserError."""
    rows = [row for row in read_rows(rescoring.run, NOT_READ) if row.get("response") is not None]
    if not rows:
        raise UserError(f"{rescoring.run}/samples.jsonl has no answers")
    left = Counter(_place(row)[:2] for row in rows)
    if rescoring.file.exists():
        cut_to_whole_lines(rescoring.file)
        done = Counter(place[:2] for place in {_place(row) for row in islice(_written(rescoring), 1, None)})
        left = Counter({group: size for group, size in left.items() if done[group] < size})
    if left:
        log = rescoring.run / "logs" / f"rescored-{rescoring.config.name}.log"
        log.parent.mkdir(exist_ok=True)
        rescoring.file.parent.mkdir(exist_ok=True)
        with CapturedOutput(log) as output:  # the reward's libraries may print
            asyncio.run(_judge(rescoring, _groups(rescoring, rows, left), left.total(), output.terminal))
    return side_by_side(str(rescoring.config.name), rows, list(islice(_written(rescoring), 1, None)))


async def _judge(
    rescoring: Rescoring, groups: Iterator[tuple[Group, list[Row]]], answers: int, terminal: TextIO
) -> None:
    """Write the rows of groups as they are judged, and report at intervals how many of the `answers` are done."""
    config, workers = rescoring.config, rescoring.part.config.workers
    context = RewardContext(
        device=config.device, gpus=float(config.device == "cuda"), seed=config.seed, threads=config.threads
    )
    judge = LocalJudge(config.reward, rescoring.part, context, config.startup_timeout_seconds)
    judged, began, said = 0, time.monotonic(), time.monotonic()

    async def work() -> None:
        nonlocal judged, said
        while part := list(islice(groups, GROUPS_AT_ONCE)):
            scored = await judge.judge([group for group, _ in part])
            rows = [row for group, (_, own) in zip(scored, part, strict=True) for row in _rows(group, own)]
            file.writelines(json_text(row) + "\n" for row in rows)
            file.flush()
            judged, now = judged + len(rows), time.monotonic()
            if now - said > MESSAGE_SECONDS:
                said, rest = now, (answers - judged) * (now - began) / judged
                print(f"{judged} of {answers} answers judged, {duration(rest)} left", file=terminal)

    try:
        await judge.start()
        began = time.monotonic()
        with rescoring.file.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json_text(_head(rescoring)) + "\n")
            await asyncio.gather(*(work() for _ in range(2 * workers)))
    finally:
        await judge.close()


def _groups(
    rescoring: Rescoring, rows: Sequence[Row], left: Mapping[tuple[int, str], int]
) -> Iterator[tuple[Group, list[Row]]]:
    """Yield the groups in `left`, (step, id) -> number of answers, as they were sampled, with the rows of their
    samples.

    They are read on demand: a run's answers may not fit into memory.
    """
    traits = rescoring.part.cls.traits(rescoring.part.config)
    written = yaml.safe_load((rescoring.run / "config.yaml").read_text()) if _is_file(rescoring) else {}
    columns = _columns(rescoring, written, rows) if traits.columns else {}
    render = None if traits.judges_texts else _renderer(rescoring, written)
    begun: dict[tuple[int, str], dict[int, Row]] = {}
    for row in written_rows(rescoring.run):
        step, group_id, sample = _place(row)
        size = left.get((step, group_id), 0)
        if row.get("response") is None or not size:
            continue
        begun.setdefault((step, group_id), {})[sample] = row
        if len(begun[step, group_id]) < size:
            continue
        own = list(begun.pop((step, group_id)).values())
        messages = tuple(Message(one["role"], one["content"]) for one in row["prompt"])
        prompt = Prompt(
            id=str(row["prompt_id"]),
            messages=messages,
            token_ids=() if render is None else render(messages),
            references=tuple(row.get("references") or ()),
            answer=row.get("answer"),
            columns=columns.get(_question(row), {}),
        )
        samples = tuple(_sample(i, one, tokens=render is not None) for i, one in enumerate(own))
        yield Group(group_id, prompt, samples), own


def _is_file(rescoring: Rescoring) -> bool:
    return (rescoring.run / "config.yaml").is_file()


def _sample(index: int, row: Row, *, tokens: bool) -> Sample:
    if tokens and row.get("turns"):
        raise UserError("this reward reads tokens, but rows of episodes do not say where their turns begin")
    ids = np.array(row.get("token_ids") or () if tokens else (), dtype=np.int32)
    reason: Any = row.get("finish_reason") or "stop"
    return Sample(index, ids, None, row["response"], reason, (0, 0), seed=0)


def _columns(
    rescoring: Rescoring, written: Mapping[str, Any], rows: Sequence[Row]
) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Data columns of the run's data and sets, by question: rows of samples.jsonl do not have them."""
    asked = {_question(row) for row in rows}
    known: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name in {name for name, _ in asked}:
        known |= {(name, problem.id): problem.columns for problem in _problems(rescoring, written, name)}
    if lacking := asked - known.keys():
        raise UserError(f"the data of {rescoring.run} have changed: there is no question {min(lacking)[1]}")
    return known


def _question(row: Row) -> tuple[str, str]:
    """Return the question's set and its id, which is only unique within the set."""
    return str(row.get("set", OWN)), str(row["prompt_id"])


def _problems(rescoring: Rescoring, written: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """Yield the problems of a set."""
    sets = (written.get("evaluation") or {}).get("sets") or {}
    fields = dict((sets.get(name) if name else written.get("data")) or {})
    if TARGET not in fields:
        what = f"evaluation.sets.{name}" if name else "data"
        raise UserError(f"{rescoring.run}/config.yaml does not name {what}, whose columns this reward needs")
    cls = import_part("data", fields.pop(TARGET))
    if name:
        fields.pop("prompts", None)  # how many questions are asked
    source = make_source(cls, cls.Config(**fields), written.get("seed", 0), None, None)
    for problems, _ in [source.load_set()] if name else [source.load("train"), source.load("heldout")]:
        yield from problems


def _renderer(rescoring: Rescoring, written: Mapping[str, Any]) -> Any:
    from rlkit.data.rendering import load_tokenizer, renderer

    model = written.get("model") or {}
    tokenizer = load_tokenizer(model_folder(model.get("path", "")), bool(model.get("trust_remote_code")))
    return renderer(tokenizer, model.get("chat_template"), model.get("chat_template_arguments"))


def _rows(group: Group, members: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row, (_, score) in zip(members, group.scored(), strict=True):
        yield {
            "step": row["step"],
            "group_id": row["group_id"],
            "sample": row["sample"],
            "reward": total_reward(score),
            "components": dict(score.components),
            "valid": score.valid,
            "reason": score.reason,
        }


# -- both, side by side ------------------------------------------------------------------------------------------------


def side_by_side(name: str, rows: Sequence[Row], rescored: Sequence[Row]) -> str:
    """Return means, correlations and the largest disagreements, over the answers that both have judged."""
    key = lambda row: (int(row["step"]), str(row["group_id"]), int(row["sample"]))  # noqa: E731
    new = {key(row): row for row in rescored}
    both = [
        (row, new[key(row)]) for row in rows if row.get("reward") is not None and new[key(row)]["reward"] is not None
    ]
    invalid = sum(row["reward"] is None for row in rescored)
    head = f"{len(rows)} answers, {len(both)} judged by both" + (f", {invalid} not by {name}" if invalid else "")
    if not both:
        reasons = sorted({str(row["reason"]) for row in rescored if row["reason"]})
        return "\n".join([head, *reasons[:SHOWN]])
    one, other = (np.array([float(pair[i]["reward"]) for pair in both]) for i in (0, 1))
    groups: dict[tuple[int, str], list[int]] = {}
    for i, (row, _) in enumerate(both):
        groups.setdefault(_place(row)[:2], []).append(i)
    alike = agreement([(one[own], other[own]) for own in groups.values()])
    lines = [
        head,
        f"{'mean':<44}{_number(one.mean())} recorded{_number(other.mean())} {name}",
        f"{'correlation':<44}{_number(correlation(one, other))}",
        f"{'rank correlation':<44}{_number(correlation(ranks(one), ranks(other)))}",
        f"{'pairs of a group in the same order':<44}{_number(alike)}",
    ]
    return "\n".join([*lines, *_disagreements(name, both, one, other)])


def _place(row: Row) -> tuple[int, str, int]:
    return int(row["step"]), str(row["group_id"]), int(row["sample"])


def _disagreements(name: str, both: Sequence[tuple[Row, Row]], one: Values, other: Values) -> Iterator[str]:
    """Rank all answers by each reward, best first, because rewards have different units, and show where the ranks
    differ."""
    before, after = (len(one) + 1 - ranks(values) for values in (one, other))
    order = np.argsort(after - before, kind="stable")
    rises = [i for i in order.tolist() if after[i] < before[i]]
    falls = [i for i in order[::-1].tolist() if after[i] > before[i]]
    width = max(8, len(name))
    for title, places in (("higher", rises), ("lower", falls)):
        if places:
            yield f"\nRanked {title} by {name}, of {len(one)} answers; equal rewards share a rank:"
            yield f"  {'recorded':>{width}}    rank  {name:>{width}}    rank  answer"
        for i in places[:SHOWN]:
            row, new = both[i]
            rewards = (f"{_number(value):>{width}}" for value in (row["reward"], new["reward"]))
            cells = [cell for pair in zip(rewards, (f"{before[i]:6g}", f"{after[i]:6g}"), strict=True) for cell in pair]
            yield f"  {'  '.join(cells)}  step {row['step']} {row['group_id']} sample {row['sample']}"
            yield f"    {printable(str(row['response']))[:SHOWN_CHARACTERS]}"


def _number(value: float) -> str:
    return "       -" if math.isnan(value) else f"{value:8.3f}"
