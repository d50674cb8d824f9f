"""The property of an executor: the same bits as in this process."""

from __future__ import annotations

from metadist.core.differences import difference
from metadist.core.round import Executor
from metadist.core.threads import one_thread
from metadist.learners.base import Learner
from metadist.testing.failures import ImpureError, usable
from metadist.testing.running import evaluated, meta_step
from metadist.training.scheduler import Scheduler

REMEDY = (
    "give every shard the θ of its round and the learner as it is, compute in the same dtype and number of threads, "
    "and return results unchanged"
)


@one_thread()
def check_executor(executor: Executor, learner: Learner, *, meta_steps: int = 2) -> None:
    """Check that meta-steps and an evaluation through ``executor`` have the bits that this process computes.

    ``executor`` runs shards of ``learner`` and stays open. Its engine is that of the learner (not compiled, float32 on
    the CPU by default). Raises a PropertyError that names the values and the remedy.
    """
    scheduler = Scheduler(executor, learner)
    here = there = learner.initial(0)
    for number in range(meta_steps):
        here = meta_step(learner, here, number).state
        with usable(executor, "a meta-step can be taken through it"):
            there = meta_step(learner, there, number, run=scheduler.run).state
        if differs := difference(dict(here.slots), dict(there.slots)):
            property = f"after {number + 1} meta-steps it has the bits of a run in one process"
            raise ImpureError(executor, property, differs, REMEDY)
    with usable(executor, "an evaluation can be made through it"):
        records = evaluated(learner, there, run=scheduler.run)
    if differs := difference(dict(evaluated(learner, here).columns), dict(records.columns)):
        raise ImpureError(executor, "an evaluation has the records of one process, in order", differs, REMEDY)
