"""Fit the linear feature baseline of policy-gradient methods to each task's own trajectories."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_baseline(observation: Tensor, target: Tensor, valid: Tensor, ridge: float = 1e-5) -> Tensor:
    """Fit ``target`` by o, o², t, t², t³ and 1 for each task, by least squares.

    t is the step / 100 and o the observation clipped to ±10 (Duan et al. 2016, "Benchmarking deep reinforcement
    learning", section 4.1). observation [B, N, T, O], target and valid [B, N, T] → float64 [B, N, T].
    """
    clipped = observation.double().clamp(-10, 10)
    steps = torch.arange(clipped.shape[2], device=clipped.device, dtype=torch.float64)
    t = (steps / 100).view(-1, 1).expand(*clipped.shape[:3], 1)
    features = torch.cat([clipped, clipped.square(), t, t**2, t**3, torch.ones_like(t)], -1).flatten(1, 2)
    used = features * valid.flatten(1).unsqueeze(-1)
    identity = torch.eye(features.shape[-1], dtype=torch.float64, device=features.device)
    moments = used.mT @ target.double().flatten(1).unsqueeze(-1)
    weights: Tensor = torch.linalg.solve(used.mT @ used + ridge * identity, moments)
    return (features @ weights).view(target.shape)


def returns_to_go(reward: Tensor, valid: Tensor, discount: float) -> Tensor:
    """Compute Σ_{s ≥ t} γ^{s−t} r_s over the valid steps of trajectories [..., T], in float64."""
    reward = torch.where(valid, reward, torch.zeros_like(reward)).double()
    found, running = torch.empty_like(reward), torch.zeros_like(reward[..., 0])
    for t in reversed(range(reward.shape[-1])):
        running = reward[..., t] + discount * running
        found[..., t] = running
    return found
