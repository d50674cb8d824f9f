"""Play bandits by classical methods: indices, posterior sampling, random actions, and the exact optimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.oracles.bayes_optimal import Solution, solve
from metadist.oracles.gittins import bernoulli_index, normal_index
from metadist.oracles.play import Agent, Method, Random
from metadist.oracles.posterior import beta
from metadist.rl.environment import Tasks
from metadist.rl.policy import standard_normal


class KnownArm(Agent):
    """Pull the best arm of the task: an upper bound for every learner."""

    def act(self, t: int, state: Any) -> Tensor:
        return self.tasks["mean"].argmax(1)


class IndexAgent(Agent):
    """Count each arm's ``pulls`` and ``sums`` of rewards [B, arms], and pull the arm of the highest ``index``.

    The posterior assumes independent arms.
    """

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        self.pulls = torch.zeros(tasks["mean"].shape, dtype=torch.float64, device=self.device)
        self.sums = torch.zeros_like(self.pulls)
        self.gaussian = environment.gaussian
        self.precision = environment.prior_deviation**-2 if self.gaussian else 2.0

    def index(self, t: int) -> Tensor:
        """Return the index of each arm at step ``t``: [B, arms]."""
        raise NotImplementedError

    def act(self, t: int, state: Any) -> Tensor:
        return self.index(t).argmax(1)

    def learn(self, t: int, state: Any, action: Tensor, reward: Tensor, following: Any) -> None:
        at = action.unsqueeze(1)
        self.pulls.scatter_add_(1, at, torch.ones_like(at, dtype=torch.float64))
        self.sums.scatter_add_(1, at, reward.double().unsqueeze(1))

    @property
    def count(self) -> Tensor:
        """Return the pulls plus the prior's weight in pulls: two for Beta(1, 1)."""
        return self.pulls + self.precision

    @property
    def mean(self) -> Tensor:
        """Return the posterior means."""
        prior = self.environment.prior_mean * self.precision if self.gaussian else 1.0
        return (self.sums + prior) / self.count

    def draw(self, t: int, i: int = 0) -> Tensor:
        """Draw means from the posterior: the ``i``-th draw at step ``t``."""
        stream = self.keys.stream("oracle", step=t, call=i)
        if not self.gaussian:
            return beta(stream, 1 + self.sums, 1 + self.pulls - self.sums)
        arms = self.pulls.shape[1]
        return self.mean + standard_normal(stream.uniform(2 * arms)) / self.count.sqrt()

    def log_density(self, means: Tensor) -> Tensor:
        """Return the posterior log density [B] of means [B, arms], up to a constant."""
        if self.gaussian:
            return -0.5 * (self.count * (means - self.mean).square()).sum(1)
        return (torch.xlogy(self.sums, means) + torch.xlogy(self.pulls - self.sums, 1 - means)).sum(1)


class GreedyArm(IndexAgent):
    """Pull the arm of the highest posterior mean."""

    def index(self, t: int) -> Tensor:
        return self.mean


class EpsilonGreedyArm(GreedyArm):
    """Pull a random arm with probability ε, otherwise the arm of the highest posterior mean.

    Of ε ∈ {.01, .02, .05, .1} the best is .01 with 10 pulls and .05 with 500. With .02 the return is lower by less than
    .02 with 10 pulls, 0.1 with 100 and 6 with 500.
    """

    epsilon = 0.02

    def act(self, t: int, state: Any) -> Tensor:
        chance, which = self.uniform(t, 2).unbind(1)
        return torch.where(chance < self.epsilon, (which * self.pulls.shape[1]).long(), super().act(t, state))


class UCB1(IndexAgent):
    """Pull by mean + c √(2 ln t / pulls) (Auer et al. 2002), with one success and one failure in advance (Duan et al.).

    Of c ∈ {.1, .15, .2, .3}, .15 is the best by .02 with 10 pulls, and .2 is the best, or equal to it, with 100 and
    500.
    """

    constant = 0.2

    def index(self, t: int) -> Tensor:
        return self.mean + self.constant * (2 * torch.tensor(t + 1.0, dtype=torch.float64).log() / self.count).sqrt()


class Thompson(IndexAgent):
    """Pull the arm of the highest mean in a draw from the posterior (Thompson 1933)."""

    def index(self, t: int) -> Tensor:
        return self.draw(t)


class OptimisticThompson(IndexAgent):
    """Pull the best arm of the likeliest of 20 draws from the posterior.

    This is the optimistic variant as Duan et al. 2016 describe it, and it gives their figures: 6.44 ± .03 with 10 pulls
    of 5 arms, where they report 6.5. The original (May et al., JMLR 2012: no draw counts for less than its mean) gives
    5.98 ± .02.
    """

    draws = 20

    def index(self, t: int) -> Tensor:
        drawn = [self.draw(t, i) for i in range(self.draws)]
        likeliest = torch.stack([self.log_density(means) for means in drawn]).argmax(0)
        return torch.stack(drawn)[likeliest, torch.arange(len(likeliest), device=self.device)]


class Gittins(IndexAgent):
    """Pull the arm of the highest Gittins index, with the discount 1 − 1 / pulls of a trial.

    1 − 2 / pulls and 1 − 3 / pulls give equal returns with 10 to 500 pulls.
    """

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        self.discount = max(1 - 1 / environment.episodes, 0.5)

    def index(self, t: int) -> Tensor:
        pulls = self.environment.episodes
        if self.gaussian:
            return self.mean + normal_index(pulls, self.discount, self.precision).to(self.device)[self.pulls.long()]
        table = bernoulli_index(pulls, self.discount).to(self.device)
        return table[self.sums.long(), (self.pulls - self.sums).long()]


class Optimal(IndexAgent):
    """Play exactly Bayes-optimally for independent Bernoulli arms ~ U[0, 1] (``bayes_optimal.solve``).

    Raises ConfigError for Gaussian rewards.
    """

    solution: Solution

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        if self.gaussian:
            raise ConfigError(
                "optimal: no exact optimum is known for environment.reward 'gaussian'; use 'bernoulli', or 'gittins'"
            )
        self.solution = solve(environment.arms, environment.episodes)

    def index(self, t: int) -> Tensor:
        wins, pulls = self.sums.long().cpu(), self.pulls.long().cpu()
        return self.solution.worth(t, pulls * (pulls + 1) // 2 + wins).to(self.device)


class OptimalCorrelated(IndexAgent):
    """Play exactly Bayes-optimally where p₂ = 1 − p₁.

    Both arms give the same information, so no pull needs to explore, and the arm with the higher posterior mean is
    best. The priors are symmetric, so that is the arm whose wins minus losses are above those of the other arm.
    """

    def index(self, t: int) -> Tensor:
        evidence = 2 * self.sums - self.pulls
        return evidence - evidence.flip(1)


def _optimal(environment: Any, tasks: Tasks, keys: TaskKey) -> Agent:
    return (Optimal if environment.independent else OptimalCorrelated)(environment, tasks, keys)


METHODS: dict[str, Method] = {
    "optimal": _optimal,
    "known_arm": KnownArm,
    "gittins": Gittins,
    "ucb1": UCB1,
    "thompson": Thompson,
    "optimistic_thompson": OptimisticThompson,
    "epsilon_greedy": EpsilonGreedyArm,
    "greedy": GreedyArm,
    "random": Random,
}
"""Name → method; the first is the reference."""
