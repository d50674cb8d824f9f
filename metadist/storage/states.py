"""The folders with the states of particles in a run directory: ``states/step-00000500/shard-00003.frame``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from metadist.storage.store import Store

_STEP = re.compile(r"step-(\d{8,})")


class StateFolders:
    """Name, check and remove the folders of states. Workers write and read the files; a file is a hashed frame."""

    def __init__(self, run_dir: str | Path) -> None:
        self._store = Store(run_dir, "states")
        self._root = self._store.path() if self._store.local else self._store.root

    def place(self, meta_step: int) -> str:
        """Return the folder of the states after ``meta_step`` meta-steps: an absolute path or a URL."""
        return f"{self._root}/step-{meta_step:08d}"

    def about(self, meta_step: int) -> dict[str, Any]:
        """Return what a checkpoint's manifest says about the states that belong to it."""
        return {"meta_step": meta_step, "files": self._files(meta_step)}

    def _files(self, meta_step: int) -> dict[str, int | None]:
        listed = self._store.listing(f"step-{meta_step:08d}")
        return {name: size for name, size in sorted(listed.items()) if name.endswith(".frame")}

    def problem(self, about: Mapping[str, Any] | None, shards: int) -> str | None:
        """Return why the states that a manifest describes can't be read, or None. Readers check the hashes."""
        if about is None:
            return "it was saved without the states of its particles"
        files, there = about["files"], self._files(about["meta_step"])
        if len(files) != shards:
            return f"it has the states of {len(files)} shards, expected {shards}"
        for name, size in files.items():
            if there.get(name) != size:
                return f"{self.place(about['meta_step'])}/{name} has {there.get(name, 'no')} bytes, expected {size}"
        return None

    def prune(self, keep: Collection[int]) -> None:
        """Remove the folders of all meta-steps that are not in ``keep``."""
        for name in self._store.listing(""):
            found = _STEP.fullmatch(name)
            if found and int(found[1]) not in keep:
                self._store.remove_tree(name)
