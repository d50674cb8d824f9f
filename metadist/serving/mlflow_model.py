"""Load a registered model for MLflow: adapt to the support set in the input, and predict the queries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.core.errors import ConfigError
from metadist.serving.load import open_model

INPUTS = ("support_x", "support_y", "query_x")


class AdaptingModel:
    """The Python model of a registered meta-learner."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def predict(self, model_input: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Adapt and predict.

        Arrays support_x [N, …], support_y [N, …] and query_x [Q, …] give logits or values [Q, …]. The parameter
        ``inner_steps`` is the number of adaptation steps; missing or negative: as in training.
        """
        missing = [n for n in INPUTS if n not in model_input]
        if missing:
            raise ConfigError(f"the input has no {', '.join(missing)}; expected arrays {', '.join(INPUTS)}")
        x, y, query = (torch.from_numpy(np.array(model_input[n])) for n in INPUTS)
        steps = (params or {}).get("inner_steps")
        asked = None if steps is None or steps < 0 else int(steps)
        return self._model.adapt_predict(x, y, query, asked).cpu().numpy()


def _load_pyfunc(data_path: str) -> AdaptingModel:
    """Return the model in ``data_path``. MLflow finds this function by its name.

    A model with code of its own needs the names of its modules in the environment variable METADIST_TRUST: MLflow's
    model_config is a part of the model, whose author must not grant trust.
    """
    path = Path(data_path)
    return AdaptingModel(open_model(str(path / "model.safetensors" if path.is_dir() else path)))
