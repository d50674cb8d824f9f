"""The properties of a meta-environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metadist.core.differences import difference
from metadist.core.model import Model
from metadist.core.random import SPLITS, TaskKey
from metadist.core.threads import one_thread
from metadist.learners.purity import impurity, other_generators
from metadist.models import Reactive
from metadist.rl import journey as rl_journey
from metadist.rl.environment import Continuous, Discrete, MetaEnvironment, Step
from metadist.rl.policy import Policy
from metadist.rl.trial import EPISODE_END, TRIAL_END, VALID, rollout
from metadist.testing import round_trips
from metadist.testing.failures import ImpureError, InexactError, SameTasksError, ShapeError, usable
from metadist.workers import elsewhere

COUNT = rl_journey.ROWS
PURE = (
    "draw random numbers from keys and noise alone; change neither the state that step() is given nor the environment"
)


def keyed(split: str = "train", *, seed: int = 0, meta_step: int = 2, tasks: Sequence[int] = range(COUNT)) -> TaskKey:
    return TaskKey.of(seed, split, meta_step, list(tasks))


def journey(environment: MetaEnvironment, key: TaskKey, steps: int | None = None) -> dict[str, Tensor]:
    """Return tasks, observations, rewards and ends of one episode, by name, one row for each task.

    Checks that every step returns a Step and leaves the state that it is given unchanged.
    """

    def watch(number: int, state: object, step: Callable[[], Step]) -> Step:
        before = _copied(state)
        taken = step()
        if before is not None and (differs := difference(before, _copied(state) or {})):
            raise ImpureError(environment, "step() leaves the state that it is given unchanged", differs, PURE)
        if not isinstance(taken, Step):
            values = f"it returns {type(taken).__name__}"
            raise ShapeError(environment, "step() returns a Step", values, "return Step(…)")
        return taken

    return rl_journey.journey(environment, key, steps, watch)


def _copied(state: object) -> dict[str, Tensor] | None:
    """Copy the tensors of a state that is a tree of tensors; None where it holds anything else."""
    leaves = pytree.tree_leaves(state)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return {f"tensor {i} of the state": leaf.clone() for i, leaf in enumerate(leaves)}


def shapes(environment: MetaEnvironment) -> None:
    """Check that observations are float32 [B, O], rewards float32 [B], ends bool [B], and that all are finite."""
    if environment.episodes < 1 or environment.horizon < 1:
        values = f"episodes is {environment.episodes} and horizon {environment.horizon}"
        raise ShapeError(environment, "a trial has episodes of some steps", values, "set both to 1 or more")
    if not isinstance(environment.actions, (Discrete, Continuous)):
        values = f"they are {environment.actions!r}"
        raise ShapeError(environment, "actions are Discrete(count) or Continuous(size)", values, "return one of them")
    with usable(environment, "it can be sampled, reset and stepped"):
        found = journey(environment, keyed())
    size = environment.observation_size
    for name, value in found.items():
        if name.startswith("task"):
            wanted, good = f"[{COUNT}, …]", value.shape[:1] == (COUNT,)
        elif "observation" in name:
            wanted, good = f"float32 [{COUNT}, {size}]", _is(value, torch.float32, COUNT, size)
        else:
            dtype = torch.bool if name.startswith("the end") else torch.float32
            wanted, good = f"{str(dtype).removeprefix('torch.')} [{COUNT}]", _is(value, dtype, COUNT)
        if not good:
            values = f"it is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise ShapeError(environment, f"{name} is {wanted}", values, "convert it in step() or reset()")
        if not name.startswith("'") and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ShapeError(environment, f"{name} is finite", "it has NaN or Inf", "bound it")


def _is(value: Tensor, dtype: torch.dtype, *shape: int) -> bool:
    return value.dtype == dtype and tuple(value.shape) == shape


def pure(environment: MetaEnvironment) -> None:
    """Check that the same key and noise give the same episode under any state of the global random generators."""
    for split in SPLITS:
        if differs := impurity(lambda split=split: journey(environment, keyed(split))):  # type: ignore[misc]
            raise ImpureError(environment, f"the same key and noise give the same {split} episode", differs, PURE)


def same_in_any_batch(environment: MetaEnvironment) -> None:
    """Check that an episode has the same bits alone and among others."""
    among = journey(environment, keyed())
    for some in ([0], [4], [3, 4, 5], [5, 1]):
        there = journey(environment, keyed(tasks=some))
        if differs := difference({n: v[some] for n, v in among.items()}, there):
            raise InexactError(
                environment,
                "an episode is the same in any batch",
                f"among tasks 0…{COUNT - 1} and among {some} {differs}",
                "compute every row from its own task, state, action and noise",
            )


def distinct(environment: MetaEnvironment) -> None:
    """Check that tasks differ by index, seed, split and meta-step."""
    whole = environment.sample(keyed())
    others = {
        "seed": environment.sample(keyed(seed=1)),
        "split": environment.sample(keyed("test")),
        "meta-step": environment.sample(keyed(meta_step=3)),
        "index": {n: t.roll(1, 0) for n, t in whole.items()},
    }
    for name, other in others.items():
        if not difference(dict(whole), dict(other)):
            values = f"{COUNT} tasks are the same for another {name}"
            raise SameTasksError(environment, f"tasks differ by {name}", values, "draw them from keys.stream(name)")


def plays_whole_trials(environment: MetaEnvironment) -> None:
    """Check that a policy can play trials of the stated number of episodes through metadist's own loop."""
    actions = environment.actions

    def factory() -> torch.nn.Module:
        return Reactive(hidden=(8,)).build_policy(
            environment.observation_size, actions.size, isinstance(actions, Continuous)
        )

    model = Model(factory)
    policy = Policy(model.bind({}, None, False), model.initial(0)[0], actions)
    with usable(environment, "a policy can play it"):
        played = rollout(environment, policy, keyed())
        with other_generators(3):
            again = rollout(environment, policy, keyed())
    if differs := difference(dict(played.records().columns), dict(again.records().columns)):
        raise ImpureError(environment, "a trial played again is the same", differs, PURE)
    counted = played.counted()
    ends = (played.flag(EPISODE_END) & played.flag(VALID)).sum(1)[counted]
    if not bool((ends == environment.episodes).all()) or not bool((played.flag(TRIAL_END).sum(1)[counted] == 1).all()):
        values = f"its trials have {ends.tolist()} of them"
        raise ShapeError(environment, f"a trial has {environment.episodes} episodes", values, "correct restart()")


def travels(environment: MetaEnvironment, *, another_process: bool) -> None:
    """Check that config and pickling give the same environment, and that another process plays the same episode."""
    round_trips.config(environment)
    there = round_trips.pickled(environment, environment)
    there.prepare(torch.device("cpu"))
    with usable(environment, "its protocol(split) is written to JSON", "return a dict of numbers, texts and lists"):
        json.dumps({split: environment.protocol(split) for split in SPLITS})
    if differs := difference(journey(environment, keyed()), journey(there, keyed())):
        raise ImpureError(environment, "a pickled copy plays the same episode", differs, PURE)
    if not another_process:
        return
    here = digest(environment)
    with usable(environment, "another process can play it", "make its module importable there"):
        found = elsewhere.call(digest, environment)
    if here != found:
        values = f"the SHA-256 of an episode is {here[:12]}… here and {found[:12]}… there"
        raise ImpureError(environment, "another process plays the same episode", values, PURE)


def digest(environment: MetaEnvironment) -> str:
    """Return the SHA-256 of the tensors of an episode."""
    environment.prepare(torch.device("cpu"))
    found = hashlib.sha256()
    for name, value in journey(environment, keyed()).items():
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


#: name → property, each a function that raises a PropertyError
ENVIRONMENT_PROPERTIES: dict[str, Callable[[MetaEnvironment], None]] = {
    "shapes": shapes,
    "pure": pure,
    "same_in_any_batch": same_in_any_batch,
    "distinct": distinct,
    "plays_whole_trials": plays_whole_trials,
}


@one_thread()
def check_environment(environment: MetaEnvironment, *, another_process: bool = True) -> None:
    """Check a meta-environment: pure in key and noise, the same in any batch, distinct tasks, whole trials, round
    trips.

    Raises a PropertyError that names the property, the values and the remedy. ``another_process=False`` saves the
    seconds that a new Python process takes; only that process shows values that depend on ``hash()`` or on the
    process itself.
    """
    with usable(environment, "it can load its data"):
        environment.prepare(torch.device("cpu"))
    for property in ENVIRONMENT_PROPERTIES.values():
        property(environment)
    travels(environment, another_process=another_process)
