"""The properties of a model of supervised tasks, and of a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from metadist.algorithms import CNP, MAML
from metadist.config.components import model_factory
from metadist.core.algorithm import Algorithm
from metadist.core.differences import difference, flat, not_finite, relative_error
from metadist.core.errors import ConfigError
from metadist.core.model import Model
from metadist.core.random import seeded
from metadist.core.task import TaskFamily
from metadist.core.threads import one_thread
from metadist.core.tree import at
from metadist.learners.few_shot import FewShotLearner
from metadist.learners.purity import other_generators
from metadist.models import ModelConfig, PolicyConfig
from metadist.rl.environment import Continuous, MetaEnvironment
from metadist.rl.policy import PolicyModule
from metadist.testing import few_shot, round_trips
from metadist.testing.failures import ImpureError, InexactError, RowError, ShapeError, UnusableError, usable
from metadist.testing.running import keys
from metadist.testing.toys import Blobs, Chance

SEEDED = "initialise parameters by torch's functions alone, which metadist seeds"
#: relative error in float64 of a policy's steps one by one against all together
ROUNDING = 1e-8
BATCH, LENGTH = 3, 5


@one_thread()
def check_model(
    model: object, *, tasks: TaskFamily | MetaEnvironment | None = None, algorithm: Algorithm | None = None
) -> None:
    """Check a model: seeded, a pure function of parameters and key, right gradient in float64, shapes, round trips.

    ``model`` is an ``nn.Module``, a function that builds one, or a config with ``build`` or ``build_policy``. ``tasks``
    have inputs of its shape: by default ``Blobs`` (4 numbers, 3 classes), for a policy ``Chance`` with discrete and
    with continuous actions. ``algorithm`` is MAML by default, or CNP where the model has no ``forward``. Raises a
    PropertyError that names the property, the values and the remedy.
    """
    round_trips.config(model)
    if isinstance(tasks, MetaEnvironment) or (tasks is None and _is_policy(model)):
        for environment in [tasks] if isinstance(tasks, MetaEnvironment) else [Chance(), Chance(continuous=True)]:
            check_policy(model, environment)
        return
    learner = _learner(model, tasks or Blobs(), algorithm)
    seeded_parameters(learner.model, model)
    with usable(learner, "it can be called"):
        pure_function(learner)  # before the dry run, which refuses the same with less detail
    few_shot.begins(learner)
    if isinstance(model, ModelConfig) and not isinstance(model, type):
        embedding(model, learner)
    with usable(learner, "shards can be computed"):
        few_shot.travels(learner)
        few_shot.right_gradient(learner)


def _is_policy(model: object) -> bool:
    return isinstance(model, PolicyConfig) and not isinstance(model, type) and not isinstance(model, ModelConfig)


def _learner(model: object, tasks: TaskFamily, algorithm: Algorithm | None) -> FewShotLearner:
    refusals = []
    for one in [algorithm] if algorithm is not None else [MAML(inner_lr=0.05, inner_steps=2), CNP()]:
        try:
            return few_shot.build(one, tasks, model_factory(model, tasks, one))
        except ConfigError as error:
            refusals.append(str(error))
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    values = f"it is refused: {'; '.join(dict.fromkeys(refusals))}"
    remedy = "see the message; pass tasks=… with inputs that the model takes, and algorithm=…"
    raise UnusableError(model, f"a module for {type(tasks).__name__} can be built from it", values, remedy)


def seeded_parameters(model: Model, subject: object) -> None:
    """Check that a seed gives the same parameters under any state of the global random generators."""
    first = model.initial(0)
    with other_generators(1):
        second = model.initial(0)
    for before, after in zip(first, second):
        if differs := difference(dict(before), dict(after)):
            raise ImpureError(subject, "the same seed gives the same parameters and buffers", differs, SEEDED)


def pure_function(learner: FewShotLearner) -> None:
    """Check that calls with the same parameters, inputs and key give the same bits, and leave the module unchanged."""
    if not learner.model.has_forward:
        return
    module, state = learner.model.module, learner.initial(0)
    theta = state.theta(learner.slots)
    x = at(learner.sample(keys(0, 1)).support.x, 0)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    for training in (False, True):
        bound = learner.bind(theta, keys(0, 1).each()[0], training)
        with torch.no_grad():
            first = bound(theta["model"], x)
            with other_generators(1):
                second = bound(theta["model"], x)
        mode = "training" if training else "evaluation"
        if differs := difference(flat({"the output": first}), flat({"the output": second})):
            remedy = "use torch.nn.Dropout, which metadist keys by the task; keep no state between calls"
            raise ImpureError(module, f"the same input gives the same output in {mode} mode", differs, remedy)
        if not_finite(flat({"outputs": first})):
            raise ShapeError(module, f"outputs are finite in {mode} mode", "they have NaN or Inf", "scale the layers")
    if differs := difference(before, dict(module.state_dict())):
        remedy = "buffers are constants under metadist; compute such values from the input"
        raise ImpureError(module, "calls leave parameters and buffers unchanged", differs, remedy)


def embedding(model: ModelConfig, learner: FewShotLearner) -> None:
    """Check that it builds an embedding with one row for each example where ``outputs`` is None, or refuses to."""
    if not learner.model.has_forward:
        return
    shape = tuple(learner.tasks.input_shape or ())
    property = "build(input_shape, None) builds an embedding [N, …], or raises a ConfigError"
    with usable(model, property):
        module = _embedding(model, shape)
        found = None if module is None else module(torch.zeros(2, *shape))
    if found is not None and (found.shape[:1] != (2,) or found.dim() < 2):
        raise ShapeError(model, property, f"for 2 examples it is {list(found.shape)}", "keep the first dimension")


def _embedding(model: ModelConfig, shape: tuple[int, ...]) -> nn.Module | None:
    try:
        with torch.random.fork_rng(devices=[]):
            return model.build(shape, None).eval()
    except ConfigError:
        return None


def check_policy(model: object, environment: MetaEnvironment) -> None:
    """Check a policy: seeded, shapes, rows apart, and the same results for steps one by one and together."""
    algorithm: Any = None
    with usable(model, f"a policy for {type(environment).__name__} can be built from it"):
        factory = model_factory(model, environment, algorithm)
        policy = Model(factory, dtype=torch.float64)
        module = cast(PolicyModule, policy.module)
        memory_size, sees_history = module.memory_size, module.sees_history
    seeded_parameters(policy, model)
    round_trips.pickled(policy, model)
    actions = environment.actions
    features = environment.observation_size + (actions.size + 2 if sees_history else 0)
    head_size = 2 * actions.size if isinstance(actions, Continuous) else actions.size
    learned, frozen, buffers = policy.initial(0)
    bound = policy.bind({**frozen, **buffers}, None, False)
    x = torch.randn(BATCH, LENGTH, features, generator=seeded(0, "features"), dtype=torch.float64)
    expected = {
        "head": (BATCH, LENGTH, head_size),
        "value": (BATCH, LENGTH),
        "memory": (BATCH, memory_size),
    }

    def called(x: Tensor, memory: Tensor, grad: bool = True) -> dict[str, Tensor]:
        # A copy: without gradients a policy may write into the memory that it is given.
        with torch.set_grad_enabled(grad):
            return dict(zip(expected, bound(learned, x, memory.clone())))

    start = torch.zeros(BATCH, memory_size, dtype=torch.float64)
    with usable(model, "forward(features [B, T, F], memory [B, M]) works for several steps"):
        whole = called(x, start)
    for name, shape in expected.items():
        if tuple(whole[name].shape) != shape or not_finite({name: whole[name]}):
            values = f"it is {list(whole[name].shape)}" + (
                ", with NaN or Inf" if not_finite({name: whole[name]}) else ""
            )
            raise ShapeError(model, f"{name} is a finite tensor {list(shape)}", values, "return (head, value, memory)")
    _rows_apart(model, called, x, whole, memory_size)
    _step_by_step(model, called, x, whole, start)


Called = Callable[..., dict[str, Tensor]]


def _rows_apart(model: object, called: Called, x: Tensor, whole: dict[str, Tensor], memory: int) -> None:
    alone = called(x[1:2], torch.zeros(1, memory, dtype=torch.float64))
    for name, value in alone.items():
        error = relative_error(value[0].detach(), whole[name][1].detach()) if value.numel() else 0.0
        if not error <= ROUNDING:
            values = f"{name} of a trial differs by {error:.1e} between alone and among {BATCH}"
            raise RowError(
                model, "a policy treats the trials of a batch apart", values, "use no statistics of the batch"
            )


def _step_by_step(model: object, called: Called, x: Tensor, whole: dict[str, Tensor], memory: Tensor) -> None:
    heads, values = [], []
    for t in range(LENGTH):
        step = called(x[:, t : t + 1], memory, grad=False)
        memory = step["memory"]
        heads.append(step["head"])
        values.append(step["value"])
    for name, found in (("head", torch.cat(heads, 1)), ("value", torch.cat(values, 1))):
        error = relative_error(found, whole[name].detach())
        if not error <= ROUNDING:
            raise InexactError(
                model,
                "a policy gives the same for steps one by one and together",
                f"{name} differs in float64 by {error:.1e}",
                "let the memory hold all that later steps need, and let no step see later ones",
            )
