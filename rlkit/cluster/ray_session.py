"""The Ray session of a run: its own, or that of a cluster that it joins."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkit.cluster.janitor import TOKEN, end_processes, janitor
from rlkit.config.schema import ClusterConfig
from rlkit.experience import UserError
from rlkit.models.folder import WORKING_FOLDER

CONNECT_SECONDS = 10.0
AUTHENTICATION = "RAY_AUTH_MODE"
NO_IDLE_WORKERS = {"RAY_prestart_worker_first_driver": "0"}
"""Workers that Ray starts in advance have none of our actors' environments."""
LONGEST_BASE = 24
"""Most characters of the base for temporary folders: socket paths in them may have at most 107."""


@contextmanager
def ray_session(config: ClusterConfig, logs: Path, store_bytes: float) -> Iterator[None]:
    """Join the Ray at `cluster.address` (or of this Ray job), or else start one on the loopback interface; leave it at
    the end.

    A Ray started here ends with the context or this process. Its folder is removed; after an error its logs are copied
    to `logs`. Its servers bind only to 127.0.0.1 and require Ray's token, which other users of this machine do not
    have; only its metrics need none. Raises UserError if RAY_AUTH_MODE turns the token off. `store_bytes`: size of its
    object store.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU actors keep the device variables as set
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray._private.authentication.authentication_token_setup import _enable_token_auth

    address = config.address or os.environ.get("RAY_ADDRESS")
    here = {WORKING_FOLDER: str(Path.cwd())}  # a Ray that is joined was started in another folder
    with contextlib.ExitStack() as stack:
        if address:
            _refuse_silence(address)
            told = {"env_vars": here}
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, runtime_env=told)
            stack.callback(ray.shutdown)
        else:
            _refuse_open_doors()
            token, folder = uuid.uuid4().hex, _temporary_folder()
            own = {TOKEN: token, "TMPDIR": str(folder), AUTHENTICATION: "token", **here}
            stack.enter_context(_environment(**own, **NO_IDLE_WORKERS))
            _enable_token_auth()  # also Ray's default, but that may change, or Ray be imported already
            stack.enter_context(_changed_ray())
            stack.callback(ray.shutdown)
            stack.enter_context(janitor(token, folder, logs))
            _start(
                token,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=int(store_bytes),
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder / "ray"),  # Ray makes it writable for everybody, unlike `folder`
            )
        yield


def _start(token: str, **options: Any) -> None:
    """Start Ray, with a second try if needed: Ray waits 30 s for its node, however busy the machine is."""
    import ray

    for trial in (1, 2):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a plain Exception for this
            if "timed out during startup" not in str(error):
                raise
            if trial == 2:
                raise UserError(
                    "Ray timed out twice while starting: this machine is very busy, or out of memory; try again"
                ) from error
            end_processes(token)  # the part of Ray that had started


def _refuse_open_doors() -> None:
    mode = os.environ.get(AUTHENTICATION, "token")
    if mode.lower() != "token":
        raise UserError(
            f"{AUTHENTICATION}={mode} would let every user of this machine run code as you through the Ray that this "
            f"run starts; unset it (or {AUTHENTICATION}=token). To join a Ray that you started yourself: "
            "cluster.address=HOST:6379"
        )


@contextmanager
def _changed_ray() -> Iterator[None]:
    """Keep Ray's node address at 127.0.0.1, which Ray 2.60 replaces by one that other machines reach. Its servers bind
    only to loopback if the address really is 127.0.0.1, and to every interface otherwise.

    Also keep Ray from starting two processes that are not needed here: the reader of workers' logs, and the autoscaler.
    """
    from ray._private import services
    from ray._private.node import Node

    changes: list[tuple[Any, str, Any]] = [
        (services, "resolve_ip_for_localhost", lambda host: host),
        (Node, "start_log_monitor", lambda node: None),
        (Node, "start_monitor", lambda node: None),
    ]
    replaced = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, changed in changes:
        setattr(owner, name, changed)
    try:
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _temporary_folder() -> Path:
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    # Keep compiled kernels for the next run.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{base}/torchinductor_{os.getuid()}")
    if len(base) > LONGEST_BASE:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="rlkit-", dir=base))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _refuse_silence(address: str) -> None:
    """Raise ConnectionError if nothing listens at HOST:PORT: Ray would wait for minutes and say little."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return  # auto, or another form that Ray accepts
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray answers at {address} (cluster.address, or RAY_ADDRESS in the environment): {error}. "
            "`ray start --head` prints the address of the cluster it starts"
        ) from error
