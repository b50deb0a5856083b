"""What a metric means, how to read it and what to do about it: rows of docs/metrics.md (a test compares them).

The lights of the viewer explain themselves by the same words. Rows that no light or tile needs stand in the page alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricRow:
    """Texts are Markdown, as in the page."""

    names: tuple[str, ...]
    meaning: str
    reading: str
    remedy: str = ""

    @property
    def markdown(self) -> str:
        """The row of the page's table."""
        cells = (", ".join(f"`{name}`" for name in self.names), self.meaning, self.reading, self.remedy)
        return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


ROWS = (
    MetricRow(
        ("accuracy/heldout",),
        "share of right answers to held-out problems, judged by the verifier whatever the reward; with "
        "`evaluation.samples=k` the mean over k responses to each (avg@k)",
        "the curve that counts; with n problems it is uncertain by about 1/sqrt(n) (256: 6 points for 95 %)",
        "flat while `reward/mean` rises: the reward is being gamed, read `samples.jsonl`. Noisy: raise "
        "`trainer.evaluation_prompts` or `evaluation.samples`",
    ),
    MetricRow(
        ("reward/heldout",),
        "in its place, if the verifier does not say right or wrong: mean value of the held-out answers",
        "its scale is the verifier's own",
        "as above",
    ),
    MetricRow(
        (
            "accuracy/train",
            "reward/train",
        ),
        "the same for all samples that were judged for this step, those of rejected groups included",
        "runs ahead of the held-out one when the policy learns its training problems by rote",
        "a gap that grows: more data, fewer steps, more KL",
    ),
    MetricRow(
        ("reward/mean",),
        "mean reward of the valid samples of all groups judged for this step, those that filters rejected included "
        "(not of recorded responses, unless a reward scores them)",
        "should rise; its scale is the reward's own (POLAR's is unbounded)",
        "flat from the start: look at `group/all_equal_share` and at samples",
    ),
    MetricRow(
        ("reward/failed",),
        "samples of this step without a valid score (timed out, crashed, not finite, ...); they enter neither "
        "baselines nor loss",
        "should be 0; `reward/failed/<reason>` counts them by cause (`reward/failed/<part>/<reason>` in a "
        "combination), `reason` in `samples.jsonl` and `logs/` say more",
        "above `reward.max_failed_share` the run stops by itself. Timeouts: raise `reward.timeout_seconds` or "
        "`reward.workers`",
    ),
    MetricRow(
        ("group/all_equal_share",),
        "share of judged groups whose samples all got the same reward, among those with two valid samples or more; "
        "they teach nothing to algorithms that compare samples",
        "1.0 with a reward of 0: too hard; 1.0 with the highest: too easy. If nothing differs in the first five steps"
        " the run warns, and summary.json says `nothing_learnt`",
        "other problems, more samples per prompt, or a warmer start (`python -m rlkit.sft`)",
    ),
    MetricRow(
        ("policy/entropy",),
        "mean entropy of the next-token distribution, in nats",
        "falls slowly; near 0 the policy says the same every time and explores no more",
        "collapse: lower `learner.learning_rate`, raise the KL or entropy coefficient",
    ),
    MetricRow(
        ("policy/grad_norm",),
        "norm of the gradient before clipping",
        "mostly below `learner.max_grad_norm`; spikes are clipped",
        "always far above: lower the learning rate. Not finite: the update is skipped",
    ),
    MetricRow(
        ("policy/skipped_updates",),
        "optimizer steps of this training step skipped for a loss or gradient that was not finite",
        "should be 0",
        "`trainer.max_skipped_updates` in a row stop the run; bfloat16 or a far too high learning rate are the usual "
        "causes",
    ),
    MetricRow(
        ("kl/reference",),
        "KL divergence (estimated by `algorithm.kl_estimator`, per token, nats; preferences: k2 over what is "
        "compared, for recorded responses a distance only) of the policy from the reference; with "
        "`algorithm.rollout_correction` weighted as the loss is",
        "rises as it learns; more than about 0.1 per token is far from the reference",
        "raise the KL coefficient, lower the learning rate",
    ),
    MetricRow(
        (
            "length/mean",
            "length/max",
        ),
        "trained response tokens",
        "a steady climb without a gain in accuracy: the reward or the loss pays for length",
        "look at samples; try another `algorithm.aggregation`",
    ),
    MetricRow(
        ("length/truncated_share",),
        "share of responses cut off at `rollout.max_response_tokens`",
        "such answers are mostly wrong for want of an end",
        "above 0.1: raise the limit; `buffer.truncated=mask` leaves them out of baselines and loss, `drop_group` "
        "rejects their groups",
    ),
    MetricRow(
        (
            "mismatch/logprob_mean",
            "mismatch/logprob_max",
        ),
        "mean and largest absolute difference between the sampler's and the learner's log-probabilities of the same "
        "tokens, before the update",
        "fp32: below 1e-4. bfloat16: a mean of about 0.01 and single tokens of 0.1 and more",
        "higher: other dtypes or kernels, an option that changes what is sampled from ([sampling.md](sampling.md)), "
        "or stale weights; see `weights/canary_difference`. A mean above `trainer.max_mismatch` (0.2) in three steps "
        "in a row stops the run",
    ),
    MetricRow(
        ("mismatch/ess",),
        r"effective sample size of the step's tokens as a share of them: $(\sum w)^2 / (n \sum w^2)$ with $w = "
        r"\pi_{learner}/\pi_{sampler}$ per token",
        "1 if both agree; what remains of the batch at this staleness",
        "below 0.9: a lower `trainer.max_staleness`, or a lower learning rate",
    ),
    MetricRow(
        (
            "staleness/mean",
            "staleness/max",
        ),
        "how many updates ago the weights of a trained token were published; only reported where some were not the "
        "newest",
        "at most `trainer.max_staleness`; mostly near it while the learner is slower than the engines",
        "at its bound and the learning suffers: a lower bound, or `rollout_correction`",
    ),
    MetricRow(
        ("weights/canary_change",),
        "share of the learner's change on these prompts that the sampler shows, since the last publication at which "
        "it could be measured",
        "about 1; missing while the change is below the noise of both ends (in bfloat16 mostly)",
        "below 0.5 the run stops: the sampler has older weights",
    ),
    MetricRow(
        ("time/step",),
        "seconds of the whole step, evaluations left out",
        "the phases below need not add up to it: they may overlap, and the rest is the loop's own",
    ),
    MetricRow(
        ("time/learner_idle",),
        "seconds for which the learner waited for this step's groups: `time/generate` + `time/score`",
        "in synchronous training the whole sampling; 0 if the learner is the slow part",
        "large with `trainer.max_staleness` > 0: more `rollout.workers`, or a higher bound",
    ),
    MetricRow(
        ("time/engine_idle",),
        "mean over rollout workers: seconds between two publications in which the engine had nothing to sample",
        "in synchronous training the whole update",
        "large with `trainer.max_staleness` > 0: a higher bound; episodes: see `environment/wait_share`",
    ),
    MetricRow(
        ("critic/explained_variance",),
        "1 - Var(return - value) / Var(return)",
        "1: knows what comes; 0: no better than a constant; below 0: harmful",
        "stays near 0: raise `critic.learning_rate` or `critic.policy_waits_steps`",
    ),
    MetricRow(
        ("prm/pair_accuracy",),
        "share of (better, worse) pairs of a group that the PRM's scores order rightly, before it learns from them",
        "0.5 is chance; should rise above 0.6",
        "stays at 0.5: raise `reward.learning_rate`; rises while `accuracy/train` falls: the policy games the process"
        " reward",
    ),
    MetricRow(
        ("prime/last_token_share",),
        "share of process credit on the last token",
        "about 1 / length if credit is spread",
        "near 1: the PRM acts as an outcome reward",
    ),
)


def about(metric: str) -> MetricRow:
    """Raises KeyError for a metric without a row here."""
    for row in ROWS:
        if metric in row.names:
            return row
    raise KeyError(metric)


def plain(markdown: str) -> str:
    """Without links and marks of code."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")
