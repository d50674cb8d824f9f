"""Save and load checkpoints on any fsspec URL: payload first, manifest last.

A step without a valid manifest is no checkpoint.

::

    RUN_DIR/checkpoints/step-00000500/state.safetensors    slots/<name>, outer/<name>
                                      manifest.json        hashes of everything, and of itself

The order of the writes makes a save atomic without a rename, so object stores work too. On a local disk each file is
also written to a temporary name, synced and renamed. A save never overwrites a payload that a manifest refers to: a
second save of a step uses another file name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from metadist.core.errors import CheckpointError
from metadist.core.state import Slot, State
from metadist.storage.store import Store, why

FORMAT = 1

_log = logging.getLogger(__name__)
_PAYLOAD, _MANIFEST = "state.safetensors", "manifest.json"
_STEP, _FILE = re.compile(r"step-(\d{8,})"), re.compile(r"\w[\w.-]*")
# The manifest's last line is the hash of all bytes before that line: nothing is parsed before the hash is checked.
_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n\}\n')
_SEAL_BYTES = len(',\n "sha256": ""\n}\n') + 64

Status = Literal["good", "unfinished", "damaged", "unreadable", "foreign"]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in fresh CPU memory. ``manifest`` is the manifest that the caller gave to ``save``."""

    meta_step: int
    state: State
    manifest: dict[str, Any]
    score: float | None
    path: str


@dataclass(frozen=True)
class CheckpointEntry:
    """One step's directory, judged by its manifest and file sizes; only loading checks the payloads' hashes.

    ``status``: ``unfinished`` means no manifest, ``unreadable`` a store that fails, ``foreign`` another format version.
    """

    meta_step: int
    path: str
    status: Status = "good"
    score: float | None = None
    problem: str = ""


class _Unusable(Exception):
    """A checkpoint cannot be used; the message says why."""

    def __init__(self, reason: str, status: Status = "damaged") -> None:
        super().__init__(reason)
        self.status: Status = status


class Checkpoints:
    """Keep the newest ``keep`` checkpoints of one run, and the best by validation score.

    ``run_dir``: a local path or any fsspec URL. One process writes; any number of processes may read.
    Raises ``CheckpointError`` if the URL's protocol is unknown or the protocol's driver isn't installed.
    """

    def __init__(self, run_dir: str | Path, *, keep: int = 2, higher_is_better: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must be kept")
        self.keep, self.higher_is_better, self.run_dir = keep, higher_is_better, run_dir
        try:
            self._store = Store(run_dir, "checkpoints")
        except (ValueError, ImportError) as error:
            raise CheckpointError(f"{run_dir} can't be used: {error}") from error
        self._damaged: dict[
            int, str
        ] = {}  # by meta-step: a payload's hash was wrong, although manifest and sizes look right

    def save(
        self,
        meta_step: int,
        state: State,
        manifest: Mapping[str, Any],
        *,
        slots: Mapping[str, Slot],
        score: float | None = None,
    ) -> bool:
        """Store a checkpoint, then remove those that are no longer kept. Return whether it is stored and synced.

        ``manifest``: strict JSON. ``score``: the validation score; None or a non-finite score never counts as best.

        If the store fails (disk full, network), log a warning and return False: older checkpoints stay, no half-written
        file stays, the run continues. Saving the same content again writes nothing; other content replaces the old.
        Raises ``ValueError`` for a state that does not fit ``slots`` or a manifest that is not JSON.
        """
        described = {name: _describe(slot) for name, slot in slots.items()}
        if misfit := _misfit(state.slots, described):
            raise ValueError(misfit)
        score = float(score) if score is not None and math.isfinite(score) else None
        body = {"format": FORMAT, "meta_step": meta_step, "score": score, "slots": described}
        try:
            body["run"] = json.loads(json.dumps(dict(manifest), allow_nan=False))
        except TypeError as error:
            raise ValueError(f"the manifest isn't JSON: {error}") from error
        payload = _serialize(
            {f"slots/{n}": t for n, t in state.slots.items()} | {f"outer/{n}": t for n, t in state.outer.items()}
        )
        try:
            file = self._write(body, payload)
        except Exception as error:  # each fsspec backend raises its own errors; none of them may end the run
            _log.warning("checkpoint of meta-step %d not saved in %s: %s", meta_step, self._store.root, why(error))
            return False
        if file is None:
            return True
        try:
            self._prune(meta_step, {file, _MANIFEST})
        except Exception as error:
            _log.warning("old checkpoints not removed from %s: %s", self._store.root, why(error))
        return True

    def _write(self, body: dict[str, Any], payload: bytes) -> str | None:
        """Write payload and manifest; return the payload's file name, or None if both are stored already.

        On an error of the store: remove the files that this call wrote, and raise.
        """
        about, directory = _about(payload), _directory(body["meta_step"])
        present, file, kept = None, _PAYLOAD, False
        try:
            present = self._store.listing(directory)
            if _MANIFEST in present:
                file, kept, equal = self._reuse(body, about)
                if equal:
                    return None
            if not kept:
                self._store.write(f"{directory}/{file}", payload)
            self._store.write(f"{directory}/{_MANIFEST}", _seal({**body, "files": {file: about}}))
        except Exception:
            with contextlib.suppress(Exception):
                if present is not None and _MANIFEST not in present:
                    self._remove(directory)
                elif present is not None and not kept:
                    self._store.remove(f"{directory}/{file}")
            raise
        return file

    def _reuse(self, body: dict[str, Any], about: dict[str, Any]) -> tuple[str, bool, bool]:
        """Return a stored step's payload file, whether it holds this payload, and whether the manifest is equal too."""
        file = f"state-{about['sha256'][:16]}.safetensors"
        with contextlib.suppress(_Unusable, CheckpointError):
            old = self._verify(body["meta_step"])[0]
            files = old.pop("files")
            file = next((n for n, a in files.items() if a == about), file)
            return file, file in files, file in files and old == body
        return file, False, False

    def latest(
        self, slots: Mapping[str, Slot] | None = None, problem: Callable[[Loaded], str | None] = lambda loaded: None
    ) -> Loaded | None:
        """Return the newest checkpoint whose hashes are right; None if there is none. Skip damaged ones with a warning.

        ``problem`` returns a further reason to skip one, or None.
        Raises ``CheckpointError`` if checkpoints exist but none can be used, or if one is of another format version or,
        where ``slots`` is given, of another model. A single interrupted save counts as none: it was the first save.
        """
        return self._first(sorted(self.list(), key=lambda e: -e.meta_step), slots, problem)

    def best(self, slots: Mapping[str, Slot] | None = None) -> Loaded | None:
        """Return the checkpoint with the best score (the earliest of equals), or None; errors as in ``latest``."""
        return self._first(self._ranked(self.list()), slots)

    def load(self, meta_step: int, slots: Mapping[str, Slot] | None = None) -> Loaded:
        """Return the checkpoint of one meta-step. Raises ``CheckpointError`` if it is missing or cannot be used."""
        try:
            return self._load(meta_step, slots)
        except _Unusable as error:
            steps = ", ".join(str(e.meta_step) for e in self.list() if e.status == "good") or "none"
            raise CheckpointError(f"checkpoint {self._path(meta_step)}: {error}; whole ones: {steps}") from error

    def list(self) -> Sequence[CheckpointEntry]:
        """Return an entry for each step that has a directory, usable or not, oldest first.

        Raises ``CheckpointError`` if the store fails.
        """
        try:
            steps = [_STEP.fullmatch(name) for name in self._store.listing("")]
        except Exception as error:
            raise CheckpointError(f"{self._store.root} can't be listed: {why(error)}") from error
        return [self._entry(step) for step in sorted(int(m[1]) for m in steps if m)]

    def _path(self, meta_step: int) -> str:
        return f"{self._store.root}/{_directory(meta_step)}"

    def _entry(self, meta_step: int) -> CheckpointEntry:
        path = self._path(meta_step)
        try:
            body, sizes = self._manifest(meta_step), self._store.listing(_directory(meta_step))
            for file, about in body["files"].items():
                if sizes.get(file) != about["bytes"]:
                    raise _Unusable(f"{file} has {sizes.get(file, 'no')} bytes, expected {about['bytes']}")
            if meta_step in self._damaged:
                raise _Unusable(self._damaged[meta_step])
        except _Unusable as error:
            return CheckpointEntry(meta_step, path, error.status, None, str(error))
        except CheckpointError as error:
            return CheckpointEntry(meta_step, path, "foreign", None, str(error))
        return CheckpointEntry(meta_step, path, "good", body["score"])

    def _ranked(self, entries: Iterable[CheckpointEntry]) -> Sequence[CheckpointEntry]:
        scored = [e for e in entries if e.status == "good" and e.score is not None]
        return sorted(scored, key=lambda e: (-e.score if self.higher_is_better else e.score, e.meta_step))  # type: ignore[operator]

    def _prune(self, current: int, files: set[str]) -> None:
        """Remove unfinished and damaged steps, and good ones that are neither new, nor the best, nor ``current``.

        Of ``current``, remove each file that is not in ``files``.
        """
        self._damaged.pop(current, None)
        entries = self.list()
        good = [e for e in entries if e.status == "good"]
        keep = {current, *(e.meta_step for e in good[-self.keep :]), *(e.meta_step for e in self._ranked(good)[:1])}
        for entry in entries:
            if entry.meta_step not in keep and entry.status in ("good", "unfinished", "damaged"):
                self._remove(_directory(entry.meta_step))
                self._damaged.pop(entry.meta_step, None)
        for file in self._store.listing(_directory(current)):
            if file not in files:
                self._store.remove(f"{_directory(current)}/{file}")

    def _remove(self, directory: str) -> None:
        self._store.remove(f"{directory}/{_MANIFEST}")  # first: a half-removed step must not look complete
        self._store.remove_tree(directory)

    def _first(
        self,
        entries: Sequence[CheckpointEntry],
        slots: Mapping[str, Slot] | None,
        problem: Callable[[Loaded], str | None] = lambda loaded: None,
    ) -> Loaded | None:
        problems = []
        for entry in entries:
            try:
                loaded = self._load(entry.meta_step, slots)
                if found := problem(loaded):
                    raise _Unusable(found)
                return loaded
            except _Unusable as error:
                problems.append(error)
                _log.warning("checkpoint %s skipped: %s", entry.path, error)
        if not problems or (len(problems) == 1 and problems[0].status == "unfinished"):
            return None
        reasons = "; ".join(f"meta-step {e.meta_step}: {p}" for e, p in zip(entries, problems))
        raise CheckpointError(f"no checkpoint in {self._store.root} can be used: {reasons}")

    def _load(self, meta_step: int, slots: Mapping[str, Slot] | None) -> Loaded:
        path, body = self._path(meta_step), self._manifest(meta_step)
        if slots is not None and (difference := _difference(body["slots"], slots)):
            raise CheckpointError(f"checkpoint {path} is of another model: {difference}")
        body, payloads = self._verify(meta_step)
        try:
            tensors = {n: t for data in payloads.values() for n, t in _deserialize(data).items()}
        except Exception as error:  # the hashes are right, so the file was written like this
            raise _Unusable(f"{sorted(payloads)} cannot be read as safetensors: {why(error)}") from error
        parts = {k: {n[6:]: t for n, t in tensors.items() if n.startswith(k)} for k in ("slots", "outer")}
        if misfit := _misfit(parts["slots"], body["slots"]):
            raise _Unusable(misfit)
        self._damaged.pop(meta_step, None)
        return Loaded(body["meta_step"], State(**parts), body["run"], body["score"], path)

    def _read(self, meta_step: int, file: str) -> bytes:
        try:
            return self._store.read(f"{_directory(meta_step)}/{file}")
        except FileNotFoundError:
            raise _Unusable(f"{file} is missing", "unfinished" if file == _MANIFEST else "damaged") from None
        except Exception as error:
            raise _Unusable(f"{file} can't be read: {why(error)}", "unreadable") from error

    def _manifest(self, meta_step: int) -> dict[str, Any]:
        body = _unseal(self._read(meta_step, _MANIFEST))
        if body["format"] != FORMAT:
            raise CheckpointError(f"{self._path(meta_step)} has format version {body['format']}, expected {FORMAT}")
        if body["meta_step"] != meta_step or not all(map(_FILE.fullmatch, body["files"])):
            raise _Unusable(f"{_MANIFEST} is of meta-step {body['meta_step']} and files {sorted(body['files'])}")
        return body

    def _verify(self, meta_step: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return manifest and payloads (file → bytes) after checking every hash."""
        body = self._manifest(meta_step)
        payloads = {file: self._read(meta_step, file) for file in body["files"]}
        for file, about in body["files"].items():
            if (found := _about(payloads[file])) != about:
                what = "sha256" if found["bytes"] == about["bytes"] else "bytes"
                problem = f"{file} is damaged: {what} {found[what]}, expected {about[what]}"
                self._damaged[meta_step] = problem
                raise _Unusable(problem)
        return body, payloads


def export_parameters(
    path: str | Path, parameters: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write parameters under the model's own names to one safetensors file, at a local path or any fsspec URL.

    Tied tensors are written once per name. Raises ``CheckpointError`` if the file cannot be written.
    """
    data = _serialize(parameters, metadata)
    try:
        Store(path).write("", data)
    except Exception as error:
        raise CheckpointError(f"parameters can't be written to {path}: {why(error)}") from error


def load_parameters(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file (a local path or any fsspec URL), in fresh CPU memory.

    The format has no hash, so flipped bits in values are not detected. Raises ``CheckpointError`` for a missing or
    malformed file.
    """
    try:
        return _deserialize(Store(path).read(""))
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except Exception as error:  # safetensors raises KeyError, ValueError and its own errors for malformed headers
        raise CheckpointError(f"{path} is no readable safetensors file: {why(error)}") from error


def exported_metadata(path: str | Path) -> dict[str, str]:
    """Return the ``metadata`` that ``export_parameters`` wrote; empty for files that other programs wrote."""
    try:
        data = Store(path).read("")
        size = int.from_bytes(data[:8], "little")
        return {str(k): str(v) for k, v in json.loads(data[8 : 8 + size]).get("__metadata__", {}).items()}
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except Exception as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {why(error)}") from error


def _directory(meta_step: int) -> str:
    return f"step-{meta_step:08d}"


def _about(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, indent=1, allow_nan=False).removesuffix("\n}").encode()
    return text + b',\n "sha256": "%s"\n}\n' % hashlib.sha256(text).hexdigest().encode()


def _unseal(data: bytes) -> dict[str, Any]:
    seal = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if not seal or hashlib.sha256(data[:-_SEAL_BYTES]).hexdigest().encode() != seal[1]:
        raise _Unusable(f"{_MANIFEST} is damaged: its own hash is wrong")
    body = json.loads(data)
    del body["sha256"]
    return body


def _serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    own, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()  # safetensors refuses views and tied tensors
        seen.add(storage.data_ptr())
        own[name] = tensor
    return safetensors.torch.save(own, dict(metadata) if metadata else None)


def _deserialize(data: bytes) -> dict[str, Tensor]:
    """Return copies: views of a file's bytes are misaligned, and vectorised kernels then differ in the last bits."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}


def _describe(slot: Slot) -> dict[str, Any]:
    return {
        "rule": slot.rule,
        "dtype": str(slot.layout.dtype).removeprefix("torch."),
        "fingerprint": slot.layout.fingerprint,
        "numel": slot.layout.numel,
        "parameters": {name: list(shape) for name, shape in zip(slot.layout.names, slot.layout.shapes)},
    }


def _misfit(vectors: Mapping[str, Tensor], described: Mapping[str, Mapping[str, Any]]) -> str:
    if vectors.keys() != described.keys():
        return f"the state has slots {sorted(vectors)}, expected {sorted(described)}"
    for name, vector in vectors.items():
        dtype, shape = str(vector.dtype).removeprefix("torch."), list(vector.shape)
        if dtype != described[name]["dtype"] or shape != [described[name]["numel"]]:
            return f"slot {name} is {dtype} {shape}, expected {described[name]['dtype']} [{described[name]['numel']}]"
    return ""


def _difference(stored: Mapping[str, Mapping[str, Any]], slots: Mapping[str, Slot]) -> str:
    """Describe the first difference between a checkpoint's slots and the model's; empty if there is none."""
    for name in sorted(stored.keys() | slots.keys()):
        if name not in slots or name not in stored:
            return f"slot {name} is {'not in this model' if name in stored else 'missing from it'}"
        there, here = stored[name], _describe(slots[name])
        for key in ("rule", "dtype"):
            if there[key] != here[key]:
                return f"{key} of slot {name} is {there[key]}, this model's is {here[key]}"
        theirs, ours = there["parameters"], here["parameters"]
        for parameter in [*ours, *theirs]:
            a, b = theirs.get(parameter, "missing"), ours.get(parameter, "missing")
            if a != b:
                return f"slot {name}, parameter {parameter} is {a}, this model's is {b}"
        if there["fingerprint"] != here["fingerprint"]:
            return f"the parameters of slot {name} are in another order"
    return ""
