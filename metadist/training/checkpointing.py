"""Checkpoints of a run: when observers have written everything that a resumed run will not repeat."""

from __future__ import annotations

from typing import Any

from metadist.core.errors import CheckpointError, MetadistError
from metadist.core.state import State
from metadist.learners.evaluation import as_json
from metadist.storage.checkpoints import Checkpoints
from metadist.training.carried_states import CarriedStates
from metadist.training.observers import Commands, Observer
from metadist.training.progress import Progress, Run


class RunCheckpoints:
    """Saves the progress of ``run`` to ``checkpoints``, and the states of particles before it."""

    def __init__(
        self, run: Run, checkpoints: Checkpoints, observers: Observer, commands: Commands, states: CarriedStates
    ) -> None:
        self._run, self._checkpoints, self._observers, self._commands = run, checkpoints, observers, commands
        self._states = states

    def save(self, progress: Progress) -> bool:
        """Write a checkpoint and return whether it was written. A full disk does not end a run."""
        states = self.save_states(progress)
        if states is None:
            return False
        # Before the checkpoint that makes a resume skip these points.
        self._observers.flush()
        manifest = {
            **self._run.manifest,
            "run_id": self._run.id,
            "seed": self._run.seed,
            **self._observers.facts(),
            "validation": as_json(progress.validation),
            "curve": as_json(progress.curve),
            "commands": list(self._commands.history(progress.meta_step)),
            **states,
        }
        slots = self._run.learner.slots
        done = self._checkpoints.save(progress.meta_step, progress.state, manifest, slots=slots, score=progress.score())
        if done:
            self._commands.saved(progress.meta_step)
            self._states.prune()
        return done

    def save_states(self, progress: Progress) -> dict[str, Any] | None:
        """Save the states of particles and return their part of the manifest; None where they can't be saved."""
        try:
            return self._states.save(progress)
        except MetadistError as error:
            self._observers.note(f"no checkpoint of meta-step {progress.meta_step}: {error}")
            return None

    def best(self, progress: Progress) -> tuple[int, State]:
        """Return the state that validated best; the last one where there is none, or where its checkpoint cannot be
        read.
        """
        best = progress.best(self._run.higher_is_better)
        if best is None or best["meta_step"] == progress.meta_step:
            return progress.meta_step, progress.state
        try:
            loaded = self._checkpoints.best(self._run.learner.slots)
        except CheckpointError as error:
            self._observers.note(f"the best checkpoint can't be read ({error}); the last parameters are used instead")
            return progress.meta_step, progress.state
        return (loaded.meta_step, loaded.state) if loaded else (progress.meta_step, progress.state)
