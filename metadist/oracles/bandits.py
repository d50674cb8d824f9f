"""How bandits have been played before: indices, posterior sampling, chance, and the exact optimum where it can be had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.core.errors import ConfigError
from metadist.core.random import TaskKey
from metadist.environments.bandit import Bandit
from metadist.oracles.bayes_optimal import Solution, solve
from metadist.oracles.gittins import bernoulli_index, normal_index
from metadist.oracles.play import Agent, Method, Random
from metadist.oracles.posterior import beta
from metadist.rl.environment import Tasks
from metadist.rl.policy import standard_normal


class KnownArm(Agent):
    """Pulls the best arm, which it knows: no learner can do better, and none can do as well."""

    def act(self, t: int, state: Any) -> Tensor:
        return self.tasks["mean"].argmax(1)


class Learner(Agent):
    """Keeps each arm's ``pulls`` and ``sums`` of rewards [B, arms], takes arms for independent, and pulls the one of highest ``index``."""

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        self.pulls = torch.zeros(tasks["mean"].shape, dtype=torch.float64, device=self.device)
        self.sums = torch.zeros_like(self.pulls)
        self.gaussian = getattr(environment, "reward", "bernoulli") == "gaussian"
        self.precision = environment.prior_deviation**-2 if self.gaussian else 2.0

    def index(self, t: int) -> Tensor:
        """[B, arms]."""
        raise NotImplementedError

    def act(self, t: int, state: Any) -> Tensor:
        return self.index(t).argmax(1)

    def learn(self, t: int, state: Any, action: Tensor, reward: Tensor, following: Any) -> None:
        at = action.unsqueeze(1)
        self.pulls.scatter_add_(1, at, torch.ones_like(at, dtype=torch.float64))
        self.sums.scatter_add_(1, at, reward.double().unsqueeze(1))

    @property
    def count(self) -> Tensor:
        """Pulls, and those that the prior is worth: of Beta(1, 1) two."""
        return self.pulls + self.precision

    @property
    def mean(self) -> Tensor:
        """The posterior's."""
        prior = self.environment.prior_mean * self.precision if self.gaussian else 1.0
        return (self.sums + prior) / self.count

    def draw(self, t: int, i: int = 0) -> Tensor:
        """Means from the posterior: the ``i``-th draw at step ``t``."""
        stream = self.keys.stream("oracle", step=t, call=i)
        if not self.gaussian:
            return beta(stream, 1 + self.sums, 1 + self.pulls - self.sums)
        arms = self.pulls.shape[1]
        return self.mean + standard_normal(stream.uniform(2 * arms)) / self.count.sqrt()

    def log_density(self, means: Tensor) -> Tensor:
        """Of means [B, arms] in the posterior, up to a constant: [B]."""
        if self.gaussian:
            return -0.5 * (self.count * (means - self.mean).square()).sum(1)
        return (torch.xlogy(self.sums, means) + torch.xlogy(self.pulls - self.sums, 1 - means)).sum(1)


class Greedy(Learner):
    """The highest posterior mean."""

    def index(self, t: int) -> Tensor:
        return self.mean


class EpsilonGreedy(Greedy):
    """Any arm with probability ε, else the highest posterior mean.

    Of ε ∈ {.01, .02, .05, .1} the best is .01 with 10 pulls and .05 with 500; .02 loses less than .02, 0.1 and 6 there.
    """

    epsilon = 0.02

    def act(self, t: int, state: Any) -> Tensor:
        chance, which = self.uniform(t, 2).unbind(1)
        return torch.where(chance < self.epsilon, (which * self.pulls.shape[1]).long(), super().act(t, state))


class UCB1(Learner):
    """mean + c √(2 ln t / pulls), counting one success and one failure beforehand (Auer et al. 2002; Duan et al. 2016).

    Of c ∈ {.1, .15, .2, .3}, .15 is the best by .02 with 10 pulls, and .2 the best, or as good, with 100 and 500.
    """

    constant = 0.2

    def index(self, t: int) -> Tensor:
        return self.mean + self.constant * (2 * torch.tensor(t + 1.0, dtype=torch.float64).log() / self.count).sqrt()


class Thompson(Learner):
    """The highest of means drawn from the posterior (Thompson 1933)."""

    def index(self, t: int) -> Tensor:
        return self.draw(t)


class OptimisticThompson(Learner):
    """The best arm of the likeliest of 20 draws from the posterior.

    So Duan et al. 2016 describe their optimistic variant, and this gives their figures. The original doesn't (May et al., JMLR 2012:
    no draw counts for less than its mean): 5.98 ± .02 with 10 pulls of 5 arms, where they have 6.5 and this 6.44 ± .03.
    """

    draws = 20

    def index(self, t: int) -> Tensor:
        drawn = [self.draw(t, i) for i in range(self.draws)]
        likeliest = torch.stack([self.log_density(means) for means in drawn]).argmax(0)
        return torch.stack(drawn)[likeliest, torch.arange(len(likeliest), device=self.device)]


class Gittins(Learner):
    """The highest Gittins index, discounted by 1 − 1 / pulls of a trial, which is as good as 1 − 2 / or 3 / pulls with 10 to 500."""

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        self.discount = max(1 - 1 / environment.episodes, 0.5)

    def index(self, t: int) -> Tensor:
        pulls = self.environment.episodes
        if self.gaussian:
            return self.mean + normal_index(pulls, self.discount, self.precision).to(self.device)[self.pulls.long()]
        table = bernoulli_index(pulls, self.discount).to(self.device)
        return table[self.sums.long(), (self.pulls - self.sums).long()]


class Optimal(Learner):
    """Exactly Bayes-optimal for independent Bernoulli arms ~ U[0, 1]: ``bayes_optimal.solve``."""

    solution: Solution

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        if self.gaussian:
            raise ConfigError(
                "optimal: of bandits with environment.reward 'gaussian' no exact optimum is known; expected 'bernoulli'"
            )
        self.solution = solve(environment.arms, environment.episodes)

    def index(self, t: int) -> Tensor:
        wins, pulls = self.sums.long().cpu(), self.pulls.long().cpu()
        return self.solution.worth(t, pulls * (pulls + 1) // 2 + wins).to(self.device)


class OptimalCorrelated(Learner):
    """Exactly Bayes-optimal where p₂ = 1 − p₁: either arm tells the same, so the likelier one is best, and no pull is spent on
    finding out. The priors are symmetric, so the likelier one is that which more rewards and fewer failures speak for."""

    def index(self, t: int) -> Tensor:
        speaks = 2 * self.sums - self.pulls
        return speaks - speaks.flip(1)


def _optimal(environment: Any, tasks: Tasks, keys: TaskKey) -> Agent:
    independent = isinstance(environment, Bandit) or environment.arms_are == "independent"
    return (Optimal if independent else OptimalCorrelated)(environment, tasks, keys)


METHODS: dict[str, Method] = {
    "optimal": _optimal,
    "known_arm": KnownArm,
    "gittins": Gittins,
    "ucb1": UCB1,
    "thompson": Thompson,
    "optimistic_thompson": OptimisticThompson,
    "epsilon_greedy": EpsilonGreedy,
    "greedy": Greedy,
    "random": Random,
}
"""The reference first."""
