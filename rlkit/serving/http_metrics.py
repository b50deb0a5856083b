"""What a reward server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Bounds of the histograms."""
MOST_REASONS = 50
"""Reasons are words of the reward's; a reward that writes a new one for every sample must not fill the memory."""


class ServerMetrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._reasons: set[str] = set()
        self.requests = Counter("rlkit_requests", "Requests answered", ["status"], registry=self.registry)
        self.samples = Counter("rlkit_samples", "Samples judged", registry=self.registry)
        self.failed = Counter("rlkit_failed_samples", "Samples without a score", ["reason"], registry=self.registry)
        self.restarts = Counter(
            "rlkit_worker_failures", "Calls that cost a process", ["reason"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "rlkit_request_seconds", "From request to answer", buckets=SECONDS, registry=self.registry
        )
        self.scoring_seconds = Histogram(
            "rlkit_scoring_seconds", "One call of the reward", buckets=SECONDS, registry=self.registry
        )
        self.batch_samples = Histogram(
            "rlkit_batch_samples", "Samples scored together", buckets=(1, 4, 16, 64, 256, 1024), registry=self.registry
        )
        self.queued = Gauge("rlkit_queued_samples", "Samples that wait", registry=self.registry)

    def count_failures(self, failures: Mapping[str, int]) -> None:
        """Add samples without a score, by reason class."""
        for reason, count in failures.items():
            self.failed.labels(self._label(reason)).inc(count)

    def count_worker_failure(self, reason: str) -> None:
        """A call after which the process was replaced."""
        self.restarts.labels(self._label(reason.partition(":")[0])).inc()

    def text(self) -> bytes:
        """The answer of /metrics."""
        return generate_latest(self.registry)

    def _label(self, reason: str) -> str:
        if reason not in self._reasons and len(self._reasons) >= MOST_REASONS:
            return "other"
        self._reasons.add(reason)
        return reason[:60]
