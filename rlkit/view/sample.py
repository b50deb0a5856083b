"""One sample, its group, its tokens."""

from __future__ import annotations

from rlkit.view import tokens
from rlkit.view.account import account
from rlkit.view.asked import GroupAsked, SampleAsked, TokensAsked
from rlkit.view.rows import number, said
from rlkit.view.runs import NotThereError, Run
from rlkit.view.samples import summaries
from rlkit.view.schema import GroupMember, GroupResult, Row, SampleResult, SampleSummary, TokensAbout, TokensResult


def sample(run: Run, asked: SampleAsked) -> SampleResult:
    row, summary = _row(run, asked.id), _summary(run, asked.id)
    recorded = tokens.token_row(run.path, _place(summary)) if summary.has_tokens else None
    parts, note = account(summary.components, summary.reward, run.option("reward", {}) or {})
    members = _members(run, summary, row)
    previous, following = _neighbours(run, asked.id, members)
    return SampleResult(
        row={**row, "id": asked.id},
        summary=summary,
        group=members,
        tokens=TokensAbout(signals=tokens.signals_of(recorded), length=len(recorded["token_id"])) if recorded else None,
        verdicts={"correct": summary.correct, "verdict": summary.verdict, "rescored": summary.rescored},
        account=parts,
        account_note=note,
        previous=previous,
        next=following,
    )


def _row(run: Run, number_: int) -> Row:
    row = run.index.raw(number_)
    if row is None:
        raise NotThereError(f"run {run.id!r} has no sample {number_} (any more)")
    return row


def _summary(run: Run, number_: int) -> SampleSummary:
    found = summaries(run, [number_])
    if not found:
        raise NotThereError(f"run {run.id!r} has no sample {number_} (any more)")
    return found[0]


def _place(summary: SampleSummary) -> tokens.Place:
    return tokens.Place(summary.step, summary.group_id, summary.sample)


def _kept(run: Run, step: int, group: str, kind: str) -> dict[int, tuple[int, float | None, str | None]]:
    """Sample -> (id, reward, rank) of the rows of a group."""
    rows = run.index.connection().execute(
        "SELECT sample, id, reward, rank FROM rows WHERE step = ? AND group_id = ? AND kind = ? ORDER BY sample, id",
        (step, group, kind),
    )
    return {sample_: (number_, reward, rank) for sample_, number_, reward, rank in rows}


def _members(run: Run, summary: SampleSummary, row: Row) -> list[GroupMember]:
    kept = _kept(run, summary.step, summary.group_id, summary.kind)
    rewards = row.get("group_rewards")
    rewards = [number(reward) for reward in rewards] if isinstance(rewards, list) else []
    members = []
    for i in sorted({*kept, *range(len(rewards))}):
        number_, reward, rank = kept.get(i, (None, None, None))
        reward = rewards[i] if reward is None and i < len(rewards) else reward
        members.append(GroupMember(id=number_, sample=i, reward=reward, rank=rank))
    return members


def _neighbours(run: Run, number_: int, members: list[GroupMember]) -> tuple[int | None, int | None]:
    """In the group; at its ends, in the file."""
    ids = [member.id for member in members if member.id is not None]
    at = ids.index(number_) if number_ in ids else -1
    before, after = (
        run.index.connection()
        .execute(
            "SELECT (SELECT max(id) FROM rows WHERE id < ?), (SELECT min(id) FROM rows WHERE id > ?)",
            (min([number_, *ids]), max([number_, *ids])),
        )
        .fetchone()
    )
    return (ids[at - 1] if at > 0 else before), (ids[at + 1] if 0 <= at < len(ids) - 1 else after)


def group(run: Run, asked: GroupAsked) -> GroupResult:
    """Of a group that was recorded both in training and in an evaluation, the training rows."""
    kept = _kept(run, asked.step, asked.group, "training") or _kept(run, asked.step, asked.group, "evaluation")
    rows = [{**row, "id": number_} for number_, _, _ in kept.values() if (row := run.index.raw(number_)) is not None]
    if not rows:
        raise NotThereError(f"run {run.id!r} has no group {asked.group!r} in step {asked.step}")
    first = rows[0]
    recorded = first.get("group_rewards")
    if isinstance(recorded, list):
        rewards = [number(reward) for reward in recorded]
    else:
        rewards = [kept[i][1] if i in kept else None for i in range(max(kept) + 1)]
    known = [reward for reward in rewards if reward is not None]
    prompt = first.get("prompt")
    return GroupResult(
        group_id=asked.group,
        step=asked.step,
        prompt=prompt if isinstance(prompt, list) else [{"role": "user", "content": said(prompt)}],
        answer=first.get("answer"),
        references=[str(reference) for reference in first.get("references") or ()],
        rewards=rewards,
        rows=rows,
        equal=len(known) > 1 and min(known) == max(known),
        dropped=first.get("dropped"),
    )


def tokens_of(run: Run, asked: TokensAsked) -> TokensResult:
    row = tokens.token_row(run.path, _place(_summary(run, asked.id)))
    if row is None:
        raise NotThereError(
            f"no token signals of sample {asked.id}: a run keeps those of tracking.token_groups_per_step groups a step"
        )
    chosen = [name for name in asked.signals.split(",") if name] or None
    return tokens.tokens_result(row, chosen, asked.from_, asked.to)
