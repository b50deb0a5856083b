"""The Ray a run lives in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rlkit.config.schema import ClusterConfig


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Join the Ray at `cluster.address` (or the one this Ray job runs in), else start one; leave it at the end.

    A Ray of one's own listens on the loopback interface only, has no dashboard, and ends with the context; if this
    process is killed, Ray's own reaper ends it.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU actors keep the device variables as set
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=int(config.object_store_gib * 2**30),
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()
