"""A learned optimiser as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metadist.core.parameters import Parameters


class UpdateRule(Protocol):
    """The part of a learned optimiser that updates coordinates."""

    def memory(self, parameters: Tensor) -> Mapping[str, Tensor]: ...

    def update(
        self,
        weights: Parameters,
        parameters: Tensor,
        gradient: Tensor,
        memory: Mapping[str, Tensor],
        sizes: Sequence[int],
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...


class TorchOptimizer(torch.optim.Optimizer):
    """Train the parameters of any ``nn.Module`` with a learned optimiser. It has no rate and no weight decay.

    ``state_dict`` holds the memory of each parameter; the weights of the optimiser come from the run. Parameters of
    less than 32 bits are updated in float32.
    """

    def __init__(self, parameters: Iterable[Any], rule: UpdateRule, weights: Parameters) -> None:
        super().__init__(parameters, {})
        self.rule, self.weights = rule, weights.detach()
        self._converted: dict[tuple[torch.dtype, torch.device], Parameters] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "weights": self.weights, "_converted": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if options := sorted(param_group.keys() - {"params", "param_names"}):
            raise ValueError(f"a learned optimiser has no option '{options[0]}'; a parameter group has params alone")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` made. The memory keeps its dtype, where torch would give it the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _weights(self, dtype: torch.dtype, device: torch.device) -> Parameters:
        if (dtype, device) not in self._converted:
            self._converted[dtype, device] = self.weights.map(lambda t: t.to(device=device, dtype=dtype))
        return self._converted[dtype, device]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the value of ``closure``, which computes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter)
        return loss

    def _update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if parameter.grad.is_sparse or parameter.is_complex():
            raise RuntimeError("a learned optimiser needs dense, real gradients")
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        value, gradient = (t.detach().to(dtype).reshape(-1) for t in (parameter, parameter.grad))
        state = self.state[parameter]
        if not state:
            state.update(self.rule.memory(value))
        memory: Mapping[str, Tensor] = {n: t.to(dtype) for n, t in state.items()}
        weights = self._weights(dtype, parameter.device)
        after, memory = self.rule.update(weights, value, gradient, memory, (value.numel(),))
        parameter.copy_(after.view_as(parameter))
        state.update(memory)
