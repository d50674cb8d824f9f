"""Read parameters that ``torch.save`` wrote, without running code of the file."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from metadist.core.errors import CheckpointError
from metadist.storage.store import Store, why

#: the endings of files that ``torch.save`` writes
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
#: keys under which programs nest the parameters in a checkpoint
NESTED = ("state_dict", "model_state_dict", "model")


def load_torch_parameters(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that ``torch.save`` wrote (a local path or any fsspec URL), on the CPU.

    The file may be a checkpoint that nests them. Raises ``CheckpointError`` for a file that holds anything but tensors
    and plain values, because reading it would run its code.
    """
    try:
        found = torch.load(io.BytesIO(Store(path).read("")), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects besides tensors, and reading them would run code of the file; save the parameters "
            "alone: safetensors.torch.save_file(model.state_dict(), 'model.safetensors'), or "
            "torch.save(model.state_dict(), …)"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is no readable file of torch.save: {why(error)}") from error
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(
            f"{path} holds no parameters by name; expected torch.save(model.state_dict(), …), or a checkpoint with one "
            f"under {', '.join(NESTED)}"
        )
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
