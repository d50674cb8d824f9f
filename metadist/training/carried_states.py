"""The states of particles between meta-steps: saved in time, and restored where a run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from metadist.core.computation import LoadStates, SaveStates
from metadist.core.errors import MetadistError
from metadist.core.round import Round, Shard
from metadist.storage.checkpoints import Checkpoints
from metadist.storage.states import StateFolders
from metadist.training.progress import Progress, Run
from metadist.training.scheduler import Scheduler

log = logging.getLogger(__name__)

#: the θs since the last saved states may take this many bytes; more, and the states are saved earlier
THETA_BYTES = 1 << 30


class CarriedStates:
    """Saves and restores the states that the meta-steps of ``run`` hand on. The states stay with the workers.

    A worker whose states are lost computes them again, from the last saved states on, under the θ of every meta-step
    since then. Executors keep those θs. Learners that carry no states need none of this.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, workers: Scheduler) -> None:
        self._run, self._checkpoints, self._workers = run, checkpoints, workers
        self._folders = StateFolders(checkpoints.run_dir)
        #: the meta-step of the last saved states, and that of the last attempt
        self._saved = self._tried = 0

    def _needed(self, progress: Progress) -> Sequence[Shard]:
        return self._run.learner.carried(self._run.key(progress))

    def _loads(self, progress: Progress) -> list[Shard]:
        place = LoadStates(self._folders.place(progress.meta_step))
        return [replace(shard, computation=place, needs=()) for shard in self._needed(progress)]

    def restore(self, progress: Progress) -> None:
        """Load the states that belong to the checkpoint of ``progress``."""
        if loads := self._loads(progress):
            self._workers.sum(Round(0, progress.state, loads))
            self._anchor(progress, loads)

    def _anchor(self, progress: Progress, loads: Sequence[Shard]) -> None:
        self._workers.anchor(loads)
        self._saved = progress.meta_step

    def due(self, progress: Progress) -> bool:
        """Return whether the states must be saved although no checkpoint is due."""
        if not self._needed(progress):
            return False
        since = progress.meta_step - max(self._saved, self._tried)
        theta = sum(v.nbytes for v in progress.state.slots.values())
        return since >= self._run.checkpoint.states_every or since * theta > THETA_BYTES

    def save(self, progress: Progress) -> dict[str, Any]:
        """Let the workers write the states, and return the part of a checkpoint's manifest that describes them.

        Raises MetadistError where the store or the workers fail.
        """
        needed = self._needed(progress)
        if not needed:
            return {}
        step = progress.meta_step
        if step != self._saved:
            self._tried = step  # a store that fails is not asked again in every meta-step
            saving = SaveStates(self._folders.place(step))
            shards = [
                replace(shard, meta_step=step, key_step=step, computation=saving, needs=(shard.key,), keeps=False)
                for shard in needed
            ]
            total = self._workers.sum(Round(0, progress.state, shards))
            if failed := total.metrics["failed"]:
                raise MetadistError(f"the states of {failed:.0f} of {len(shards)} shards could not be written")
            self._anchor(progress, self._loads(progress))
        return {"states": self._folders.about(step)}

    def prune(self) -> None:
        """Remove saved states that belong to no checkpoint and are not the last ones."""
        if not self._saved:
            return
        try:
            kept = {entry.meta_step for entry in self._checkpoints.list() if entry.status == "good"}
            self._folders.prune({self._saved, *kept})
        except Exception as error:  # each file system raises its own errors
            log.warning("old states of particles not removed: %s", error)
