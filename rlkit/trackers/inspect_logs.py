"""Exports the samples of a run as Inspect logs, for its viewer, Scout and Docent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlkit.trackers.recorded import RecordedRun
from rlkit.trackers.rows import conversation

LARGEST = 1000
"""Most samples in a log: the time that Inspect's writer takes grows with the square of their number."""
KEPT = ("rank", "finish_reason", "policy_versions", "staleness", "length", "dropped", "prompt_id", "set", "reason")
"""Keys of a row that become metadata of the sample."""


def write_logs(run: RecordedRun, folder: Path) -> tuple[int, int]:
    """Write a log per range of steps, replacing an earlier export; return the numbers of samples and of logs."""
    from inspect_ai.log import write_eval_log

    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("[0-9][0-9][0-9][0-9]_steps_*.eval"):
        earlier.unlink()
    samples = logs = 0
    for rows in _parts(run):
        first, last = rows[0]["step"], rows[-1]["step"]
        write_eval_log(_log(run, first, last, rows), str(folder / f"{logs:04d}_steps_{first:06d}_{last:06d}.eval"))
        samples, logs = samples + len(rows), logs + 1
    return samples, logs


def _parts(run: RecordedRun) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of whole steps, at most `LARGEST` at a time; a larger step is divided."""
    held: list[dict[str, Any]] = []
    for _, rows in run.steps():
        if held and len(held) + len(rows) > LARGEST:
            yield held
            held = []
        held += rows
        while len(held) > LARGEST:
            yield held[:LARGEST]
            held = held[LARGEST:]
    if held:
        yield held


def _log(run: RecordedRun, first: int, last: int, rows: list[dict[str, Any]]) -> Any:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalMetric, EvalResults, EvalScore, EvalSpec
    from inspect_ai.viewer import TaskSamplesView, ViewerConfig

    scores = [_scores(row) for row in rows]
    columns = dict.fromkeys(name for own in scores for name in own)
    colours = {name: "diverging" if name == "advantage" else "good-high" for name in columns}
    means = {name: [v for own in scores if (v := own.get(name)) is not None and math.isfinite(v)] for name in columns}
    model, data = _chosen(run, "model", "path"), _chosen(run, "data", "path") or _chosen(run, "data", "_target_")
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=datetime.fromtimestamp(run.samples.stat().st_mtime, UTC).isoformat(),
            task=f"{run.folder.name} steps {first}-{last}",
            task_id=f"{run.folder.name}-{first}-{last}",
            run_id=run.folder.name,
            dataset=EvalDataset(name=data, samples=len(rows)),
            model=model or "policy",
            config=EvalConfig(),
            metadata={"run_dir": str(run.folder), "steps": [first, last]},
            viewer=ViewerConfig(
                trust_content=False,
                task_samples_view=TaskSamplesView(name="rlkit", score_color_scales=colours, color_scales_enabled=True),
            ),
        ),
        results=EvalResults(
            total_samples=len(rows),
            completed_samples=len(rows),
            scores=[
                EvalScore(name=name, scorer=name, metrics={"mean": EvalMetric(name="mean", value=sum(v) / len(v))})
                for name, v in means.items()
                if v
            ],
        ),
        samples=[_sample(row, own) for row, own in zip(rows, scores, strict=True)],
    )


def _sample(row: Mapping[str, Any], scores: Mapping[str, float | None]) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score

    said = [_message(message) for message in conversation(row)]
    prompt = said[: len(row.get("prompt") or ())]
    answer = row.get("answer")
    target = [str(text) for text in ([answer] if answer is not None else row.get("references") or [])]
    stop = {"stop": "stop", "length": "max_tokens"}.get(str(row.get("finish_reason")), "unknown")
    kind = "e" if row.get("kind") == "evaluation" else "s"
    return EvalSample(
        id=f"{kind}{row['step']:05d}-{row.get('group_id')}",
        epoch=int(row.get("sample") or 0) + 1,
        input=prompt or "",
        target=target,
        messages=said,
        output=ModelOutput.from_content("policy", said[-1].content if said else "", stop),  # type: ignore[arg-type]
        scores={
            name: Score(
                value=math.nan if value is None else value,
                explanation=str(row.get("reason") or row.get("trace") or "") if name == "reward" else None,
            )
            for name, value in scores.items()
        },
        metadata={"step": row["step"], **{key: row[key] for key in KEPT if row.get(key) is not None}},
    )


def _scores(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return all scores of the sample, by name."""
    known = {"reward": row.get("reward"), **(row.get("components") or {})}
    known |= {name: row[name] for name in ("advantage", "correct", "verdict") if row.get(name) is not None}
    return {name: None if value is None else float(value) for name, value in known.items()}


def _message(message: Mapping[str, str]) -> Any:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageTool, ChatMessageUser

    roles = {"system": ChatMessageSystem, "assistant": ChatMessageAssistant, "tool": ChatMessageTool}
    return roles.get(message["role"], ChatMessageUser)(content=message["content"])


def _chosen(run: RecordedRun, section: str, key: str) -> str:
    return str((run.config.get(section) or {}).get(key) or "")
