from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster():
    """Ray in this process, once for all tests."""
    from metadist.workers.ray import cluster as ray_cluster  # sets Ray's environment, so before ray

    ray = ray_cluster.ray
    # Where workers find the tests' families; a user's are in the working directory or beside the script.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    if not ray.is_initialized():
        ray_cluster.start_here(8, log_to_driver=False)
    del os.environ["PYTHONPATH"]
    yield ray
    ray.shutdown()
