"""One Ray for all tests that need one: `from ray_fixture import ray_session  # noqa: F401`, then take `ray_session`."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlkit.cluster.janitor import TOKEN, janitor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with 2 CPUs, without dashboard; its workers find the repository and the tests."""
    import ray

    if ray.is_initialized():  # a test module before this one imported the fixture too
        yield
        return
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    token, folder = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="rlkit-", dir="/tmp"))
    os.environ[TOKEN] = token
    with janitor(token, folder, folder / "logs"):
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
            _temp_dir=str(folder / "ray"),
        )
        yield
    ray.shutdown()
    os.environ.pop(TOKEN, None)
