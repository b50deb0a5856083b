"""The Ray a run lives in."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from rlkit.cluster.janitor import TOKEN, janitor
from rlkit.config.schema import ClusterConfig

CONNECT_SECONDS = 10.0


@contextmanager
def ray_session(config: ClusterConfig, logs: Path) -> Iterator[None]:
    """Join the Ray at `cluster.address` (or the one this Ray job runs in), else start one; leave it at the end.

    A Ray of one's own listens on the loopback interface only, has no dashboard, and ends with the context; if this
    process is killed, Ray's own reaper ends it. Its session folder is removed; what Ray logged is copied to the folder
    `logs` if the context does not end well.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU actors keep the device variables as set
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_silence(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        clearing: AbstractContextManager[None] = nullcontext()
    else:
        os.environ[TOKEN] = token = uuid.uuid4().hex
        context = ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=int(config.object_store_gib * 2**30),
            _node_ip_address="127.0.0.1",
        )
        clearing = janitor(token, context.address_info["session_dir"], logs)
    try:
        with clearing:
            yield
    finally:
        ray.shutdown()
        os.environ.pop(TOKEN, None)


def _refuse_silence(address: str) -> None:
    """Raise ConnectionError if nobody listens at HOST:PORT: Ray would wait for minutes and say little."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return  # auto, or another of Ray's forms
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray answers at {address} (cluster.address, or RAY_ADDRESS in the environment): {error}. "
            "`ray start --head` prints the address of the cluster it starts"
        ) from error
