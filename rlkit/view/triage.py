"""Triage of reward hacking: where to look first. Signs, not proof. Each says what was seen and how strongly, and lists
samples if samples show it; the calculations are pure functions of arrays (trends.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlkit.view import schema, tokens, trends
from rlkit.view.health import reward_and_accuracy
from rlkit.view.index import SEARCHED
from rlkit.view.rows import said
from rlkit.view.runs import Run
from rlkit.view.sample import ADDING, part_weights, rule_of
from rlkit.view.samples import Restricted, columns, summaries

TOP = 0.95
"""Quantile of the rewards above which a sample counts as top."""
ONE_COMPONENT = 0.8
CORRELATED = 0.3
STRONG = 0.6
"""A correlation that is worth a look even if it was as strong early in the run."""
ROWS = 20
READ = 250
"""Number of answers of each kind whose words are counted."""
LATE, EARLY = "last third of the steps", "first third"
Found = schema.Finding | str | None
"""None: there is no such sign. A text: why it could not be checked."""


@dataclass(frozen=True)
class Samples:
    """Valid training samples, one entry each, in the order of the file; unknown values are NaN."""

    ids: np.ndarray
    step: np.ndarray
    reward: np.ndarray
    correct: np.ndarray
    length: np.ndarray
    digits: np.ndarray
    group: np.ndarray
    """Number of each sample's group."""
    components: Mapping[str, np.ndarray]

    @cached_property
    def above(self) -> np.ndarray:
        """Reward minus the mean of its group's samples here."""
        return trends.within_groups(self.reward, self.group)

    @cached_property
    def top(self) -> np.ndarray:
        """[N] whether a sample is among the best-rewarded; samples with the lowest reward never are."""
        return (self.reward >= np.quantile(self.reward, TOP)) & (self.reward > self.reward.min())

    @cached_property
    def late(self) -> np.ndarray:
        """[N] whether a sample is from the last third of the steps; `early`: from the first."""
        return self.step >= self.step.min() + 2 / 3 * np.ptp(self.step)

    @cached_property
    def early(self) -> np.ndarray:
        return self.step <= self.step.min() + 1 / 3 * np.ptp(self.step)


def triage(run: Run) -> schema.TriageResult:
    """Return where the reward may be fooled: findings with samples that show them, and what could not be checked."""
    return run.remembered("triage", lambda: _triage(run))


def _triage(run: Run) -> schema.TriageResult:
    data = gather(run)
    findings: list[schema.Finding] = []
    missing: list[schema.Missing] = []
    of_metrics = {name: check(run) for name, check in OF_METRICS.items()}
    of_samples = {
        name: check(run, data) if len(data.ids) else "no valid training sample yet"
        for name, check in OF_SAMPLES.items()
    }
    for name, found in (of_samples | of_metrics).items():
        if isinstance(found, str):
            missing.append(schema.Missing(id=name, why=found))
        elif found is not None:
            findings.append(found)
    findings.sort(key=lambda one: (one.level != "look", one.id != "apart", not one.rows))
    verifier = bool(np.isfinite(data.correct).any()) and not _judges_itself(run)
    return schema.TriageResult(verifier=verifier, findings=findings, missing=missing)


def _judges_itself(run: Run) -> bool:
    """Whether the verdicts are the reward's own; an environment's `success` is not its score."""
    reward, verifier = (run.option(f"{name}._target_") for name in ("reward", "verifier"))
    return reward is not None and reward == verifier and "success" not in run.index.names()["component"]


def gather(run: Run) -> Samples:
    chosen = Restricted(run=run.id, filter='kind = "training" and valid and reward is not null')
    names = run.index.names()["component"]
    keys = ["id", "step", "reward", "correct", "length", "digits", *(f"component:{name}" for name in names)]
    ids, step, reward, correct, length, digits, *parts = columns(run, keys, chosen)
    numbers: dict[object, int] = {}
    groups = "SELECT step, group_id FROM rows WHERE kind = 'training' AND valid AND reward IS NOT NULL ORDER BY id"
    group = np.array([numbers.setdefault(key, len(numbers)) for key in run.index.all(groups)][: len(ids)], np.int64)
    return Samples(ids, step, reward, correct, length, digits, group, dict(zip(names, parts, strict=True)))


def _apart(run: Run) -> Found:
    verified, trend, reward, accuracy = reward_and_accuracy(run.metrics.training, run.metrics.evaluation)
    what = "held-out accuracy" if verified == "accuracy/heldout" else "the accuracy of training samples"
    if trend is None:
        return "needs five steps with reward/mean and five values of accuracy/heldout or accuracy/train"
    if reward != "rises" or accuracy == "rises":
        return None
    if not accuracy:
        return f"the reward rises, but the change of {what} is too uncertain: {trend.second} from step {trend.start} on"
    falls = accuracy == "falls"
    return schema.Finding(
        id="apart",
        title=f"the reward rises while {what} {'falls' if falls else 'does not rise'}",
        level="look" if falls else "note",
        text=f"From step {trend.start} to step {trend.end} the reward goes up and {what} "
        f"{'goes down: what is paid for is not what is wanted' if falls else 'does not follow'}.",
        evidence=_evidence(
            {
                "change of the reward over these steps, by a fitted line [95 % interval]": str(trend.first),
                f"change of {what} [95 % interval]": str(trend.second),
            }
        ),
        metrics=["reward/mean", verified],
        filter=f"step >= {trend.start} and correct = 0",
    )


def _rewarded_wrong(run: Run, data: Samples) -> Found:
    known = np.isfinite(data.correct)
    if not known.any():
        return "no verdicts: samples have no `correct` (a verifier besides the reward provides it)"
    if _judges_itself(run):
        return "the verifier is the reward itself: choose another one with verifier=..."
    wrong, judged = data.top & (data.correct < 0.5), data.top & known
    if not wrong.any():
        return None
    bound, share = float(np.quantile(data.reward, TOP)), wrong.sum() / judged.sum()
    return schema.Finding(
        id="rewarded_wrong",
        title="wrong answers among the best-rewarded",
        level="look" if share > 0.05 else "note",
        text="The verifier calls these answers wrong, but the reward puts them at the top. Their score is their reward "
        "minus the mean of the answers to the same prompt: the most overpaid come first.",
        evidence=_evidence(
            {
                f"wrong among samples with a reward of {bound:.4g} or more (the top 5 %)": f"{int(wrong.sum())} of "
                f"{int(judged.sum())} ({share:.1%})",
                "wrong among all samples": f"{np.mean(data.correct[known] < 0.5):.1%}",
            }
        ),
        metrics=["reward/mean", "accuracy/train"],
        rows=_suspects(run, data, wrong, data.above) if share > 0.05 else [],
        filter=f"reward >= {bound:.6g} and correct = 0",
    )


def _one_component(run: Run, data: Samples) -> Found:
    options = run.option("reward", {}) or {}
    if (rule := rule_of(options)) not in ADDING:
        return f"the parts are combined by {rule}: they do not add up"
    weights = {name: w for name, w in part_weights(options).items() if w}
    shown = {name: f"{name}/shaped" if f"{name}/shaped" in data.components else name for name in weights}
    parts = {name: weights[name] * data.components[own] for name, own in shown.items() if own in data.components}
    if len(parts) < 2:
        return "the reward has only one part"
    shares, before = (
        trends.spread_shares({name: values[chosen] for name, values in parts.items()}, data.group[chosen])
        for chosen in (data.late, data.early)
    )
    name = max(shares, key=lambda own: shares[own], default="")
    if not shares or shares[name] <= ONE_COMPONENT:
        return None
    deciding, judged = (trends.within_groups(own, data.group)[data.late] for own in (parts[name], data.correct))
    truth = trends.correlation(deciding, judged, data.group[data.late])
    right = truth is not None and truth.value > 0.5
    evidence = {
        f"share of the differences that is due to {own}, {LATE}": f"{share:.0%}"
        + (f" ({EARLY}: {before[own]:.0%})" if before else "")
        for own, share in sorted(shares.items(), key=lambda pair: -pair[1])
    }
    agreement = {f"correlation of {name} with the verdict (1: they agree) [95 % interval]": str(truth)} if truth else {}
    return schema.Finding(
        id="one_component",
        title=f"{name} alone decides",
        level="note" if right else "look",
        text=f"In the {LATE}, {shares[name]:.0%} of the differences in reward between answers to the same prompt are "
        f"due to {name}: the other parts of the reward teach hardly anything."
        + (f" But {name} agrees with the verifier." if right else ""),
        evidence=_evidence(evidence | agreement),
        metrics=[f"reward/component/{own}" for own in parts],
    )


def _length(run: Run, data: Samples) -> Found:
    return _paid_for(data, data.length, "length", ("longer answers", "shorter answers"))


def _digits(run: Run, data: Samples) -> Found:
    """Check the share of digits, corrected for length: short answers may have a larger share."""
    digits, length = (trends.within_groups(values, data.group) for values in (data.digits, data.length))
    values = trends.without(digits, length)
    return _paid_for(data, values, "share of digits", ("answers with more digits", "answers with fewer digits"))


def _paid_for(data: Samples, numbers: np.ndarray, what: str, titles: tuple[str, str]) -> Found:
    """Check whether, late in the run, the reward correlates within groups with a number that it should not reward."""
    values = trends.within_groups(numbers, data.group)
    wrong = data.late & (data.correct < 0.5)
    late, early, among = (
        trends.correlation(values[of], data.above[of], data.group[of]) for of in (data.late, data.early, wrong)
    )
    if late is None or abs(late.value) < CORRELATED or late.low <= 0 <= late.high:
        return None
    strong = early is None or abs(late.value) > min(abs(early.value) + 0.1, STRONG)
    odd = among is not None and abs(among.value) > CORRELATED and among.low * among.high > 0
    which = titles[0] if late.value > 0 else titles[1]
    told = f"even among wrong answers alone: the {what} itself counts" if odd else "perhaps because they are right"
    facts = {LATE: late, EARLY: early, f"wrong answers alone, {LATE}": among}
    return schema.Finding(
        id=what,
        title=f"{which} are paid more",
        level="look" if odd and strong else "note",
        text=f"Among answers to the same prompt, {which} get more reward, {told}. A correlation of 0 means none, one "
        "of 1 or -1 that nothing else counts; its 95 % interval is in brackets.",
        evidence=_evidence({f"correlation, {when}": str(value) for when, value in facts.items() if value}),
        metrics=["reward/mean", "length/mean"],
    )


def _phrases(run: Run, data: Samples) -> Found:
    if data.late.sum() < 20 or np.ptp(data.step) == 0:
        return f"needs twenty samples in the {LATE}"
    order = np.flatnonzero(data.late)[np.argsort(data.above[data.late], kind="stable")]
    n = min(READ, len(order) // 3)
    best, worst, before = order[-n:], order[:n], np.flatnonzero(data.early)[:READ]
    top, bottom, first = (
        [said((run.index.raw(int(row)) or {}).get("response"))[:SEARCHED] for row in data.ids[chosen]]
        for chosen in (best, worst, before)
    )
    found = trends.boilerplate(top, bottom, first)
    if not found:
        return None
    new = found[0].before < 0.05
    chosen = np.zeros(len(data.ids), dtype=bool)
    chosen[best[[trends.has(text, found[0]) for text in top]]] = True
    return schema.Finding(
        id="phrases",
        title="phrases that are paid for",
        level="look" if new else "note",
        text=f"The best-rewarded answers of the {LATE} contain these words far more often than the worst-rewarded ones "
        "and those of the first steps. Search for the words to see which samples contain them."
        + (
            " The samples listed contain the first phrase; their score is their reward minus the prompt's mean."
            if new
            else ""
        ),
        evidence=_evidence(
            {
                phrase.text: f"in {phrase.best:.0%} of the best-rewarded answers, {phrase.worst:.0%} of the worst, "
                f"{phrase.before:.0%} of those of the first steps"
                for phrase in found
            }
        ),
        metrics=["length/mean"],
        rows=_suspects(run, data, chosen, data.above) if new else [],
    )


def _ensemble(run: Run, data: Samples) -> Found:
    names = [name for name in data.components if name.rpartition("/")[2] == "ensemble_std"]
    if not names:
        return "the reward is not an ensemble: it has no component ensemble_std"
    spread = data.components[names[0]]
    known = np.isfinite(spread)
    top, others = data.top & known, known & ~data.top
    if not top.any() or not others.any():
        return None
    best, rest = float(spread[top].mean()), float(spread[others].mean())
    if best < 1.5 * rest:
        return None
    bound, reward = float(np.quantile(spread[known], TOP)), float(np.quantile(data.reward, 0.75))
    return schema.Finding(
        id="ensemble",
        title="the ensemble disagrees where it pays most",
        level="look",
        text="The reward models of the ensemble differ most on the best-rewarded answers: these are far from what the "
        "models were trained on. A sample's score is how far the models differ on it (standard deviation).",
        evidence=_evidence(
            {
                "how far the models differ on the best-rewarded samples (standard deviation)": f"{best:.3g}",
                "on all others": f"{rest:.3g}" + (f" ({best / rest:.1f} times less)" if rest > 0 else ""),
            }
        ),
        metrics=[f"reward/component/{names[0]}"],
        rows=_suspects(run, data, known & (spread >= bound) & (data.reward >= reward), spread),
        filter=f'component."{names[0]}" >= {bound:.6g} and reward >= {reward:.6g}',
    )


def _last_token(run: Run) -> Found:
    points = run.metrics.training.points("prime/last_token_share")[-10:]
    share = float(np.mean([value for _, value in points])) if points else None
    if share is None:
        share = trends.last_token_share(tokens.of_samples(run.path, "process_reward"))
    if share is None:
        return "no process rewards were recorded"
    if share < 0.5:
        return None
    return schema.Finding(
        id="last_token",
        title="process rewards sit on the last token",
        level="look" if share > 0.8 else "note",
        text="A process reward that pays only at the end acts as an outcome reward: the earlier steps teach nothing.",
        evidence=_evidence({"share of a sample's process reward that is on its last token": f"{share:.0%}"}),
        metrics=["prime/last_token_share"],
        filter="tokens",
    )


OF_SAMPLES: dict[str, Callable[[Run, Samples], Found]] = {
    "wrong answers among the best-rewarded": _rewarded_wrong,
    "one part of the reward alone decides": _one_component,
    "length is paid for": _length,
    "digits are paid for": _digits,
    "phrases that are paid for": _phrases,
    "the ensemble disagrees where it pays most": _ensemble,
}
OF_METRICS: dict[str, Callable[[Run], Found]] = {
    "the reward rises while accuracy does not": _apart,
    "process rewards sit on the last token": _last_token,
}


def _evidence(facts: Mapping[str, str]) -> list[schema.Evidence]:
    return [schema.Evidence(label=label, value=value) for label, value in facts.items()]


def _suspects(run: Run, data: Samples, chosen: np.ndarray, score: np.ndarray) -> list[schema.Suspect]:
    """Return the chosen samples with the largest scores."""
    where = np.flatnonzero(chosen & np.isfinite(score))
    best = where[np.argsort(-score[where], kind="stable")[:ROWS]]
    values = {int(data.ids[i]): float(score[i]) for i in best}
    return [schema.Suspect(**one.model_dump(), score=values[one.id]) for one in summaries(run, list(values))]
