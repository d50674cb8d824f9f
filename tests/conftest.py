import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import lanes
import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)


def _lacking(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if item.get_closest_marker("data") and not os.path.isdir(os.environ.get("METADIST_DATA", "")):
        return "needs real data: METADIST_DATA is not set to a folder"
    given = getattr(item, "callspec", None)
    if given and any(str(v).startswith("metaworld_") for v in given.params.values()) and find_spec("metaworld") is None:
        return "needs the extra metaworld"
    return None


def pytest_configure(config):
    for lane, reason in lanes.LANES.items():
        config.addinivalue_line("markers", f"{lane}: a test that {reason}")
    config.pluginmanager.register(lanes.Guard())


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups and before -m selects
def pytest_collection_modifyitems(items):
    lanes.assign(items)
    for item in items:
        if reason := _lacking(item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def unrendered(request, monkeypatch):
    """Plots are built and their files are empty: to render them takes two thirds of a short run.

    Tests that look at the pictures are marked ``renders``.
    """
    if request.node.get_closest_marker("renders") is None:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(scope="session")
def data():
    """The folder of real data."""
    root = os.environ.get("METADIST_DATA", "")
    if not os.path.isdir(root):
        pytest.skip("needs real data: METADIST_DATA is not set to a folder")
    return root


@pytest.fixture(scope="session")
def cluster():
    """Ray in this process, once for all tests."""
    from metadist.workers.ray import cluster as ray_cluster  # sets Ray's environment, so before ray

    ray = ray_cluster.ray
    # Where workers find the tests' families; a user's are in the working directory or beside the script.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    if not ray.is_initialized():
        ray_cluster.start_here(8, log_to_driver=False)
    del os.environ["PYTHONPATH"]
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory, worker_id):
    """``empty_store(path)`` puts an empty MLflow store there: MLflow takes ten seconds to make one, so one is made
    per session.
    """
    from metadist.tracking.mlflow_uri import prepare_sqlite

    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent  # shared by the processes of xdist
    with FileLock(str(folder / "empty.lock")):
        prepare_sqlite(f"sqlite:///{folder}/empty.db", folder)

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "empty.db", path)

    return put
