"""An ``nn.Module`` as a pure function of its parameters, with dropout keyed by task and inner step."""

from __future__ import annotations

import copy
import fnmatch
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey, seeded

InnerStep = Union[int, Tensor]
"""The number of an inner step from 0: an int, or a 0-d int64 tensor where one graph serves all steps."""
Output = Any
"""The result of a module: a tensor for ordinary models, a tuple of tensors for policies and neural processes."""
Replacements = Mapping[Callable[..., Any], Callable[..., Tensor]]
"""Function of torch → the function with the same parameters that is called in its place."""

_BUILDING = threading.Lock()
#: the "inner step" that keys the query set's forward pass
QUERY = (1 << 14) - 1

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Make every batch and instance norm in ``module`` normalise by its own batch, in place; return the module."""
    for norm in module.modules():
        if isinstance(norm, _NORMS):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return module


class _ReplacedFunctions(TorchFunctionMode):
    """Call ``replacements`` in place of functions of torch, and key the masks of ``F.dropout`` and its variants."""

    def __init__(self, key: TaskKey | None, step: InnerStep, replacements: Replacements) -> None:
        super().__init__()
        self.key, self.step, self.calls, self.replacements = key, step, 0, replacements

    def _mask(self, like: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
        self.calls += 1
        assert self.key is not None
        uniform = self.key.stream("dropout", self.step, self.calls).uniform(*shape)
        return (uniform >= p).to(like.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.key is not None and func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout):
            return self._dropout(func, *args, **(kwargs or {}))
        return self.replacements.get(func, func)(*args, **(kwargs or {}))

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
            scale: float = ((1 - p) * (1 + p * saturation**2)) ** -0.5
            return scale * (input * mask + saturation * (1 - mask)) + scale * -p * saturation
        return input * mask / (1 - p)


@dataclass(frozen=True)
class Variants:
    """Modules of several shapes: ``chosen(split, index)`` is the number of the factory for the network of a task.

    Only algorithms with carried state train a network of its own shape for each task; all others use the first.
    """

    factories: tuple[Callable[[], nn.Module], ...]
    chosen: Callable[[str, int], int]
    #: the config of the modules
    owner: object = None

    def __call__(self) -> nn.Module:
        return self.factories[0]()


class _Call(nn.Module):
    """Lets ``functional_call`` call any method of a module, not only ``forward``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str | None, *args: object) -> Output:
        return self.module(*args) if method is None else getattr(self.module, method)(*args)


class Model:
    """A module that ``factory`` builds from a seeded state: all workers hold the same module.

    Parameters with ``requires_grad=False`` and those with a name that a pattern in ``freeze`` matches are not learned:
    neither the inner nor the outer loop changes them. Raises ConfigError for a module that keeps running statistics
    (tasks cannot share them under ``vmap``, and they would carry information between tasks), and for one with a
    tensor that requires a gradient and is no parameter.
    """

    def __init__(
        self, factory: Callable[[], nn.Module], *, dtype: torch.dtype = torch.float32, freeze: tuple[str, ...] = ()
    ) -> None:
        self.factory, self.dtype, self.freeze = factory, dtype, freeze
        self._variants: dict[int, Model] = {}
        self._call = _Call(self._build(0))
        self.device = torch.device("cpu")
        self._refuse_running_statistics()
        self._refuse_unkeyed_dropout()
        self._refuse_unregistered_parameters()
        self.frozen = self._frozen()

    @property
    def module(self) -> nn.Module:
        """The module itself, with the parameters of seed 0."""
        return self._call.module

    @property
    def has_forward(self) -> bool:
        """Whether the module's class defines ``forward``."""
        return type(self.module).forward is not nn.Module.forward

    @property
    def normalises_over_batch(self) -> bool:
        """Whether the module has a batch norm."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.module.modules())

    def missing(self, *attributes: str) -> list[str]:
        """Return those of ``attributes`` that the module does not have."""
        return [name for name in attributes if not hasattr(self.module, name)]

    def _build(self, seed: int) -> nn.Module:
        # Modules draw from PyTorch's global generator, and several threads of a process may build some.
        with _BUILDING, torch.random.fork_rng(devices=[]):
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

    def _frozen(self) -> frozenset[str]:
        """Return the names of the parameters that the module or ``freeze`` fixes."""
        names = {n: p.requires_grad for n, p in self.module.named_parameters()}
        for pattern in self.freeze:
            if not any(fnmatch.fnmatch(n, pattern) for n in names):
                raise ConfigError(f"model.freeze: '{pattern}' matches no parameter; there are {', '.join(names)}")
        frozen = {n for n, learns in names.items() if not learns or any(fnmatch.fnmatch(n, p) for p in self.freeze)}
        if len(frozen) == len(names) and names:
            reason = f"model.freeze: {list(self.freeze)} freezes every parameter"
            if not all(names.values()):
                patterns = f" and model.freeze: {list(self.freeze)}" if self.freeze else ""
                reason = f"model: requires_grad=False{patterns} fix every parameter of '{type(self.module).__name__}'"
            raise ConfigError(f"{reason}; leave at least one to be learned")
        return frozenset(frozen)

    @property
    def frozen_line(self) -> str | None:
        """A line that names the frozen parameters and what freezes them; None where all parameters are learned."""
        names = [n for n, _ in self.module.named_parameters() if n in self.frozen]
        if not names:
            return None
        by_module = any(not p.requires_grad for p in self.module.parameters())
        reasons = (["requires_grad=False"] if by_module else []) + (["model.freeze"] if self.freeze else [])
        shown = ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
        return f"frozen by {' and '.join(reasons)}, in inner and outer loop: {shown}"

    def _refuse_unregistered_parameters(self) -> None:
        for prefix, module in self.module.named_modules():
            tensors = {**vars(module), **dict(module.named_buffers(recurse=False))}
            for name, value in tensors.items():
                if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                    raise ConfigError(
                        f"model: '{f'{prefix}.{name}' if prefix else name}' requires a gradient but is no parameter, "
                        "so nothing would learn it; make it a torch.nn.Parameter, or set its requires_grad to False"
                    )

    def _refuse_running_statistics(self) -> None:
        for name, norm in self.module.named_modules():
            if isinstance(norm, _NORMS) and norm.track_running_stats:
                raise ConfigError(
                    f"model: '{name}' is a {type(norm).__name__} with running statistics, which tasks cannot share; "
                    "build it with track_running_stats=False, or call metadist.use_batch_statistics(model)"
                )

    def _refuse_unkeyed_dropout(self) -> None:
        for name, attention in self.module.named_modules():
            if isinstance(attention, nn.MultiheadAttention) and attention.dropout > 0:
                raise ConfigError(
                    f"model: '{name or type(attention).__name__}' is a MultiheadAttention with dropout = "
                    f"{attention.dropout}; torch draws this dropout internally, not from the task's key; set its "
                    "dropout to 0 and put torch.nn.Dropout modules around it, or use model 'transformer'"
                )

    def initial(self, seed: int) -> tuple[Parameters, Parameters, Parameters]:
        """Return (learned parameters, frozen parameters, buffers) of a module that is built from ``seed``.

        Frozen parameters of another dtype than the model's, such as tables of integers, are among the buffers.
        """
        module = self._build(seed)
        parameters = {n: p.detach().clone() for n, p in module.named_parameters()}
        buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        learned = Parameters({n: p for n, p in parameters.items() if n not in self.frozen})
        frozen = {n: p for n, p in parameters.items() if n in self.frozen}
        buffers.update({n: p for n, p in frozen.items() if p.dtype != self.dtype})
        return learned, Parameters({n: p for n, p in frozen.items() if p.dtype == self.dtype}), Parameters(buffers)

    def variant(self, split: str, index: int) -> Model:
        """Return the model of task ``index``: one of ``Variants``, an object for each shape, or itself."""
        if not isinstance(self.factory, Variants):
            return self
        number = self.factory.chosen(split, index)
        if number not in self._variants:
            made = Model(self.factory.factories[number], dtype=self.dtype, freeze=self.freeze)
            self._variants[number] = made.to(self.device)
        return self._variants[number]

    def to(self, device: torch.device) -> Model:
        """Move the module to ``device``, in place; return the model."""
        for other in self._variants.values():
            other.to(device)
        self._call.to(device)
        self.device = device
        return self

    def head(self) -> tuple[str, ...]:
        """Return the parameter names of the last module that has parameters of its own: usually the classifier."""
        owners = [n for n, m in self.module.named_modules() if any(True for _ in m.parameters(recurse=False))]
        prefix = f"{owners[-1]}." if owners[-1] else ""
        return tuple(
            n for n, _ in self.module.named_parameters() if n.startswith(prefix) and "." not in n[len(prefix) :]
        )

    def bind(
        self,
        fixed: Mapping[str, Tensor],
        key: TaskKey | None,
        training: bool,
        engine: Engine = Engine(),
        replacements: Replacements | None = None,
    ) -> BoundModel:
        """Return the model for one task, with ``fixed`` (frozen parameters and buffers) filled in."""
        return BoundModel(self, dict(fixed), key, training, engine, replacements or {})


@dataclass(frozen=True)
class BoundModel:
    """The model for one task, as algorithms call it: ``model(phi, x)``.

    ``fixed`` holds frozen parameters and buffers. ``key`` keys dropout; None leaves dropout to torch. In training,
    ``replacements`` are called in place of functions of torch.
    """

    model: Model
    fixed: Mapping[str, Tensor]
    key: TaskKey | None
    training: bool
    engine: Engine = Engine()
    replacements: Replacements = field(default_factory=dict)

    def __call__(
        self, parameters: Mapping[str, Tensor], *args: object, method: str | None = None, step: InnerStep = QUERY
    ) -> Output:
        """Call ``forward``, or ``method``, of the module with ``parameters`` on ``args``.

        ``step`` is the inner step; it keys dropout, and its default stands for the query set.
        """
        call = self.model._call
        if call.training != self.training:
            call.train(self.training)
        tensors = {f"module.{n}": t for n, t in self.fixed.items()}
        tensors.update((f"module.{n}", t) for n, t in parameters.items())
        with ExitStack() as stack:
            if self.training and (self.key is not None or self.replacements):
                stack.enter_context(_ReplacedFunctions(self.key, step, self.replacements))
            if self.engine.precision == "bfloat16" and step is not QUERY:
                stack.enter_context(torch.autocast(self.model.device.type, torch.bfloat16, cache_enabled=False))
            return functional_call(call, tensors, (method, *args))

    def holding(self, parameters: Mapping[str, Tensor]) -> BoundModel:
        """Return a model that always uses ``parameters`` and ignores those of its calls.

        It is faster for many calls, but has no gradients and no keyed dropout.
        """
        call = copy.deepcopy(self.model._call).train(self.training).requires_grad_(False)
        own = {**dict(call.module.named_parameters()), **dict(call.module.named_buffers())}
        for name, tensor in {**self.fixed, **parameters}.items():
            own[name].copy_(tensor)
        return HeldModel(self.model, self.fixed, self.key, self.training, self.engine, self.replacements, call=call)

    @property
    def head(self) -> tuple[str, ...]:
        """The names of the head's parameters, as ``Model.head``."""
        return self.model.head()


@dataclass(frozen=True)
class HeldModel(BoundModel):
    """A model with its own copy of the module. ``functional_call`` takes longer than one step of a small network."""

    call: nn.Module = field(kw_only=True)

    def __call__(
        self, parameters: Mapping[str, Tensor], *args: object, method: str | None = None, step: InnerStep = QUERY
    ) -> Output:
        return self.call(method, *args)
