"""Rewards in processes of their own: workers with deadlines, the pool of them, and what becomes of failures."""

from rlkit.serving.results import RewardFailed, ScoreReport, check_failures

__all__ = ["RewardFailed", "ScoreReport", "check_failures"]
