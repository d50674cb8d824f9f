"""The learner of meta-reinforcement learning.

A meta-step is a rollout round, followed by gradient rounds over minibatches of whole trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metadist.core.computation import (
    Evaluate,
    FisherProduct,
    Gradient,
    Rollout,
    RolloutWindow,
    Surrogate,
    ValueGradient,
)
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError, WorkerError
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey
from metadist.core.round import EvaluationRequest, MetaStepKey, Result, Round, Rounds, Shard, WithOutput
from metadist.core.state import Contribution, Records, State
from metadist.engine.plan import Device, EngineRequest, Plan, plan_eager
from metadist.learners.base import Learner, refuse_another_population
from metadist.learners.dry_run import trial_hashes, try_trials
from metadist.learners.evaluation import TrialEvaluation, counted_trials, summary_of, with_task_list
from metadist.rl.algorithm import EPISODES_SHOWN, Theta, TrialAlgorithm, TrialContext
from metadist.rl.environment import MetaEnvironment
from metadist.rl.trust_region import DIRECTION, trust_region_rounds
from metadist.rl.updates import UPDATES, TrialMetaStep

#: replaces sums of a surrogate that are not finite: the line search then refuses the step
REFUSED = {"improvement": -1e100, "kl": 1e100}


@dataclass
class TrialLearner(Learner):
    """The mathematics of one experiment: algorithm, policy, meta-environment and outer loop.

    ``outer.meta_batch_size`` counts trials. ``rollout_role`` is the role of the workers that compute rollouts.
    ``policy`` is the choice of actions (``greedy`` or ``sampled``) whose return is the score.
    """

    gradients = ("gradient", "value_gradient", "fisher")

    algorithm: TrialAlgorithm
    model: Model
    tasks: MetaEnvironment
    outer: OuterLoop
    non_finite: str = "error"
    engine: Engine = field(default_factory=Engine)
    rollout_role: str = "learner"
    policy: str = "greedy"

    def __post_init__(self) -> None:
        reason = self.algorithm.compatible(self.tasks, self.model)
        if reason:
            raise ConfigError(
                f"algorithm '{type(self.algorithm).__name__}' does not suit environment "
                f"'{type(self.tasks).__name__}' with model "
                f"'{type(self.model.module).__name__}': {reason}"
            )
        self._check_outer(self.outer)
        self.slots = self._declared_slots()
        self.device = torch.device("cpu")
        self._prepared = False

    @property
    def has_states(self) -> bool:
        return self.algorithm.window is not None

    def _check_outer(self, outer: OuterLoop) -> None:
        if self.has_states:
            refuse_another_population(self.outer, outer, "trials")
        shards = math.ceil(outer.meta_batch_size / outer.shard_size)
        if self.algorithm.minibatches > shards:
            raise ConfigError(
                f"algorithm.minibatches: {self.algorithm.minibatches} of {shards} shards (outer.meta_batch_size "
                f"{outer.meta_batch_size} "
                f"÷ outer.shard_size {outer.shard_size}); a minibatch is made of whole shards, so use smaller ones"
            )
        if self.algorithm.trust_region is not None and outer.averages:
            raise ConfigError(
                f"outer.{outer.averages} does not average the policy, which optimizer: trpo moves itself; leave "
                "it out, or use ppo"
            )
        if self.algorithm.trust_region is not None and self.algorithm.fits_value and outer.weight_decay:
            raise ConfigError(
                f"outer.weight_decay: {outer.weight_decay} would move the policy out of its trust region; use 0 with "
                "optimizer: trpo"
            )

    # The rounds of a meta-step ----------------------------------------------------------------------------------------

    def initial(self, seed: int, start_from: Mapping[str, Tensor] | None = None) -> State:
        state = super().initial(seed, start_from)
        return State(state.slots, {**state.outer, UPDATES: torch.zeros(1, dtype=torch.float64)})

    def meta_step(self, key: MetaStepKey, state: State) -> Rounds:
        """Roll out under θ, then update θ on those trials: by minibatches, or by one step within a trust region."""
        rolled = self._rolling(key)
        total = yield Round(0, state, rolled)
        if not total.weight:
            raise WorkerError(f"meta-step {key.meta_step}: every trial was left out (environment.on_error: skip)")
        statistics = {n: v / total.weight for n, v in total.metrics.items()}
        statistics.update(steps=total.weight, trials=total.tasks)
        algorithm = self.algorithm.at(key.meta_step)
        broadcast = tuple(sorted(algorithm.settings_of(statistics).items()))
        report = {**self._described(statistics), "steps": statistics["steps"]}
        step = TrialMetaStep(key.meta_step, key.seed, rolled, broadcast, state, self.slots, self.outer, report)
        if left_out := statistics.get("left_out"):
            report["left_out"] = left_out * statistics["steps"]
        if algorithm.trust_region is None:
            yield from step.minibatch_rounds(
                Gradient(step.statistics), algorithm.epochs, algorithm.minibatches, algorithm.kl_limit
            )
        else:
            yield from trust_region_rounds(step, algorithm.trust_region)
            if algorithm.fits_value:
                yield from step.minibatch_rounds(
                    ValueGradient(step.statistics), algorithm.epochs, algorithm.minibatches
                )
        report.update(updates=float(step.updates))
        return step.state, report

    def _rolling(self, key: MetaStepKey) -> list[Shard]:
        """Return the shards of round 0. Windows need those of the meta-step before."""
        windows, before = self.has_states, key.meta_step - 1
        shards = self.shards(key, RolloutWindow() if windows else Rollout(), tasks=self.outer.meta_batch_size)
        return [
            replace(
                s,
                role=self.rollout_role,
                keeps=True,
                needs=((before, 0, s.index),) if windows and key.meta_step else (),
            )
            for s in shards
        ]

    def carried(self, key: MetaStepKey) -> Sequence[Shard]:
        there = self.has_states and key.meta_step > 0
        return self._rolling(replace(key, meta_step=key.meta_step - 1)) if there else ()

    def _described(self, statistics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of the rollouts: returns and explained variances, per trial and by episode."""
        # A window may end no trial; a window's trials count once they end.
        ended = statistics.get("finished", statistics["trials"] / statistics["steps"])
        found = {"return": statistics["return"] / ended} if ended else {}
        episodes = self.algorithm.episodes(self.tasks)
        shown = [n for n in EPISODES_SHOWN if n < episodes] + [episodes]
        for number in shown:
            if f"return/{number}" in statistics and ended:
                found[f"return/episode_{number}"] = statistics[f"return/{number}"] / ended
        for suffix in ("", *(f"/{n}" for n in shown)):
            if count := statistics.get(f"target_count{suffix}", 0.0):
                variance = statistics[f"target_squared{suffix}"] / count - (statistics[f"target{suffix}"] / count) ** 2
                error = statistics[f"error_squared{suffix}"] / count - (statistics[f"error{suffix}"] / count) ** 2
                found["explained_variance" + suffix.replace("/", "/episode_")] = (
                    1 - error / variance if variance > 1e-12 else 0.0
                )
        return found

    def evaluation(self, request: EvaluationRequest, state: State) -> Round:
        """Return the round that judges θ on trials. Its records have one row per trial."""
        shards = self.evaluation_shards(request)
        return Round(0, state, [replace(s, role=self.rollout_role) for s in shards], reduce=False)

    def summarise(self, request: EvaluationRequest, records: Records) -> TrialEvaluation:
        counted = counted_trials(records, request.split)
        trials = {name: counted.columns[name] for name in ("greedy", "sampled")}
        chosen, suffix = trials[self.policy], f"/{self.policy}"
        measured = {n.removesuffix(suffix): c.nanmean(0) for n, c in counted.columns.items() if n.endswith(suffix)}
        deviation = chosen.std(0) if len(chosen) > 1 else torch.full_like(chosen[0], math.nan)
        more = chosen - chosen[:, :1]
        errors = more.std(0) / math.sqrt(len(more)) if len(more) > 1 else more[:0]
        protocol = {
            "split": request.split,
            "seed": request.key.seed,
            "tasks": counted.rows,
            "policy": self.policy,
            "family": type(self.tasks).__name__,
            **self.tasks.protocol(request.split),
        }
        return TrialEvaluation(
            split=request.split,
            metric=self.tasks.metric_name,
            tasks=counted.rows,
            mean=chosen.mean(0).tolist(),
            ci95=(1.96 * deviation / math.sqrt(len(chosen))).tolist(),
            median=chosen.quantile(0.5, dim=0).tolist(),
            loss=(-chosen.mean(0)).tolist(),
            divergence_rate=0.0,
            protocol=with_task_list(protocol, records, ("policy",)),
            totals={name: summary_of(self.algorithm.total(returns)) for name, returns in trials.items()},
            measured={name: means.tolist() for name, means in measured.items()},
            gained=list(zip(more.mean(0).tolist(), errors.tolist())),
            policy=self.policy,
            by_gradient_steps=self.algorithm.by_gradient_steps,
            trials=trials,
            left_out=records.rows - counted.rows,
        )

    def dry_run(self, seed: int) -> None:
        try_trials(self, seed)

    def sampled_hashes(self, seed: int) -> dict[str, str]:
        return trial_hashes(self, seed)

    def plan(self, request: EngineRequest, device: Device, sharing: float = 1.0) -> Plan:
        return plan_eager(request, device)

    # What a worker does -----------------------------------------------------------------------------------------------

    def compute(self, shard: Shard, theta: Mapping[str, Tensor], inputs: Sequence[Records] = ()) -> Result | WithOutput:
        """Compute a shard: a rollout, an evaluation, or an update round on the trials in ``inputs``."""
        keys = TaskKey.of(shard.seed, shard.split, shard.key_step, range(shard.start, shard.start + shard.count)).to(
            self.device
        )
        named = {name: self.slots[name].layout.unflatten(vector) for name, vector in theta.items()}
        rolls = isinstance(shard.computation, Rollout)
        before = inputs[0] if rolls and inputs else None
        context = TrialContext(self.tasks, self.model, keys, shard.meta_step, before)
        # Every function of a meta-step has the settings of this meta-step: sums of a rollout describe the advantages
        # that the update rounds compute.
        algorithm = self.algorithm.at(shard.meta_step)
        if rolls:
            trials, sums, weight = algorithm.rollout(named, context)
            return WithOutput(Contribution({}, weight, shard.count - int(sums.get("left_out", 0)), sums), trials)
        if isinstance(shard.computation, Evaluate):
            with torch.no_grad():
                returns = algorithm.evaluate(named, context, shard.computation.inner_steps)
            return Records({"task": keys.tasks.cpu(), **{n: v.cpu() for n, v in returns.items()}})
        return self._learn(algorithm, shard, named, inputs[0], context)

    def _learn(
        self, algorithm: TrialAlgorithm, shard: Shard, theta: Theta, trials: Records, context: TrialContext
    ) -> Contribution:
        """Compute a shard of an update round on the trials of the rollout round."""
        slots, sums, asked = dict[str, Parameters](), dict[str, float](), shard.computation
        if isinstance(asked, Gradient):
            slots, sums, weight = algorithm.gradient(theta, trials, dict(asked.statistics), context)
        elif isinstance(asked, ValueGradient):
            slots, sums, weight = algorithm.value_gradient(theta, trials, dict(asked.statistics), context)
        elif isinstance(asked, FisherProduct):
            slots["model"], weight = algorithm.fisher(theta, trials, theta[DIRECTION], context)
        elif isinstance(asked, Surrogate):
            sums, weight = algorithm.surrogate(
                theta, trials, theta[DIRECTION] * asked.fraction, dict(asked.statistics), context
            )
            # A step too far may overflow: that is for the line search to refuse, where the scheduler takes NaN for a
            # fault.
            sums = {n: v if math.isfinite(v) else REFUSED[n] for n, v in sums.items()}
        else:
            raise ValueError(
                f"unknown function '{shard.function}'; expected rollout, evaluate, surrogate or one of {self.gradients}"
            )
        return Contribution(
            {n: self.slots[n].layout.flatten(g).cpu() for n, g in slots.items()},
            weight,
            shard.count if weight else 0,
            sums,
        )
