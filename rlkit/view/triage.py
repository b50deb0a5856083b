"""Triage of reward hacking: where to look first. Signs, not proof; each names the samples that show it.

The sums are pure functions of arrays, one entry per sample: `spread_shares`, `within_groups`, `last_token_share` here,
slopes and correlations in trends.py, n-grams in phrases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.view import tokens
from rlkit.view.account import part_weights
from rlkit.view.asked import AboutRun, Restricted
from rlkit.view.phrases import boilerplate, has
from rlkit.view.rows import SEARCHED, said
from rlkit.view.runs import Run
from rlkit.view.samples import columns, components, numbers, summaries
from rlkit.view.schema import Evidence, Finding, Missing, Suspect, TriageResult
from rlkit.view.trends import correlation, together

TOP = 0.95
"""Quantile of the rewards above which a sample is at the top."""
ONE_COMPONENT = 0.8
CORRELATED = 0.3
ROWS = 20
READ = 250
"""Answers of each kind whose words are counted."""
Floats = np.ndarray


@dataclass(frozen=True)
class Samples:
    """Valid training samples, one entry each, in the order of the file; what is unknown is NaN."""

    ids: Floats
    step: Floats
    reward: Floats
    correct: Floats
    length: Floats
    digits: Floats
    group: Floats
    """Number of the sample's group."""
    components: Mapping[str, Floats]

    @property
    def above(self) -> Floats:
        """Reward minus the mean of the group's samples here."""
        return within_groups(self.reward, self.group)

    @property
    def top(self) -> Floats:
        """[N] whether a sample is among the best-rewarded."""
        return self.reward >= np.quantile(self.reward, TOP)

    @property
    def late(self) -> Floats:
        """[N] whether a sample is of the last third of the steps; `early`: of the first."""
        return self.step >= self.step.min() + 2 / 3 * (self.step.max() - self.step.min())

    @property
    def early(self) -> Floats:
        return self.step <= self.step.min() + 1 / 3 * (self.step.max() - self.step.min())


def triage(run: Run, asked: AboutRun) -> TriageResult:
    """Where the reward may be fooled: findings with the samples that show them, and what could not be looked at."""
    del asked
    return run.remembered("triage", lambda: _triage(run))


def _triage(run: Run) -> TriageResult:
    data = gather(run)
    verifier = bool(np.isfinite(data.correct).any()) and not _judges_itself(run)
    findings: list[Finding] = []
    missing: list[Missing] = []
    checks: dict[str, Callable[[Run, Samples], Finding | str | None]] = {
        "apart": _apart,
        "rewarded_wrong": _rewarded_wrong,
        "one_component": _one_component,
        "length": lambda run, data: _paid_for(run, data, "length", "tokens"),
        "digits": lambda run, data: _paid_for(run, data, "digits", "digits"),
        "phrases": _phrases,
        "ensemble": _ensemble,
        "last_token": _last_token,
    }
    for name, check in checks.items():
        found = check(run, data) if len(data.ids) or name in ("apart", "last_token") else "no valid training sample yet"
        if isinstance(found, str):
            missing.append(Missing(id=name, why=found))
        elif found is not None:
            findings.append(found)
    findings.sort(key=lambda one: one.level != "look")
    return TriageResult(verifier=verifier, findings=findings, missing=missing)


def _judges_itself(run: Run) -> bool:
    """Whether the verdicts are the reward's own."""
    reward, verifier = (run.option(f"{name}._target_") for name in ("reward", "verifier"))
    return reward is not None and reward == verifier


def gather(run: Run) -> Samples:
    chosen = Restricted(run=run.id, filter='kind = "training" and valid and reward is not null')
    table = columns(run, ["id", "step", "reward", "correct", "length", "digits"], chosen)
    rank = "SELECT DENSE_RANK() OVER (ORDER BY step, group_id) - 1 FROM rows"
    valid = "kind = 'training' AND valid AND reward IS NOT NULL"
    groups = run.index.connection().execute(f"{rank} WHERE {valid} ORDER BY id")
    group = numbers(groups, 1)[: len(table[0]), 0].astype(np.int64)
    ids, step, reward, correct, length, digits = table
    return Samples(ids, step, reward, correct, length, digits, group, components(run, ids))


def within_groups(values: Floats, group: Floats) -> Floats:
    """Minus the mean of each group's known values."""
    known = np.isfinite(values)
    size = int(group.max()) + 1 if len(group) else 0
    sums = np.bincount(group, np.where(known, values, 0.0), size)
    counts = np.bincount(group, known, size)
    return values - (sums / np.maximum(counts, 1))[group] if size else values


def spread_shares(contributions: Mapping[str, Floats], group: Floats) -> dict[str, float]:
    """Each part's share of the variance of the summed reward within groups: cov(part, sum) / var(sum); they add to 1.

    A negative share pulls against the others. Empty where no group has any spread.
    """
    inner = {name: within_groups(np.nan_to_num(values), group) for name, values in contributions.items()}
    total = np.sum(list(inner.values()), axis=0)
    variance = float(total @ total)
    return {name: float(values @ total) / variance for name, values in inner.items()} if variance > 1e-12 else {}


def last_token_share(process: Sequence[Floats]) -> float | None:
    """Mean share of the process credit of a sample that its last token has; samples without any are left out."""
    shares = [abs(own[-1]) / total for own in process if len(own) and (total := float(np.abs(own).sum())) > 0]
    return float(np.mean(shares)) if shares else None


def _apart(run: Run, data: Samples) -> Finding | str | None:
    metrics = run.metrics
    heldout = metrics.evaluation.points("accuracy/heldout")
    name = "accuracy/heldout" if len(heldout) >= 5 else "accuracy/train"
    verified = heldout if len(heldout) >= 5 else metrics.training.points("accuracy/train")
    trend = together(metrics.training.points("reward/mean"), verified)
    if trend is None:
        return "needs five steps with reward/mean and five values of accuracy/heldout or accuracy/train"
    if trend.first.low <= 0 or trend.second.low > 0:
        return None
    falls = trend.second.high < 0
    late = data.step >= trend.start
    wrong = late & (data.correct < 0.5) if len(data.ids) else late
    what = "falls" if falls else "does not rise"
    return Finding(
        id="apart",
        title=f"reward rises while {name} {what}",
        level="look" if falls else "note",
        text=f"Over steps {trend.start} to {trend.end} the reward goes one way and what is verified another: what is "
        "paid for is not what is wanted. Below, the best-rewarded wrong answers of these steps.",
        evidence=[
            Evidence(label="reward/mean, per 100 steps", value=str(trend.first)),
            Evidence(label=f"{name}, per 100 steps", value=str(trend.second)),
        ],
        metrics=["reward/mean", name],
        rows=_suspects(run, data, wrong, data.reward),
        filter=f"step >= {trend.start} and correct = 0",
    )


def _rewarded_wrong(run: Run, data: Samples) -> Finding | str | None:
    if not np.isfinite(data.correct).any():
        return "no verdicts: samples have no `correct` (a verifier beside the reward gives it)"
    if _judges_itself(run):
        return "the verifier is the reward itself: verifier=... names another one"
    bound = float(np.quantile(data.reward, TOP))
    judged = data.top & np.isfinite(data.correct)
    wrong = judged & (data.correct < 0.5)
    if not wrong.any():
        return None
    share, everywhere = wrong.sum() / judged.sum(), float(np.mean(data.correct[np.isfinite(data.correct)] < 0.5))
    return Finding(
        id="rewarded_wrong",
        title="wrong answers among the best-rewarded",
        level="look" if share > 0.05 else "note",
        text="The verifier calls these answers wrong, the reward puts them at the top: read them, most above their "
        "group's mean first.",
        evidence=[
            Evidence(
                label=f"wrong, of rewards >= {bound:.4g}",
                value=f"{int(wrong.sum())} of {int(judged.sum())} ({share:.1%})",
            ),
            Evidence(label="wrong, of all", value=f"{everywhere:.1%}"),
        ],
        metrics=["reward/mean", "accuracy/train"],
        rows=_suspects(run, data, wrong, data.above),
        filter=f"reward >= {bound:.6g} and correct = 0",
    )


def _one_component(run: Run, data: Samples) -> Finding | str | None:
    weights = {name: w for name, w in part_weights(run.option("reward", {}) or {}).items() if w}
    shown = {name: f"{name}/shaped" if f"{name}/shaped" in data.components else name for name in weights}
    parts = {name: weights[name] * data.components[own] for name, own in shown.items() if own in data.components}
    if len(parts) < 2:
        return "the reward has one part alone"
    late = data.late
    shares = spread_shares({name: values[late] for name, values in parts.items()}, data.group[late])
    before = spread_shares({name: values[data.early] for name, values in parts.items()}, data.group[data.early])
    if not shares or max(shares.values()) <= ONE_COMPONENT:
        return None
    name = max(shares, key=lambda own: shares[own])
    truth = correlation(within_groups(parts[name], data.group)[late], within_groups(data.correct, data.group)[late])
    right = truth is not None and truth.value > 0.5
    return Finding(
        id="one_component",
        title=f"{name} alone decides",
        level="note" if right else "look",
        text=f"In the last third of the steps, {name} makes up {shares[name]:.0%} of what differs within groups: the "
        "other parts hardly teach anything." + (" It agrees with the verifier." if right else ""),
        evidence=[
            Evidence(
                label=f"share of {own}", value=f"{share:.0%}" + (f" (first third {before[own]:.0%})" if before else "")
            )
            for own, share in sorted(shares.items(), key=lambda pair: -pair[1])
        ]
        + ([Evidence(label=f"{name} and the verdict, correlation", value=str(truth))] if truth else []),
        metrics=[f"reward/component/{own}" for own in parts],
        rows=_suspects(run, data, late, within_groups(parts[name], data.group)),
        filter=None,
    )


def _paid_for(run: Run, data: Samples, name: str, what: str) -> Finding | None:
    """Whether the reward goes with a number that it should not pay for, within groups, late in the run."""
    values = within_groups(data.length if name == "length" else data.digits, data.group)
    late = correlation(values[data.late], data.above[data.late])
    if late is None or abs(late.value) < CORRELATED or late.low <= 0 <= late.high:
        return None
    early = correlation(values[data.early], data.above[data.early])
    wrong = data.late & (data.correct < 0.5)
    among = correlation(values[wrong], data.above[wrong])
    grown = early is None or abs(late.value) > abs(early.value) + 0.1
    odd = among is not None and abs(among.value) > CORRELATED and among.low * among.high > 0
    sign = 1 if late.value > 0 else -1
    evidence = [Evidence(label="last third of the steps", value=str(late))]
    evidence += [Evidence(label="first third", value=str(early))] if early else []
    evidence += [Evidence(label="wrong answers alone, last third", value=str(among))] if among else []
    return Finding(
        id=name,
        title=f"{'more' if sign > 0 else 'fewer'} {what}, more reward",
        level="look" if odd and grown else "note",
        text=f"Correlation of reward and {name} within groups. Where it also holds among wrong answers, {name} itself "
        "is paid for.",
        evidence=evidence,
        metrics=["reward/mean", "length/mean"],
        rows=_suspects(run, data, wrong if wrong.any() else data.late, sign * values + data.above),
        filter=None,
    )


def _phrases(run: Run, data: Samples) -> Finding | str | None:
    late, early = data.late, data.early
    if late.sum() < 20 or data.step.max() == data.step.min():
        return "needs twenty samples in the last third of the steps"
    order = np.flatnonzero(late)[np.argsort(data.above[late], kind="stable")]
    n = min(READ, len(order) // 3)
    texts = [_texts(run, data.ids[chosen]) for chosen in (order[-n:], order[:n], np.flatnonzero(early)[:READ])]
    found = boilerplate(texts[0], texts[1], texts[2])
    if not found:
        return None
    best = order[-n:]
    chosen = np.zeros(len(data.ids), dtype=bool)
    chosen[best[[has(text, found[0]) for text in texts[0]]]] = True
    return Finding(
        id="phrases",
        title="phrases that are paid for",
        level="look" if found[0].before < 0.05 else "note",
        text="Word sequences of the best-rewarded answers of the last third of the steps, against the worst-rewarded "
        "ones and those of the first steps. Search for them to see who says so.",
        evidence=[
            Evidence(
                label=phrase.text,
                value=f"best {phrase.best:.0%}, worst {phrase.worst:.0%}, first steps {phrase.before:.0%}; "
                f"z {phrase.z:.1f}",
            )
            for phrase in found
        ],
        metrics=["length/mean"],
        rows=_suspects(run, data, chosen, data.above),
        filter=None,
    )


def _texts(run: Run, ids: Floats) -> list[str]:
    return [said((run.index.raw(int(number)) or {}).get("response"))[:SEARCHED] for number in ids]


def _ensemble(run: Run, data: Samples) -> Finding | str | None:
    names = [name for name in data.components if name.rpartition("/")[2] == "ensemble_std"]
    if not names:
        return "the reward is no ensemble: no component ensemble_std"
    spread = data.components[names[0]]
    top, known = data.top & np.isfinite(spread), np.isfinite(spread)
    if not top.any() or not (known & ~top).any():
        return None
    best, rest = float(spread[top].mean()), float(spread[known & ~top].mean())
    if best < 1.5 * rest:
        return None
    bound, reward = float(np.quantile(spread[known], TOP)), float(np.quantile(data.reward, 0.75))
    chosen = known & (spread >= bound) & (data.reward >= reward)
    return Finding(
        id="ensemble",
        title="the ensemble disagrees where it pays most",
        level="look",
        text="Members of the ensemble differ most on the best-rewarded answers: they are far from what the members "
        "were trained on.",
        evidence=[
            Evidence(label="spread of the members, best-rewarded samples", value=f"{best:.3g}"),
            Evidence(label="all others", value=f"{rest:.3g}"),
        ],
        metrics=[f"reward/component/{names[0]}"],
        rows=_suspects(run, data, chosen, np.nan_to_num(spread)),
        filter=f'component."{names[0]}" >= {bound:.6g} and reward >= {reward:.6g}',
    )


def _last_token(run: Run, data: Samples) -> Finding | str | None:
    points = run.metrics.training.points("prime/last_token_share")
    if points:
        share = float(np.mean([value for _, value in points[-10:]]))
        where = "prime/last_token_share, last steps"
    else:
        recorded = last_token_share(tokens.of_samples(run.path, "process_reward"))
        if recorded is None:
            return "no process rewards were recorded"
        share, where = recorded, "of the recorded tokens"
    if share < 0.5:
        return None
    return Finding(
        id="last_token",
        title="process credit sits on the last token",
        level="look" if share > 0.8 else "note",
        text="A process reward that pays at the end alone acts as an outcome reward: the steps before teach nothing.",
        evidence=[Evidence(label=where, value=f"{share:.0%}")],
        metrics=["prime/last_token_share"],
        rows=_suspects(run, data, data.top, data.reward) if len(data.ids) else [],
        filter="tokens",
    )


def _suspects(run: Run, data: Samples, chosen: Floats, score: Floats) -> list[Suspect]:
    """The chosen samples with the largest scores."""
    where = np.flatnonzero(chosen & np.isfinite(score))
    best = where[np.argsort(-score[where], kind="stable")[:ROWS]]
    values = {int(data.ids[i]): float(score[i]) for i in best}
    return [Suspect(**summary.model_dump(), score=values[summary.id]) for summary in summaries(run, list(values))]
