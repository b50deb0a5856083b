"""Names of the metrics that a run can report (docs/metrics.md says what they mean)."""

_BY_AREA = {
    "accuracy": "heldout heldout/low heldout/high train",
    "reward": "heldout heldout/low heldout/high train mean mean_trained std overlong_penalty failed greedy_mean",
    "evaluation": "samples unjudged length_mean truncated_share",
    "data": "epochs retired",
    "group": "all_equal_share",
    "policy": "loss entropy entropy_coefficient clip_share grad_norm learning_rate skipped_updates waits "
    "optimizer_steps trained_samples silent_samples",
    "kl": "reference coefficient rollout",
    "advantage": "mean_absolute return_mean return_std zero_share",
    "length": "mean max truncated_share",
    "environment": "turns segments success malformed_share observation_tokens budget_share wait_share",
    "mismatch": "logprob_mean logprob_max weight_mean weight_cut_share ess",
    "staleness": "mean max mixed_share",
    "weights": "version canary_difference canary_change",
    "time": "step generate score advantages update publish reward_busy evaluate learner_idle engine_idle frozen",
    "tokens": "per_second",
    "buffer": "ready in_flight rejected rejected_all_right rejected_all_wrong surplus",
    "critic": "loss grad_norm learning_rate skipped_updates value_mean return_mean explained_variance clip_share",
    "prm": "pair_accuracy heldout_pair_accuracy brier calibration_error sign_accuracy loss grad_norm skipped_updates "
    "score_mean score_p95",
    "preference": "accuracy margin chosen_reward rejected_reward chosen_logprob rejected_logprob loss loss_at_start "
    "pairs paired_share chosen_length rejected_length gain agreement good_share baseline shift heldout_accuracy "
    "heldout_margin heldout_loss",
    "logprob": "heldout",
    "distill": "reverse_kl",
    "igpo": "answer gain",
    "progress": "error variance",
    "amft": "mu demonstration_tokens",
    "prime": "process_variance_share return_mean return_std return_length_correlation last_token_share",
    "ratio_shift": "mean std clipped_positive clipped_negative",
    "drift": "chosen rejected kl",
    "reward_gap": "accuracy gap",
    "starc": "distance angle",
    "judge_fpr": "max mean",
}
METRICS = frozenset(f"{area}/{name}" for area, names in _BY_AREA.items() for name in names.split())
FAMILIES = (
    "reward/component/",
    "reward/failed/",
    "environment/failed/",
    "environment/metric/",
    "data/epochs/",
    "evaluation/environment/",
    "evaluation/pass@",
    "evaluation/best@",
)
"""Beginnings of names that end with a part, a cause or a number."""
