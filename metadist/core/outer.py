"""The outer optimisers: state in, state out, on flat vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metadist.core.errors import ConfigError, NonFiniteError, one_of
from metadist.core.state import Contribution, Slot, State


def squared_norm(vector: Tensor) -> Tensor:
    """Σ v² in float64 by blocks of fixed size, so that the result doesn't depend on the number of threads."""
    square = vector.double().square()
    while square.numel() > 1024:
        square = torch.nn.functional.pad(square, (0, -square.numel() % 1024)).view(-1, 1024).sum(1)
    return square.sum()


@dataclass(frozen=True)
class OuterLoop:
    """The outer update and the shape of a meta-step.

    ``lr`` follows ``schedule`` from ``lr`` to ``final_lr`` over ``meta_steps``. ``clip_norm`` bounds the global norm of
    the mean gradient over all slots. ``weight_decay`` is added to the gradient (sgd, adam) or decoupled (adamw).
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = 1e-3
    final_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    meta_batch_size: int = 32
    shard_size: int = 8
    meta_steps: int = 1000

    def __post_init__(self) -> None:
        one_of("outer.optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        one_of("outer.schedule", self.schedule, ("constant", "linear", "cosine"))
        for name in ("meta_batch_size", "shard_size", "meta_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"outer.{name}: {getattr(self, name)} is below 1")
        if not (0 <= self.lr < math.inf and 0 <= self.final_lr < math.inf):
            raise ConfigError(
                f"outer.lr, outer.final_lr: {self.lr}, {self.final_lr}; expected finite rates of 0 or more"
            )
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(f"outer.momentum goes with optimizer: sgd; {self.optimizer}'s is betas")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"outer.clip_norm: {self.clip_norm} is not above 0; use null for no clipping")

    def rate(self, lr: float, meta_step: int) -> float:
        """The scheduled rate of the update that ends ``meta_step`` (0-based), for a slot that starts at ``lr``."""
        done = meta_step / self.meta_steps
        final = lr * (self.final_lr / self.lr if self.lr else 0.0)
        if self.schedule == "linear":
            return final + (lr - final) * max(0.0, 1 - done)
        if self.schedule == "cosine":
            return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return lr

    def initial(self, slots: Mapping[str, Slot], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outer: dict[str, Tensor] = {}
        for name, slot in slots.items():
            if slot.rule == "gradient":
                if self.optimizer != "sgd" or self.momentum:
                    outer[f"{name}/first"] = torch.zeros_like(values[name])
                if self.optimizer != "sgd":
                    outer[f"{name}/second"] = torch.zeros_like(values[name])
        return outer

    def update(
        self, slots: Mapping[str, Slot], state: State, total: Contribution, meta_step: int, *, count: int | None = None
    ) -> tuple[State, dict[str, float]]:
        """θ ← outer(θ, Σ contributions / Σ weights); returns the new state and what is worth plotting.

        ``count``: how many updates came before, where that is not the number of meta-steps.
        """
        count = meta_step if count is None else count
        if not total.weight:
            raise NonFiniteError(
                f"every task of meta-step {meta_step} gave NaN or Inf; lower algorithm.inner_lr or outer.lr"
            )
        means = {n: v / total.weight for n, v in total.slots.items()}
        gradients = [n for n in slots if slots[n].rule == "gradient"]
        norm = math.sqrt(float(torch.stack([squared_norm(means[n]) for n in gradients]).sum()))
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the norm of the mean gradient at meta-step {meta_step} is {norm}; lower outer.lr or algorithm.inner_lr"
            )
        scale = min(1.0, self.clip_norm / norm) if self.clip_norm is not None and norm > 0 else 1.0
        values, outer = dict(state.slots), dict(state.outer)
        for name in gradients:
            gradient = means[name] * scale if scale != 1.0 else means[name]
            values[name] = self._apply(name, slots[name], values[name], gradient, outer, meta_step, count)
        values.update({n: means[n] for n in slots if slots[n].rule == "average"})
        report = {"gradient_norm": norm, "lr": self.rate(self.lr, meta_step)}
        return State(values, outer), report

    def _apply(
        self,
        name: str,
        slot: Slot,
        theta: Tensor,
        gradient: Tensor,
        outer: dict[str, Tensor],
        meta_step: int,
        before: int,
    ) -> Tensor:
        rate = self.rate(self.lr if slot.lr is None else slot.lr, meta_step)
        decay = self.weight_decay if slot.weight_decay is None else slot.weight_decay
        if decay and self.optimizer == "adamw":
            theta = theta * (1 - rate * decay)
        elif decay:
            gradient = gradient + decay * theta
        if self.optimizer == "sgd":
            if self.momentum:
                gradient = outer[f"{name}/first"] = outer[f"{name}/first"] * self.momentum + gradient
            theta = theta - rate * gradient
        else:
            beta1, beta2 = self.betas
            first = outer[f"{name}/first"] = outer[f"{name}/first"] * beta1 + gradient * (1 - beta1)
            second = outer[f"{name}/second"] = outer[f"{name}/second"] * beta2 + gradient.square() * (1 - beta2)
            count = before + 1
            root = (second / (1 - beta2**count)).sqrt() + self.eps
            theta = theta - rate * (first / (1 - beta1**count)) / root
        low, high = slot.bounds
        return theta if low is None and high is None else theta.clamp(low, high)
