import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Without ``-m``, the long tests stay out; tests for a GPU skip where there is none."""
    if not config.option.markexpr and not any("::" in argument for argument in config.args):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def data():
    """The folder of real data."""
    root = os.environ.get("METADIST_DATA")
    if not root or not os.path.isdir(root):
        pytest.skip("needs real data: METADIST_DATA is not set to a folder")
    return root
