"""Sample the tasks of a user's own family in another process, and compare the bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from metadist.config.build import build
from metadist.config.experiment import Experiment
from metadist.config.schema import Document
from metadist.config.trust import modules_of
from metadist.core.errors import ConfigError, first_line
from metadist.core.threads import one_thread
from metadist.learners.base import Learner
from metadist.learners.purity import FROM_KEY
from metadist.rl.environment import MetaEnvironment
from metadist.workers import elsewhere

log = logging.getLogger(__name__)


@contextmanager
def compared_elsewhere(experiment: Experiment) -> Iterator[None]:
    """Compare the first tasks of each split, or the first trial, with those of another process at the end of the block.

    The other process works during the block. It builds the learner again where a config describes it, so that random
    numbers in a constructor, in ``prepare`` or at import show as well. metadist's own families are not compared.
    ConfigError where the tasks differ.
    """
    if not _is_own(experiment):
        yield
        return
    learner, seed = experiment.learner, experiment.seed
    made: Document | Learner = experiment.document if experiment.from_document else learner
    try:
        call = elsewhere.packed(hashes, made, seed)
    except Exception as error:  # objects that can't be pickled raise many types
        log.warning("the tasks are not compared with those of another process: %s", first_line(error))
        yield
        return
    with elsewhere.calling(call) as answer:
        yield
        try:
            there = answer()
        except (RuntimeError, EOFError) as error:
            log.warning("the tasks were not compared with those of another process: %s", error)
            return
    _compare(experiment, hashes(learner, seed), there)


def _is_own(experiment: Experiment) -> bool:
    """Return whether the user's code samples: a class that is not metadist's, or one that the config names to it."""
    named = modules_of({"tasks": experiment.tasks.document})
    return any(module.partition(".")[0] != "metadist" for module in [type(experiment.tasks.made).__module__, *named])


def hashes(made: Document | Learner, seed: int) -> dict[str, str]:
    """Return the SHA-256 of the tensors of the first tasks, by split and name, for a learner or its config."""
    # The driver has built the same config: what it names is allowed.
    learner = made if isinstance(made, Learner) else build(made, modules_of(made)).learner
    with one_thread():
        learner.prepare(torch.device("cpu"))
        return learner.sampled_hashes(seed)


def _compare(experiment: Experiment, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    name = next((name for name in here if here[name] != there.get(name)), None)
    if name is not None:
        raise ConfigError(
            f"{experiment.tasks_key}: '{_title(experiment)}' gives other {name} in another process: "
            f"the SHA-256 is {here[name][:12]}… here and {there.get(name, 'none')[:12]}… there; {FROM_KEY}; give the "
            "constructor and prepare() no random numbers either"
        )


def _title(experiment: Experiment) -> str:
    made = experiment.tasks.made
    return made.title if isinstance(made, MetaEnvironment) else type(made).__name__
