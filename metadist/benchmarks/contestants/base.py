"""Define the problem that every contestant solves, and the interface of a contestant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.core.random import TaskKey
from metadist.core.state import State
from metadist.core.task import Task
from metadist.learners.few_shot import FewShotLearner

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """θ and a shard of sampled tasks, the same for all contestants; on the learner's device and in its dtype."""

    learner: FewShotLearner
    state: State
    tasks: Task
    keys: TaskKey
    inner_lr: float
    inner_steps: int

    @property
    def device(self) -> torch.device:
        """The learner's device."""
        return self.learner.device

    @property
    def classification(self) -> bool:
        """Whether the tasks are classification; otherwise they are regression."""
        return self.learner.tasks.kind == "classification"

    def parameters(self) -> Gradient:
        """Return copies of θ by name; they are leaves of autograd's graph."""
        theta = self.learner.parameters(self.state)
        return {n: t.to(self.device, copy=True).requires_grad_() for n, t in theta.items()}

    def module(self) -> nn.Module:
        """Return the network at θ, with PyTorch's own layers in place of metadist's subclasses."""
        module = copy.deepcopy(self.learner.model.module).train()
        module.load_state_dict(self.parameters())
        for layer in module.modules():
            for ordinary in (nn.BatchNorm2d, nn.Conv2d, nn.Linear):
                if isinstance(layer, ordinary):
                    layer.__class__ = ordinary
        return module.to(self.device)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return F.cross_entropy(prediction, target) if self.classification else F.mse_loss(prediction, target)

    def each(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (support x, support y, query x, query y) of each task."""
        yield from zip(self.tasks.support.x, self.tasks.support.y, self.tasks.query.x, self.tasks.query.y)


@dataclass(frozen=True)
class Contestant:
    """``call`` computes and waits for the result, which ``read`` turns into the gradient by parameter name."""

    call: Callable[[], Any]
    read: Callable[[Any], Gradient]
