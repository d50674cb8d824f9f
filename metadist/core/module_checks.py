"""Refuse modules that cannot be a pure function of parameters, input and key, each in one line with a remedy."""

from __future__ import annotations

from torch import Tensor, nn

from metadist.core.errors import ConfigError

#: modules that can keep running statistics
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def refuse(module: nn.Module) -> None:
    """Raise ConfigError for a module that no run can learn; its message names the submodule or tensor."""
    _uninitialised(module)
    _complex(module)
    _unregistered_parameters(module)
    for name, part in module.named_modules():
        reason = _reason(part)
        if reason is not None:
            raise ConfigError(f"model: '{name or type(part).__name__}' is {reason}")


def _reason(module: nn.Module) -> str | None:
    """Return the description of a submodule that cannot be used as it is, with a remedy; None for all others."""
    kind = type(module).__name__
    if isinstance(module, NORMS) and module.track_running_stats:
        return (
            f"a {kind} with running statistics, which tasks cannot share; build it with track_running_stats=False, or "
            "call metadist.use_batch_statistics(model)"
        )
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return (
            f"a {kind} with dropout = {module.dropout}; torch draws this dropout internally, not from the task's key; "
            "set its dropout to 0 and put torch.nn.Dropout modules around it, or use model 'transformer'"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            return (
                f"an {kind} with max_norm = {module.max_norm}, which changes its weight in every forward pass; use "
                "max_norm=None, and scale the vectors in forward"
            )
        if module.sparse:
            return f"an {kind} with sparse = True, and sparse gradients have no second derivative; use sparse=False"
        if module.scale_grad_by_freq:
            return (
                f"an {kind} with scale_grad_by_freq = True, whose gradient is not that of its values; use "
                "scale_grad_by_freq=False"
            )
    return None


def _uninitialised(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(
                f"model: parameter '{name}' is uninitialised (a lazy module); give its input size explicitly"
            )


def _complex(module: nn.Module) -> None:
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if tensor.is_complex():
                raise ConfigError(
                    f"model: {kind} '{name}' is complex, and only real tensors are learned and stored; hold its real "
                    "and imaginary part (torch.view_as_real), and join them in forward (torch.complex)"
                )


def _unregistered_parameters(module: nn.Module) -> None:
    for prefix, part in module.named_modules():
        tensors = {**vars(part), **dict(part.named_buffers(recurse=False))}
        for name, value in tensors.items():
            if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                raise ConfigError(
                    f"model: '{f'{prefix}.{name}' if prefix else name}' requires a gradient but is no parameter, "
                    "so nothing would learn it; make it a torch.nn.Parameter, or set its requires_grad to False"
                )
