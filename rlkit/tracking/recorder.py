"""Writes each step's samples to disk for later inspection, and the tokens of some of them."""

from __future__ import annotations

from collections.abc import Sequence

from algorithms.base import Advantages, Experience
from rlkit.config.tracking import TrackingConfig
from rlkit.experience import Group
from rlkit.experience.filters import GroupFilter, why_dropped
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.samples import chosen_groups, sample_rows, untrained, verdicts_by_group
from rlkit.tracking.tokens import Pieces, Signals, TokenFolder, token_table, watched_samples


class Recorder:
    """Writes in the background during the next step, in order. Failures are reported; training continues."""

    def __init__(
        self, config: TrackingConfig, folder: RunFolder, rejected_by: GroupFilter, pieces: Pieces | None = None
    ) -> None:
        """`pieces` gives the text of each token."""
        self.config, self.folder, self.rejected_by, self.pieces = config, folder, rejected_by, pieces
        self.tokens = TokenFolder(folder.tokens, config.token_gib * 2**30)

    def step(
        self,
        experience: Experience,
        advantages: Advantages,
        rejected: Sequence[Group] = (),
        judged: Sequence[Group] | None = None,
        signals: Signals | None = None,
    ) -> None:
        """Record a trained step. `judged`: its groups, and the rejected ones, as the verifier scores them; `signals`:
        those of the update."""

        def work() -> None:
            self._samples(experience, advantages, rejected, judged)
            if watched := watched_samples(experience, self.config):
                table = token_table(experience, advantages, signals or {}, watched, self.pieces)
                self.tokens.write(experience.step, table)

        self.folder.writer.put(_records(experience.step), work)

    def failed(self, step: int, groups: Sequence[Group]) -> None:
        """Record the groups that the reward got in a step that ends the run because of its scores."""
        config, reasons = self.config, {group.id: "step_failed" for group in groups}
        limit, keep = config.sample_groups_per_step, config.keep_samples

        def work() -> None:
            self.folder.append_samples(sample_rows(step, groups, None, limit, keep=keep, dropped=reasons))

        self.folder.writer.put(_records(step), work)

    def _samples(
        self,
        experience: Experience,
        advantages: Advantages,
        rejected: Sequence[Group],
        judged: Sequence[Group] | None,
    ) -> None:
        step, groups, config = experience.step, experience.groups, self.config
        limit, keep, said = config.sample_groups_per_step, config.keep_samples, verdicts_by_group(judged)
        reasons = untrained(groups, advantages.keep)
        rows = sample_rows(step, groups, advantages.tokens, limit, keep=keep, judged=said, dropped=reasons)
        reasons = {group.id: why_dropped(group, self.rejected_by) for group in rejected}
        as_many = len(chosen_groups(step, groups, limit))
        rows += sample_rows(step, rejected, None, as_many, keep=keep, judged=said, dropped=reasons)
        self.folder.append_samples(rows)


def _records(step: int) -> str:
    return f"samples.jsonl and tokens/ of step {step}"
