"""An ``nn.Module`` as a pure function of its parameters, with dropout keyed by task and inner step."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey, seeded
from metadist.engine.convolution import conv2d

#: the "inner step" that keys the query set's forward pass
QUERY = (1 << 14) - 1

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Make every batch and instance norm in ``module`` normalise by its own batch, in place; returns the module."""
    for norm in module.modules():
        if isinstance(norm, _NORMS):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return module


class _Replaced(TorchFunctionMode):
    """Replaces the masks of ``F.dropout`` & co. by ones drawn from the task's key, and convolutions by those of
    ``core/convolution.py`` where shards are compiled; everything else passes."""

    def __init__(self, key: TaskKey | None, step: Any, convolutions: bool) -> None:
        super().__init__()
        self.key, self.step, self.calls, self.convolutions = key, step, 0, convolutions

    def _mask(self, like: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
        self.calls += 1
        assert self.key is not None
        uniform = self.key.stream("dropout", self.step, self.calls).uniform(*shape)
        return (uniform >= p).to(like.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.key is not None and func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout):
            return self._dropout(func, *args, **(kwargs or {}))
        if self.convolutions and func is F.conv2d:
            return conv2d(*args, **(kwargs or {}))
        if self.convolutions and func is F.group_norm:  # whose derivatives take its input's memory to be contiguous
            return func(args[0].contiguous(), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(
        self, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        if p == 1.0:
            return torch.zeros_like(input)
        if func in (F.dropout, F.alpha_dropout):
            shape = tuple(input.shape)
        else:  # whole channels
            shape = (*input.shape[:2], *(1,) * (input.dim() - 2))
        mask = self._mask(input, shape, p)
        if func is F.alpha_dropout:  # Klambauer et al. 2017, eq. 6: keeps mean 0 and variance 1 of SELU networks
            saturation = -1.7580993408473766
            scale = ((1 - p) * (1 + p * saturation**2)) ** -0.5
            return scale * (input * mask + saturation * (1 - mask)) + scale * -p * saturation
        return input * mask / (1 - p)


class _Call(nn.Module):
    """Lets ``functional_call`` reach any method of a module, not only ``forward``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str | None, *args: Any) -> Any:
        return self.module(*args) if method is None else getattr(self.module, method)(*args)


class Model:
    """``factory`` builds the module; every call builds it from the same seeded state, so all workers hold the same one.

    Running statistics are refused: under ``vmap`` tasks can't share them, and they would leak between tasks.
    """

    def __init__(
        self, factory: Callable[[], nn.Module], *, dtype: torch.dtype = torch.float32, freeze: tuple[str, ...] = ()
    ):
        self.factory, self.dtype, self.freeze = factory, dtype, freeze
        self._call = _Call(self._build(0))
        self.device = torch.device("cpu")
        self._refuse_running_statistics()
        self._refuse_unkeyed_dropout()
        names = [n for n, _ in self.module.named_parameters()]
        for pattern in freeze:
            if not any(fnmatch.fnmatch(n, pattern) for n in names):
                raise ConfigError(f"model.freeze: '{pattern}' matches no parameter; there are {', '.join(names)}")
        self.frozen = frozenset(n for n in names if any(fnmatch.fnmatch(n, p) for p in freeze))
        if len(self.frozen) == len(names) and names:
            raise ConfigError(f"model.freeze: {list(freeze)} freezes every parameter; leave at least one to be learned")

    @property
    def module(self) -> nn.Module:
        return self._call.module

    @property
    def has_forward(self) -> bool:
        return type(self.module).forward is not nn.Module.forward

    @property
    def normalises_over_batch(self) -> bool:
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.module.modules())

    def _build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(seed, "model").initial_seed())
            module = self.factory()
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model: expected a torch.nn.Module, got {type(module).__name__}")
        for name, parameter in module.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ConfigError(
                    f"model: parameter '{name}' is uninitialised (a lazy module); give its input size explicitly"
                )
        return module.to(self.dtype)

    def _refuse_running_statistics(self) -> None:
        for name, norm in self.module.named_modules():
            if isinstance(norm, _NORMS) and norm.track_running_stats:
                raise ConfigError(
                    f"model: '{name}' is a {type(norm).__name__} with running statistics, which tasks can't share; build it "
                    "with track_running_stats=False, or pass the model through metadist.use_batch_statistics(model)"
                )

    def _refuse_unkeyed_dropout(self) -> None:
        for name, attention in self.module.named_modules():
            if isinstance(attention, nn.MultiheadAttention) and attention.dropout > 0:
                raise ConfigError(
                    f"model: '{name or type(attention).__name__}' is a MultiheadAttention with dropout = {attention.dropout}, which is "
                    "drawn inside torch, where the task can't key it; set its dropout to 0 and put torch.nn.Dropout modules around "
                    "it, or use model 'transformer'"
                )

    def initial(self, seed: int) -> tuple[Parameters, Parameters, Parameters]:
        """(learned parameters, frozen parameters, buffers) of a freshly seeded module."""
        module = self._build(seed)
        parameters = {n: p.detach().clone() for n, p in module.named_parameters()}
        buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        learned = Parameters({n: p for n, p in parameters.items() if n not in self.frozen})
        frozen = Parameters({n: p for n, p in parameters.items() if n in self.frozen})
        return learned, frozen, Parameters(buffers)

    def to(self, device: torch.device) -> Model:
        self._call.to(device)
        self.device = device
        return self

    def head(self) -> tuple[str, ...]:
        """Names of the parameters of the last module that has any of its own: the classifier of ordinary networks."""
        owners = [n for n, m in self.module.named_modules() if any(True for _ in m.parameters(recurse=False))]
        prefix = f"{owners[-1]}." if owners[-1] else ""
        return tuple(
            n for n, _ in self.module.named_parameters() if n.startswith(prefix) and "." not in n[len(prefix) :]
        )

    def bind(
        self, fixed: Mapping[str, Tensor], key: TaskKey | None, training: bool, engine: Engine = Engine()
    ) -> BoundModel:
        return BoundModel(self, dict(fixed), key, training, engine)


@dataclass(frozen=True)
class BoundModel:
    """The model as an algorithm sees it: ``model(phi, x)``, for one task.

    ``fixed`` holds frozen parameters and buffers. ``step`` (the inner step; the query set by default) keys dropout.
    ``method`` calls another method of the module than ``forward``.
    """

    model: Model
    fixed: Mapping[str, Tensor]
    key: TaskKey | None
    training: bool
    engine: Engine = Engine()

    def __call__(
        self, parameters: Mapping[str, Tensor], *args: Any, method: str | None = None, step: Any = QUERY
    ) -> Any:
        call = self.model._call
        if call.training != self.training:
            call.train(self.training)
        tensors = {f"module.{n}": t for n, t in self.fixed.items()}
        tensors.update((f"module.{n}", t) for n, t in parameters.items())
        with ExitStack() as stack:
            if self.training and (self.key is not None or self.engine.compile):
                stack.enter_context(_Replaced(self.key, step, self.engine.compile))
            if self.engine.precision == "bfloat16" and step is not QUERY:
                stack.enter_context(torch.autocast(self.model.device.type, torch.bfloat16, cache_enabled=False))
            return functional_call(call, tensors, (method, *args))

    def holding(self, parameters: Mapping[str, Tensor]) -> BoundModel:
        """The model under ``parameters``, those of later calls ignored: for many calls without gradients and without keyed dropout."""
        call = copy.deepcopy(self.model._call).train(self.training).requires_grad_(False)
        own = {**dict(call.module.named_parameters()), **dict(call.module.named_buffers())}
        for name, tensor in {**self.fixed, **parameters}.items():
            own[name].copy_(tensor)
        return HeldModel(self.model, self.fixed, self.key, self.training, self.engine, call=call)

    @property
    def head(self) -> tuple[str, ...]:
        return self.model.head()


@dataclass(frozen=True)
class HeldModel(BoundModel):
    """A model with a module of its own for its parameters: handing them over at every call costs more than a small network's step."""

    call: nn.Module = field(kw_only=True)

    def __call__(
        self, parameters: Mapping[str, Tensor], *args: Any, method: str | None = None, step: Any = QUERY
    ) -> Any:
        return self.call(method, *args)
