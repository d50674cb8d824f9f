"""Roll out windows of trials that are longer than a meta-step: each meta-step continues the trials of the last one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from metadist.core.carried import first_lifetimes
from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.core.state import Records
from metadist.rl.environment import MetaEnvironment
from metadist.rl.policy import Policy, Seen
from metadist.rl.trial import TRIAL_END, Batch, Border, Moment, Noise, Repetition, Trials


@dataclass(frozen=True)
class Going:
    """Trials between two meta-steps. ``started`` and ``ends`` (int64 [B]): the meta-steps in which each began, and will
    be followed by another trial. ``step`` counts its steps, ``returns`` [B, episodes] float64 its rewards so far.
    """

    started: Tensor
    ends: Tensor
    step: Tensor
    returns: Tensor
    moment: Moment

    def records(self, trials: Trials) -> Records:
        """Return ``trials`` and these as columns."""
        own = {f"going/{n}": getattr(self, n) for n in ("started", "ends", "step", "returns")}
        moment = {f"going/moment/{i}": t for i, t in enumerate(pytree.tree_leaves(_parts(self.moment)))}
        return Records({**trials.records().columns, **own, **moment})

    @classmethod
    def of(cls, records: Records, like: Moment) -> Going:
        """Return what ``records()`` made; ``like`` is a moment with the same structure and device."""
        device, columns = like.observation.device, records.columns
        structure = pytree.tree_structure(_parts(like))
        leaves = [columns[f"going/moment/{i}"].to(device) for i in range(structure.num_leaves)]
        own = {n: columns[f"going/{n}"].to(device) for n in ("started", "ends", "step", "returns")}
        return cls(**own, moment=_moment(pytree.tree_unflatten(leaves, structure)))


@torch.no_grad()
def roll_window(
    environment: MetaEnvironment, policy: Policy, keys: TaskKey, length: int, before: Records | None
) -> tuple[Trials, Going]:
    """Play ``length`` steps of every trial of ``keys``, from the end of the window in ``before`` on (None: all begin).

    A trial is followed by another one in the meta-step after its end. Its task and noise are keyed by the meta-step in
    which it began: under one θ, its windows are those of ``rollout``. The first trials are cut to 1, 2, … windows, so
    that later trials begin in different meta-steps.
    """
    now = int(keys.meta_step)
    here = torch.full_like(keys.tasks, now)
    goes_on = torch.zeros_like(here, dtype=torch.bool)
    if before is not None:
        earlier_start, earlier_end = (before.columns[f"going/{n}"].to(here.device) for n in ("started", "ends"))
        goes_on = earlier_end > now
        here = torch.where(goes_on, earlier_start, here)
    tasks, noise = _of_their_starts(environment, policy, keys, here)
    # Of trials that go on, this is their first moment; ``_chosen`` drops it.
    moment = Moment.first(environment, policy, keys, tasks, noise)
    _check_state(environment, moment)
    longest = -(-environment.steps // length)
    ends = now + (first_lifetimes(longest, keys) if before is None else torch.full_like(here, longest))
    none = torch.zeros(len(here), environment.episodes, dtype=torch.float64, device=here.device)
    going = Going(here, ends, torch.zeros_like(here), none, moment)
    if before is not None:
        going = _chosen(goes_on, Going.of(before, moment), going)
    batch = Batch(environment, policy.held(), keys, tasks, _from(noise, going.step, length), going.moment)
    memory = going.moment.memory.clone()
    batch.play()
    after = batch.moment()
    _, following, _ = policy.step(after.observation, after.seen, after.memory.clone())
    border = Border(memory, going.moment.seen, going.moment.episode, following)
    trials = replace(batch.trials(), border=border)
    over = trials.flag(TRIAL_END).any(1)
    returns = going.returns + trials.by_episode(environment.episodes)
    ends = torch.where(over, torch.full_like(ends, now + 1), going.ends)
    return trials, Going(going.started, ends, going.step + length, returns, after)


def _of_their_starts(environment: MetaEnvironment, policy: Policy, keys: TaskKey, started: Tensor) -> tuple[Any, Noise]:
    """Return tasks and noise of trials that began in the meta-steps ``started`` [B]."""
    order, found = [], []
    for start in started.unique().tolist():
        rows = (started == start).nonzero().squeeze(1)
        some = replace(keys, meta_step=start, tasks=keys.tasks[rows])
        order.append(rows)
        found.append((environment.sample(some), Noise.of(environment, policy, some, Repetition(environment.episodes))))
    back = torch.cat(order).argsort()

    def together(*parts: Tensor) -> Tensor:
        return torch.cat(parts)[back]

    tasks = pytree.tree_map(together, *(dict(t) for t, _ in found))
    noises = [n for _, n in found]
    acting, stepping, starting = (
        together(*(getattr(n, name) for n in noises)) for name in ("acting", "stepping", "starting")
    )
    return tasks, Noise(environment.episodes, acting, stepping, starting)


def _from(noise: Noise, step: Tensor, length: int) -> Noise:
    """Return the noise of ``length`` steps from each trial's ``step`` [B] on."""
    last = noise.acting.shape[1] - 1
    steps = (step.unsqueeze(1) + torch.arange(length, device=step.device)).clamp(max=last)
    rows = torch.arange(len(step), device=step.device).unsqueeze(1)
    return replace(noise, acting=noise.acting[rows, steps], stepping=noise.stepping[rows, steps])


def _chosen(goes_on: Tensor, earlier: Going, fresh: Going) -> Going:
    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(goes_on.view(-1, *(1,) * (a.dim() - 1)), a, b)

    own = {n: choose(getattr(earlier, n), getattr(fresh, n)) for n in ("started", "ends", "step", "returns")}
    moment = pytree.tree_map(choose, _parts(earlier.moment), _parts(fresh.moment))
    return Going(**own, moment=_moment(moment))


def _parts(moment: Moment) -> dict[str, Any]:
    own = {f.name: getattr(moment, f.name) for f in fields(Moment) if f.name != "seen"}
    return {**own, **{f"seen/{f.name}": getattr(moment.seen, f.name) for f in fields(Seen)}}


def _moment(parts: dict[str, Any]) -> Moment:
    seen = Seen(*(parts[f"seen/{f.name}"] for f in fields(Seen)))
    return Moment(**{n: v for n, v in parts.items() if not n.startswith("seen/")}, seen=seen)


def _check_state(environment: MetaEnvironment, moment: Moment) -> None:
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(moment.state)):
        raise ConfigError(
            f"algorithm.window: environment '{environment.title}' keeps its state in Python objects, and a trial that "
            "goes on in the next meta-step needs tensors; leave algorithm.window out"
        )
