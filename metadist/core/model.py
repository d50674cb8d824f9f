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

from metadist.core.decompositions import ATTENTION, RECURRENT, is_recurrent
from metadist.core.engine import Engine
from metadist.core.errors import ConfigError
from metadist.core.module_checks import NORMS, refuse
from metadist.core.parameters import Parameters
from metadist.core.random import TaskKey, seeded
from metadist.core.tree import Tree

InnerStep = Union[int, Tensor]
"""The number of an inner step from 0: an int, or a 0-d int64 tensor where one graph serves all steps."""
Output = Tree
"""The result of a module: a tensor for ordinary models, a tuple of tensors for policies and neural processes."""
Replacements = Mapping[Callable[..., Any], Callable[..., Tensor]]
"""Function of torch → the function with the same parameters that is called in its place."""

_BUILDING = threading.Lock()
#: the "inner step" that keys the query set's forward pass
QUERY = (1 << 14) - 1


def use_batch_statistics(module: nn.Module) -> nn.Module:
    """Make every batch and instance norm in ``module`` normalise by its own batch, in place; return the module."""
    for norm in module.modules():
        if isinstance(norm, NORMS):
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
        if func not in self.replacements:
            return func(*args, **(kwargs or {}))
        known = self.replacements
        self.replacements = {f: other for f, other in known.items() if f is not func}
        try:
            with self:  # the dropout between the layers of an LSTM has a key too
                return known[func](*args, **(kwargs or {}))
        finally:
            self.replacements = known

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

    def forward(self, method: str | None, *args: Any) -> Output:
        if method is not None:
            return getattr(self.module, method)(*args)
        return called(self.module, args[0]) if len(args) == 1 else self.module(*args)


def called(module: nn.Module, x: Tree) -> Any:
    """Call ``module`` on inputs: with the entries of a dict by name, with those of a tuple one after the other."""
    if isinstance(x, Mapping):
        return module(**x)
    return module(*x) if type(x) in (tuple, list) else module(x)


def _chosen(result: Any, output: str | int | None) -> Output:
    """Return the part ``output`` of a module's result: a field by name, or an element of a tuple by its place.

    None: a tensor itself, the ``logits`` of an object or dict that has them, or a tuple or dict of tensors whole.
    ConfigError where there is no such part.
    """
    if output is None:
        if isinstance(result, Tensor):
            return result
        logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
        return result if logits is None else logits
    try:
        if isinstance(output, str) and not isinstance(result, Mapping):
            return getattr(result, output)
        return result[output]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ConfigError(f"model.output: {output!r} is no part of what forward returns, {described(result)}") from None


def described(result: object) -> str:
    """Return the type of a module's result, with the names of its parts, for a message."""
    kind = type(result).__name__
    if isinstance(result, Mapping):
        return f"{kind} with {', '.join(map(str, result))}"
    if isinstance(result, (tuple, list)):
        return f"{kind} of {len(result)}"
    fields = ", ".join(n for n in getattr(result, "__dict__", {}) if not n.startswith("_"))
    return f"{kind} with {fields}" if fields else kind


class Model:
    """A module that ``factory`` builds from a seeded state: all workers hold the same module.

    Parameters with ``requires_grad=False`` and those with a name that a pattern in ``freeze`` matches are not learned:
    neither the inner nor the outer loop changes them. ``output`` is the field, or the place in a tuple, of the
    prediction in what ``forward`` returns; by default a tensor itself, or the ``logits`` of an object. Raises
    ConfigError for a module that no run can learn, such as one that keeps running statistics (``module_checks.py``).
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        *,
        dtype: torch.dtype = torch.float32,
        freeze: tuple[str, ...] = (),
        output: str | int | None = None,
    ) -> None:
        self.factory, self.dtype, self.freeze, self.output = factory, dtype, freeze, output
        self._variants: dict[int, Model] = {}
        self._call = _Call(self._build(0))
        self.device = torch.device("cpu")
        self.frozen = self._frozen()
        self.recurrent = is_recurrent(self.module)

    def in_dtype(self, dtype: torch.dtype) -> Model:
        """Return the same model in another dtype, on the CPU."""
        return Model(self.factory, dtype=dtype, freeze=self.freeze, output=self.output)

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
        refuse(module)
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
            made = Model(self.factory.factories[number], dtype=self.dtype, freeze=self.freeze, output=self.output)
            self._variants[number] = made.to(self.device)
        return self._variants[number]

    def to(self, device: torch.device) -> Model:
        """Move the module to ``device``, in place; return the model."""
        for other in self._variants.values():
            other.to(device)
        self._call.to(device)
        self.device = device
        return self

    def matrices(self) -> tuple[str, ...]:
        """Return the names of the learned weights that Muon treats as matrices (Jordan et al. 2024).

        They are 2-D weights and convolution kernels, without those of embeddings and of the head.
        """
        apart, found = {*self.head(), *self.frozen}, []
        for prefix, module in self.module.named_modules():
            kernels = isinstance(module, nn.modules.conv._ConvNd)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if name not in apart and (parameter.dim() == 2 or (kernels and parameter.dim() > 2)):
                    found.append(name)
        return tuple(found)

    def head(self) -> tuple[str, ...]:
        """Return the parameter names of the last module that has parameters of its own: usually the classifier."""
        owners = [n for n, m in self.module.named_modules() if any(True for _ in m.parameters(recurse=False))]
        prefix = f"{owners[-1]}." if owners[-1] else ""
        return tuple(
            n for n, _ in self.module.named_parameters() if n.startswith(prefix) and "." not in n[len(prefix) :]
        )

    def differentiable(self, training: bool, second_order: bool) -> Replacements:
        """Return the functions that adaptation by gradient steps replaces: recurrent layers, and fused attention.

        Attention is replaced in training alone, and there where its second derivative is needed.
        """
        recurrent = RECURRENT if training or self.recurrent else {}
        return {**recurrent, **ATTENTION} if training and second_order else recurrent

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

    ``fixed`` holds frozen parameters and buffers. ``key`` keys dropout; None leaves dropout to torch.
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

        A dict as the only argument of ``forward`` is passed by name, a tuple as positional arguments. ``step`` is the
        inner step; it keys dropout, and its default stands for the query set.
        """
        call = self.model._call
        if call.training != self.training:
            call.train(self.training)
        tensors = {f"module.{n}": t for n, t in self.fixed.items()}
        tensors.update((f"module.{n}", t) for n, t in parameters.items())
        with ExitStack() as stack:
            if self.replacements or (self.training and self.key is not None):
                stack.enter_context(_ReplacedFunctions(self.key, step, self.replacements))
            if self.engine.precision == "bfloat16" and step is not QUERY:
                stack.enter_context(torch.autocast(self.model.device.type, torch.bfloat16, cache_enabled=False))
            result = functional_call(call, tensors, (method, *args))
            return result if method is not None else _chosen(result, self.model.output)

    def holding(self, parameters: Mapping[str, Tensor]) -> BoundModel:
        """Return a model that always uses ``parameters`` and ignores those of its calls.

        It is faster for many calls, but has no gradients, no keyed dropout and no replacements.
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
        result = self.call(method, *args)
        return result if method is not None else _chosen(result, self.model.output)
