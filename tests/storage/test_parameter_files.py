"""Exported parameters: safetensors files under the model's own names; hostile files are refused in one line."""

from __future__ import annotations

import random
import uuid

import pytest
import torch

from metadist.core.errors import CheckpointError
from metadist.storage.checkpoints import export_parameters, load_parameters


def test_parameters_are_exported_under_their_own_names(tmp_path):
    tied = torch.randn(3, 2)
    parameters = {"embed.weight": tied, "head.weight": tied, "bias": torch.zeros(0, dtype=torch.float64)}
    for path in (tmp_path / "a/b.safetensors", f"memory://{uuid.uuid4().hex}/p.safetensors"):
        export_parameters(path, parameters, {"meta_step": "5"})
        loaded = load_parameters(path)
        assert loaded.keys() == parameters.keys()
        assert all(loaded[n].equal(t) for n, t in parameters.items())
    from safetensors import safe_open

    with safe_open(tmp_path / "a/b.safetensors", "pt") as file:
        assert file.metadata() == {"meta_step": "5"}


def hostile_files() -> dict[str, bytes]:
    def header(text: str, length: int | None = None) -> bytes:
        return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()

    return {
        "empty": b"",
        "noise": random.Random(0).randbytes(1000),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zip": b"PK\x03\x04" + bytes(100),
        "endless header": header("{}", 2**63),
        "out of bounds": header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        "negative": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
        "overflow": header('{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        "unknown dtype": header('{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        "no json": header("{{{{{{{{"),
        "deep": header("[" * 100_000),
    }


@pytest.mark.parametrize("name", hostile_files())
def test_hostile_parameter_files_are_refused_in_one_line(tmp_path, name):
    path = tmp_path / "p.safetensors"
    path.write_bytes(hostile_files()[name])
    with pytest.raises(CheckpointError, match="is no readable safetensors file") as error:
        load_parameters(path)
    assert "\n" not in str(error.value)


def test_missing_and_unwritable_parameter_files_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        load_parameters(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError):
        load_parameters(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can't be written"):
        export_parameters(tmp_path / "file/below.safetensors", {"a": torch.zeros(1)})


def test_truncated_parameter_files_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    export_parameters(path, {"a": torch.arange(9.0), "b": torch.arange(3)})
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(CheckpointError):
            load_parameters(path)
