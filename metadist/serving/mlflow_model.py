"""Load a registered model for MLflow: adapt to the support set in the input, and predict the queries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.core.errors import ConfigError
from metadist.core.signature import InvalidInput
from metadist.core.tree import Tree, named, of_names
from metadist.serving.load import open_model

INPUTS = ("support_x", "support_y", "query_x")


class AdaptingModel:
    """The Python model of a registered meta-learner."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def predict(
        self, model_input: Mapping[str, Any], params: Mapping[str, Any] | None = None
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Adapt and predict.

        Arrays support_x [N, …], support_y [N, …] and query_x [Q, …] give logits or values [Q, …]. The arrays of a dict
        or tuple have names such as support_x.ids and query_x.0; a prediction of several arrays is a dict by name. The
        parameter ``inner_steps`` is the number of adaptation steps; missing or negative: as in training.
        """
        x, y, query = (_tree(model_input, name) for name in INPUTS)
        steps = (params or {}).get("inner_steps")
        asked = None if steps is None or steps < 0 else int(steps)
        found = {n: t.cpu().numpy() for n, t in named(self._model.adapt_predict(x, y, query, asked)).items()}
        return found[""] if list(found) == [""] else found


def _tree(model_input: Mapping[str, Any], name: str) -> Tree:
    """Return the tensors of the arrays ``name`` or ``name.*``."""
    given = {n: torch.from_numpy(np.array(model_input[n])) for n in model_input if n.partition(".")[0] == name}
    if not given:
        raise ConfigError(f"the input has no {name}; expected arrays {', '.join(INPUTS)}")
    try:
        return of_names({n.partition(".")[2]: tensor for n, tensor in given.items()})
    except ValueError as error:
        raise InvalidInput(f"{name}: {error}") from None


def _load_pyfunc(data_path: str) -> AdaptingModel:
    """Return the model in ``data_path``. MLflow finds this function by its name.

    A model with code of its own needs the names of its modules in the environment variable METADIST_TRUST: MLflow's
    model_config is a part of the model, whose author must not grant trust.
    """
    path = Path(data_path)
    return AdaptingModel(open_model(str(path / "model.safetensors" if path.is_dir() else path)))
