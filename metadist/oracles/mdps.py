"""Explore finite MDPs by classical methods, which plan in a model of their observations (Duan et al. 2016, §3.2).

The prior is that of the paper's table, from TabulaRL: P ~ Dirichlet(1), which is true, and mean rewards ~ N(0, 1),
where the true distribution is N(1, 1). The methods therefore expect low rewards of actions that they have not tried.
The prior matters: with N(1, 1) ``greedy`` gets 154, not 138, at 10 episodes, and ``psrl`` 134, not 138.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.core.random import TaskKey
from metadist.oracles.play import Agent, Method, Random
from metadist.oracles.posterior import dirichlet
from metadist.rl.environment import Tasks
from metadist.rl.policy import standard_normal


def action_values(reward: Tensor, transition: Tensor, horizon: int) -> Tensor:
    """Compute the best policy's Q [H, B, S, A] after h steps, from reward [B, S, A] and P [B, S, A, S]."""
    found = [reward]
    for _ in range(horizon - 1):
        # Not a matrix product: equal rows must give equal bits, so that ties stay ties in any batch.
        found.append(reward + (transition * found[-1].amax(-1)[:, None, None]).sum(-1))
    return torch.stack(found[::-1])


def optimistic_action_values(reward: Tensor, transition: Tensor, slack: Tensor, horizon: int) -> Tensor:
    """Compute Q [H, B, S, A] in the best model whose P(· | s, a) is within ``slack`` [B, S, A] of ``transition`` in L1.

    Jaksch et al. 2010, fig. 2.
    """
    found = [reward]
    for _ in range(horizon - 1):
        value, order = found[-1].amax(-1).sort(-1, descending=True)
        p = transition.gather(-1, order[:, None, None].expand_as(transition)).clone()
        p[..., 0] = (p[..., 0] + slack / 2).clamp(max=1)
        worse = p.flip(-1)
        before = worse.cumsum(-1) - worse
        excess = (p.sum(-1, keepdim=True) - 1 - before).clamp(min=0)
        p = (worse - torch.minimum(worse, excess)).flip(-1)
        found.append(reward + (p * value[:, None, None]).sum(-1))
    return torch.stack(found[::-1])


class PlanningAgent(Agent):
    """Follow the best policy of a model, by the model's ``values`` at the episode's start.

    With ``each_step`` compute the values at every step.
    """

    each_step = False

    def __init__(self, environment: Any, tasks: Tasks, keys: TaskKey) -> None:
        super().__init__(environment, tasks, keys)
        self.shape = tasks["reward"].shape
        self.counts = torch.zeros(*self.shape, self.shape[1], dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(self.shape, dtype=torch.float64, device=self.device)

    def values(self, t: int) -> Tensor:
        """Return Q [H, B, S, A] for the rest of the episode from step ``t``."""
        raise NotImplementedError

    def act(self, t: int, state: Any) -> Tensor:
        gone = t % self.environment.horizon
        if gone == 0 or self.each_step:
            self.plan = self.values(t)
        return self.pick(t, self.plan[gone][torch.arange(len(state), device=self.device), state])

    def pick(self, t: int, worth: Tensor) -> Tensor:
        """Choose an action [B] by the actions' values ``worth`` [B, A]."""
        return worth.argmax(1)

    def learn(self, t: int, state: Any, action: Tensor, reward: Tensor, following: Any) -> None:
        row = (state * self.shape[2] + action).unsqueeze(1)
        self.sums.view(len(row), -1).scatter_add_(1, row, reward.double().unsqueeze(1))
        row = row * self.shape[1] + following.unsqueeze(1)
        self.counts.view(len(row), -1).scatter_add_(1, row, torch.ones_like(row, dtype=torch.float64))

    @property
    def visits(self) -> Tensor:
        """Return the number of visits [B, S, A]."""
        return self.counts.sum(-1)

    def model(self) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean: reward [B, S, A], P [B, S, A, S]."""
        concentration = self.counts + 1
        return self.sums / (self.visits + 1), concentration / concentration.sum(-1, keepdim=True)

    def draw(self, t: int, sample: int = 0) -> tuple[Tensor, Tensor]:
        """Draw a model from the posterior: the ``sample``-th draw at step ``t``."""
        transition = dirichlet(self.keys.stream("oracle transition", step=t, call=sample), self.counts + 1)
        noise = self.keys.stream("oracle reward", step=t, call=sample).uniform(2 * self.sums[0].numel())
        return self.model()[0] + standard_normal(noise).view(self.shape) / (self.visits + 1).sqrt(), transition


class KnownMDP(PlanningAgent):
    """Plan in the task's own MDP."""

    def values(self, t: int) -> Tensor:
        return action_values(
            self.tasks["reward"].double(), self.environment.transition(self.tasks), self.environment.horizon
        )


class GreedyPlanner(PlanningAgent):
    """Follow the best policy of the posterior's mean.

    Actions without a trial have equal values, and a random one of them is taken at every step, so that an episode that
    returns to a state tries another action. With the first of them the return at 10 episodes is 129 in place of 138.
    """

    def values(self, t: int) -> Tensor:
        return action_values(*self.model(), self.environment.horizon)

    def pick(self, t: int, worth: Tensor) -> Tensor:
        best = worth == worth.amax(1, keepdim=True)
        return torch.where(best, self.uniform(t, worth.shape[1]), -1.0).argmax(1)


class EpsilonGreedyPlanner(GreedyPlanner):
    """Take a random action with probability ε, otherwise the greedy one; .1 is the best of ε ∈ {.05, .1, .2, .3}."""

    epsilon = 0.1

    def pick(self, t: int, worth: Tensor) -> Tensor:
        chance, which = self.keys.stream("oracle chance", step=t).uniform(2).unbind(1)
        return torch.where(chance < self.epsilon, (which * worth.shape[1]).long(), super().pick(t, worth))


class PSRL(PlanningAgent):
    """Follow the best policy of a model drawn from the posterior, for an episode (Strens 2000; Osband et al. 2013)."""

    def values(self, t: int) -> Tensor:
        return action_values(*self.draw(t), self.environment.horizon)


class OPSRL(PlanningAgent):
    """Take each action's highest value in several models drawn from the posterior (Osband & Van Roy 2017, §5)."""

    samples = 10

    def values(self, t: int) -> Tensor:
        best = action_values(*self.draw(t), self.environment.horizon)
        for sample in range(1, self.samples):
            best = torch.maximum(best, action_values(*self.draw(t, sample), self.environment.horizon))
        return best


class BEB(PlanningAgent):
    """Plan in the posterior's mean, with a bonus β / (1 + visits) on every reward (Kolter & Ng 2009, eq. 3).

    Of β ∈ {.5, 1, 2, 3}, 1 is the best with 10 episodes and gives the table's 150; 2 is the best with 25 to 100 and
    gives more than the table (β = 1 gives the table's figure for 25).
    """

    def values(self, t: int) -> Tensor:
        reward, transition = self.model()
        return action_values(reward + self.bonus / (1 + self.visits), transition, self.environment.horizon)

    @property
    def bonus(self) -> float:
        return 1.0 if self.environment.episodes <= 15 else 2.0


class BEBEachStep(BEB):
    """Plan like BEB, but at every step, as Kolter & Ng do and the table does not: the best method here.

    1.5 is the best of β ∈ {1, 1.5, 2, 3}.
    """

    bonus, each_step = 1.5, True


class UCRL2(PlanningAgent):
    """Follow the best policy of the most optimistic plausible model (Jaksch et al. 2010).

    Models are plausible around the posterior's mean, as in TabulaRL: rewards within w √(4 ln(2 S A t / δ) / n), P
    within √S times that bound in L1, for n visits and δ = .05. w is .3, of w ∈ {.1, .2, .3, .4}; in the proof it is 1.
    """

    width = 0.3

    def values(self, t: int) -> Tensor:
        reward, transition = self.model()
        _, states, actions = self.shape
        logarithm = torch.tensor(2 * states * actions * (t + 1) / 0.05, dtype=torch.float64).log()
        slack = self.width * (4 * logarithm / self.visits.clamp(min=1)).sqrt()
        return optimistic_action_values(reward + slack, transition, states**0.5 * slack, self.environment.horizon)


METHODS: dict[str, Method] = {
    "known_mdp": KnownMDP,
    "psrl": PSRL,
    "opsrl": OPSRL,
    "ucrl2": UCRL2,
    "beb": BEB,
    "beb_each_step": BEBEachStep,
    "epsilon_greedy": EpsilonGreedyPlanner,
    "greedy": GreedyPlanner,
    "random": Random,
}
"""Name → method; the first is the reference."""
