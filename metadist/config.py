"""The configuration: strict YAML with dotted overrides → typed settings → a Learner. Layers meet here and in ``experiment``."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

import torch
from torch import nn

from metadist.core.algorithm import Algorithm
from metadist.core.errors import ConfigError, nearest
from metadist.core.learner import Learner
from metadist.core.meta_environment import Continuous, MetaEnvironment
from metadist.core.model import Model
from metadist.core.outer import OuterLoop
from metadist.core.task import TaskFamily
from metadist.core.trial_learner import TrialAlgorithm, TrialLearner
from metadist.runtime.groups import ROLES, WorkerGroup
from metadist.runtime.plan import EngineSettings
from metadist.schema import Document, as_plain, explained, parse_yaml, settings, typed


@dataclass(frozen=True)
class EvaluateSettings:
    """Validation every ``every`` meta-steps on ``tasks`` tasks after ``inner_steps`` (null: the algorithm's) adaptation
    steps; the test split once at the end on ``test_tasks``. ``patience``: stop after so many validations without a better one.
    """

    every: int = 500
    tasks: int = 600
    test_tasks: int = 1000
    inner_steps: int | None = None
    normalization: Literal["transductive", "inductive"] = "transductive"
    patience: int | None = None
    policy: Literal["greedy", "sampled"] = "greedy"


@dataclass(frozen=True)
class CheckpointSettings:
    """Every ``every`` meta-steps; the newest ``keep`` and the best on validation stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True)
class TrackingSettings:
    """``uri``: any MLflow tracking URI, ``auto`` (``MLFLOW_TRACKING_URI``, else a SQLite file beside the runs) or ``none``.
    ``register``: the registered model that the best parameters become a version of, at the end."""

    uri: str = "auto"
    experiment: str = "metadist"
    log_every: int = 10
    register: str | None = None

    def __post_init__(self) -> None:
        if self.register is not None and (not self.register.strip() or set("/:") & set(self.register)):
            raise ConfigError(f"tracking.register: {self.register!r} is no name of a model; expected one without '/' and ':'")
        if self.register is not None and self.uri == "none":
            raise ConfigError(f"tracking.register: {self.register!r} needs MLflow, and tracking.uri is none")


@dataclass(frozen=True)
class ControlSettings:
    """Steering while it trains (``metadist control``). ``port`` 0 takes a free one; without ``token_file`` a token is made that this
    user alone can read. Another ``host`` than loopback needs ``tls_cert`` and ``tls_key``; ``tls_ca`` is what clients trust."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = 0
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"control.port: {self.port}; expected 0 (any free one) to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("control.tls_cert, control.tls_key: TLS takes both, a certificate and its private key")


@dataclass(frozen=True)
class OutsideSettings:
    """Where workers from outside (groups with ``outside: true``) connect: ``listen`` is HOST:PORT, port 0 takes a free one. On
    loopback the token is optional; anywhere else ``token_file``, ``tls_cert`` and ``tls_key`` are needed. A worker of which
    nothing was heard for ``lease`` seconds has lost its shards to others.
    """

    listen: str | None = None
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    lease: float = 15.0

    def __post_init__(self) -> None:
        if self.listen is not None:
            host, _, port = self.listen.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                raise ConfigError(f"outside.listen: '{self.listen}'; expected HOST:PORT, such as 127.0.0.1:8471")
        if not 1 <= self.lease <= 3600:
            raise ConfigError(f"outside.lease: {self.lease:g}; expected 1 to 3600 seconds")

    @property
    def host(self) -> str:
        return (self.listen or "127.0.0.1:0").rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int((self.listen or "127.0.0.1:0").rpartition(":")[2])


@dataclass(frozen=True)
class MetricSettings:
    """A metric of the user's: an import path ``package.module:function`` and which way is better."""

    name: str
    higher_is_better: bool = False


@dataclass(frozen=True)
class Config:
    """A whole experiment. ``tasks``, ``model`` and ``algorithm`` are built already; ``document`` is what they were built from."""

    name: str
    seed: int
    tasks: TaskFamily | MetaEnvironment
    model: Callable[[], nn.Module]
    freeze: tuple[str, ...]
    algorithm: Any
    outer: OuterLoop
    evaluate: EvaluateSettings
    workers: tuple[WorkerGroup, ...]
    engine: EngineSettings
    checkpoint: CheckpointSettings
    tracking: TrackingSettings
    control: ControlSettings
    outside: OutsideSettings
    init_from: str | None
    document: Document = field(repr=False)

    def learner(self) -> Learner | TrialLearner:
        with explained("model", getattr(self.model, "func", self.model)):
            model = Model(self.model, dtype=getattr(torch, self.engine.dtype), freeze=self.freeze)
        if isinstance(self.tasks, MetaEnvironment):
            apart = any(g.role == "environment" and g.max for g in self.workers)
            role = "environment" if apart else "learner"
            return TrialLearner(
                self.algorithm, model, self.tasks, self.outer, self.engine.non_finite, rollout_role=role, policy=self.evaluate.policy
            )
        return Learner(self.algorithm, model, self.tasks, self.outer, self.evaluate.normalization, self.engine.non_finite)


def supervised(learner: Learner | TrialLearner) -> Learner:
    """``learner``, where it learns from supervised tasks; else a ConfigError."""
    if not isinstance(learner, Learner):
        raise ConfigError(f"environment: {type(learner.tasks).__name__} is a meta-environment; this is for supervised tasks")
    return learner


#: how many workers of a role may come from outside where the config doesn't say
MOST_OUTSIDE = 16
KEYS = (
    "name", "seed", "tasks", "environment", "model", "algorithm", "outer", "evaluate", "workers", "engine", "checkpoint", "tracking",
    "control", "outside", "init_from", "loss", "metric",
)  # fmt: skip


# Reading --------------------------------------------------------------------------------------------------------------


def config_folders() -> list[Path]:
    here = Path(__file__).parent
    return [folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()]


def shipped_configs() -> dict[str, Path]:
    """Config name → file, of those that come with the package."""
    return {path.stem: path for folder in reversed(config_folders()) for path in sorted(folder.glob("*.yaml"))}


def asked(config: str, overrides: Sequence[str] | None, workers: str | None = None) -> Document:
    """What a command line asks for: a config with ``KEY=VALUE``s and ``--workers``."""
    document = override(read_document(config), overrides or [])
    return document if workers is None else set_workers(document, workers)


def read_document(config: str) -> Document:
    """The YAML file at a path, or the shipped one of that name."""
    path = Path(config)
    if not os.path.isfile(config):  # False where even the name is impossible
        shipped = shipped_configs()
        if os.path.exists(config):
            raise ConfigError(f"config '{config}' is a folder; expected a YAML file" if path.is_dir() else f"config '{config}' is no file")
        if config not in shipped:
            raise ConfigError(
                f"config '{config}' is neither a file nor one of the shipped ones: {', '.join(sorted(shipped))}{nearest(config, shipped)}"
            )
        path = shipped[config]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{config}' can't be read: {error}") from error
    document = parse_yaml(text, str(config))
    if not isinstance(document, dict):
        raise ConfigError(f"config '{config}': expected keys and values, found {type(document).__name__}")
    return document


def override(document: Document, assignments: Sequence[str]) -> Document:
    """``a.b=value`` on a copy; values are YAML. Lists are indexed: ``workers.0.cpus=2``."""
    document = json.loads(json.dumps(document))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"override '{assignment}': expected KEY=VALUE, such as outer.lr=1e-3")
        *parents, last = path.split(".")
        where: Any = document
        for key in parents:
            where = _step_into(where, key, path)
        value = parse_yaml(text, f"override '{assignment}'")
        if isinstance(where, list):
            where[_index(where, last, path)] = value
        elif isinstance(where, dict):
            where[last] = value
        else:
            raise ConfigError(f"override '{path}': '{parents[-1]}' is the value {where!r} and has no key '{last}'")
    return document


def _step_into(where: Any, key: str, path: str) -> Any:
    if isinstance(where, list):
        return where[_index(where, key, path)]
    if not isinstance(where, dict):
        raise ConfigError(f"override '{path}': {where!r} has no key '{key}'")
    if where.get(key) is None:
        where[key] = {}
    return where[key]


def _index(items: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ConfigError(f"override '{path}': '{key}' is not an index below {len(items)}")
    return int(key)


def set_workers(document: Document, workers: str) -> Document:
    """``--workers N``: N learners, beside the environments of the config; 0 computes all in this process.
    ``learners=1,environments=2``: so many of each role, in a group of their own where the config has none."""
    groups = document.get("workers") or [{"role": "learner"}]
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise ConfigError(f"workers: expected a list of groups, such as [{{role: learner, max: 2}}], got {groups!r}")
    groups = [dict(g) for g in groups]
    for role, count in _counts(workers, "environment" in document).items():
        chosen = [g for g in groups if g.get("role", "learner") == role and not g.get("outside")]
        if not chosen:
            chosen = [{"role": role, "gpus": 0 if role == "environment" else "auto"}]
            groups += chosen
        for group in chosen:
            group.update(min=count, max=count)
    if workers.strip() == "0":
        for group in groups:
            group.update(min=0, max=0)
    return {**document, "workers": groups}


def set_outside(document: Document, listen: str) -> Document:
    """``--outside HOST:PORT``: workers may also come from outside, in every role that the config's workers have."""
    groups = [dict(g) for g in document.get("workers") or [{"role": "learner"}]]
    roles = {g.get("role", "learner") for g in groups if g.get("max", 1) or g.get("role", "learner") == "learner"}
    for role in sorted(roles):
        outside = [g for g in groups if g.get("outside") and g.get("role", "learner") == role]
        if not outside:
            groups.append({"role": role, "min": 0, "max": MOST_OUTSIDE, "outside": True})
        for group in outside:
            group["max"] = group.get("max") or MOST_OUTSIDE
    return {**document, "workers": groups, "outside": {**(document.get("outside") or {}), "listen": listen}}


def _counts(workers: str, trials: bool) -> dict[str, int]:
    """Role → number, of what was given as --workers."""
    counts: dict[str, int] = {}
    for part in workers.split(","):
        name, equals, number = part.partition("=")
        role = name.strip().removesuffix("s") if equals else "learner"
        number = number if equals else part
        if not number.strip().isdecimal():
            raise ConfigError(f"--workers {workers}: expected a number, such as 2, or role=number, such as learners=1,environments=2")
        if role not in ROLES:
            raise ConfigError(f"--workers {workers}: '{role}' is not one of {', '.join(ROLES)}{nearest(role, ROLES)}")
        if role in counts:
            raise ConfigError(f"--workers {workers}: {role}s are given twice")
        if role == "environment" and not trials:
            raise ConfigError(f"--workers {workers}: supervised tasks have no environments; expected learners alone")
        counts[role] = int(number)
    if counts.get("environment") and counts.get("learner") == 0:
        raise ConfigError(f"--workers {workers}: environments alone learn nothing; expected at least learners=1, or 0 to compute all in this process")
    return counts


# Building -------------------------------------------------------------------------------------------------------------


def build(document: Document) -> Config:
    """Every key checked, every part built. Raises ConfigError naming the key, the value and what is allowed."""
    from metadist.algorithms import ALGORITHMS
    from metadist.envs import ENVIRONMENTS
    from metadist.models import MODELS
    from metadist.tasks import TASKS

    for key in document:
        if key not in KEYS:
            raise ConfigError(f"unknown key '{key}'{nearest(str(key), KEYS)}; allowed: {', '.join(KEYS)}")
    if "tasks" in document and "environment" in document:
        raise ConfigError("tasks, environment: give one of them: a family of supervised tasks, or a meta-environment")
    what = "environment" if "environment" in document else "tasks"
    for key in (what, "model", "algorithm"):
        if key not in document:
            raise ConfigError(f"key '{key}' is missing; expected {key}: {{name: …}}" + (" (or environment: {name: …})" if key == "tasks" else ""))
    tasks = _component(what, document[what], ENVIRONMENTS if what == "environment" else TASKS)
    _judge_by(tasks, document)
    model_document = dict(_mapping("model", document["model"]))
    freeze = typed("model.freeze", model_document.pop("freeze", []), tuple[str, ...])
    algorithm = _component("algorithm", document["algorithm"], ALGORITHMS)
    model = _component("model", model_document, MODELS, deferred=True)
    kind: Any = MetaEnvironment if what == "environment" else TaskFamily
    if not isinstance(tasks, kind):
        raise ConfigError(f"{what}.name: {type(tasks).__name__} is not a metadist.{kind.__name__}")
    wanted: Any = TrialAlgorithm if what == "environment" else Algorithm
    if not isinstance(algorithm, wanted):
        fits = [n for n, cls in ALGORITHMS.items() if issubclass(cls, wanted)]
        raise ConfigError(
            f"algorithm.name: {type(algorithm).__name__} is not a metadist.{wanted.__name__}; with {what}: {', '.join(sorted(fits))}, or your own"
        )
    factory = _factory(model, tasks, algorithm)
    groups = document.get("workers")
    if groups is not None and not isinstance(groups, list):
        raise ConfigError(f"workers: expected a list of groups, such as [{{role: learner, max: 2}}], got {groups!r}")
    config = Config(
        name=typed("name", document.get("name", "experiment"), str),
        seed=typed("seed", document.get("seed", 0), int),
        tasks=tasks,
        model=factory,
        freeze=freeze,
        algorithm=algorithm,
        outer=settings("outer", document.get("outer"), OuterLoop),
        evaluate=settings("evaluate", document.get("evaluate"), EvaluateSettings),
        workers=tuple(settings(f"workers.{i}", g, WorkerGroup) for i, g in enumerate(groups or [{}])),
        engine=settings("engine", document.get("engine"), EngineSettings),
        checkpoint=settings("checkpoint", document.get("checkpoint"), CheckpointSettings),
        tracking=settings("tracking", document.get("tracking"), TrackingSettings),
        control=settings("control", document.get("control"), ControlSettings),
        outside=settings("outside", document.get("outside"), OutsideSettings),
        init_from=typed("init_from", document.get("init_from"), Union[str, None]),
        document=document,
    )
    _check_name(config.name)
    _check_outside(config, what)
    for key, value in (
        ("evaluate.every", config.evaluate.every),
        ("evaluate.tasks", config.evaluate.tasks),
        ("evaluate.test_tasks", config.evaluate.test_tasks),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
        ("tracking.log_every", config.tracking.log_every),
    ):
        if value < 1:
            raise ConfigError(f"{key}: {value} is below 1")
    for key, limit in (
        ("evaluate.inner_steps", config.evaluate.inner_steps),
        ("evaluate.patience", config.evaluate.patience),
        ("engine.shard_timeout", config.engine.shard_timeout),
        ("engine.worker_patience", config.engine.worker_patience),
    ):
        lowest = 0 if key == "evaluate.inner_steps" else 1
        if limit is not None and limit < lowest:
            raise ConfigError(f"{key}: {limit} is below {lowest}")
    return config


def _check_outside(config: Config, what: str) -> None:
    """Groups of workers from outside that nobody could join, or that nothing could be asked of."""
    groups = [(i, g) for i, g in enumerate(config.workers) if g.outside and g.max]
    for i, group in groups:
        if config.outside.listen is None:
            raise ConfigError(f"workers.{i}.outside: true, but there is no address to connect to; give outside: {{listen: HOST:PORT}}, or --outside HOST:PORT")
        if group.role == "environment" and what == "tasks":
            raise ConfigError(f"workers.{i}.role: environment, but supervised tasks have no environments; expected learners")
        if sum(other.role == group.role for _, other in groups) > 1:
            raise ConfigError(f"workers.{i}: two groups of {group.role}s from outside; expected one for each role")
    if groups and config.engine.wire != "exact":
        raise ConfigError(f"engine.wire: {config.engine.wire} is for workers of the Ray cluster; with workers from outside use exact")


def environment(document: Document) -> MetaEnvironment:
    """The meta-environment of a document alone."""
    from metadist.envs import ENVIRONMENTS

    if "environment" not in document:
        raise ConfigError("key 'environment' is missing; expected environment: {name: …}")
    made = _component("environment", document["environment"], ENVIRONMENTS)
    if not isinstance(made, MetaEnvironment):
        raise ConfigError(f"environment.name: {type(made).__name__} is not a metadist.MetaEnvironment")
    return made


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name):
        raise ConfigError(f"name: '{name}' must be 1 to 80 letters, digits, '.', '_' or '-', since it names a folder")


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected {{name: …}}, got {value!r}")
    return value


def _component(key: str, value: Any, known: Mapping[str, type], deferred: bool = False) -> Any:
    """An object named in a dict of ours or by ``package.module:Class``; ``deferred`` gives (class, arguments) for classes not ours."""
    options = dict(_mapping(key, value))
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{key}.name is missing; expected one of {', '.join(sorted(known))}, or package.module:Class of your own")
    if ":" in name:
        cls = import_path(name, f"{key}.name")
    elif name in known:
        cls = known[name]
    else:
        raise ConfigError(
            f"{key}.name: '{name}' is not one of {', '.join(sorted(known))}{nearest(name, known)} (your own: package.module:Class)"
        )
    if is_dataclass(cls):
        return settings(key, options, cls)
    if isinstance(cls, (TaskFamily, MetaEnvironment, Algorithm, TrialAlgorithm, nn.Module)):
        if options:
            raise ConfigError(f"{key}: '{name}' is an object already and takes no {', '.join(options)}")
        return cls
    if not callable(cls):
        raise ConfigError(f"{key}.name: '{name}' is {cls!r}; expected a class or a function")
    _check_arguments(key, cls, options)
    if deferred:
        return functools.partial(cls, **options)
    with explained(key, cls):
        return cls(**options)


def _check_arguments(key: str, callable_: Any, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(callable_)
    except ValueError:  # some built-in ones have none
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{key}: {getattr(callable_, '__name__', callable_)}{signature}: {error}") from error


def import_path(path: str, key: str) -> Any:
    """``package.module:name``, with the working directory importable."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{key}: '{path}': {error}; modules are looked for in the working directory and on PYTHONPATH") from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({line.filename}, line {line.lineno})"
        raise ConfigError(f"{key}: '{path}' can't be imported: {type(error).__name__}: {error}{where}") from error
    if not hasattr(imported, name):
        names = [n for n in vars(imported) if not n.startswith("_")]
        raise ConfigError(f"{key}: module '{module}' has no '{name}'{nearest(name, names)}")
    return getattr(imported, name)


def _factory(model: Any, tasks: TaskFamily | MetaEnvironment, algorithm: Any) -> Callable[[], nn.Module]:
    if isinstance(model, nn.Module):
        return functools.partial(_itself, model)
    if isinstance(tasks, MetaEnvironment):
        if not hasattr(model, "build_policy"):
            from metadist.models import MODELS

            fits = [n for n, cls in MODELS.items() if hasattr(cls, "build_policy")]
            raise ConfigError(f"model.name: '{type(model).__name__}' is no policy; with environment: {', '.join(sorted(fits))}")
        return functools.partial(model.build_policy, tasks.observation_size, tasks.actions.size, isinstance(tasks.actions, Continuous))
    if not hasattr(model, "build") and hasattr(model, "build_policy"):
        raise ConfigError(f"model.name: '{type(model).__name__}' is a policy, which goes with environment, not with tasks")
    if hasattr(model, "build"):
        if tasks.input_shape is None:
            raise ConfigError(f"tasks: {type(tasks).__name__} must state its input_shape for model '{type(model).__name__}'")
        return functools.partial(model.build, tuple(tasks.input_shape), algorithm.outputs(tasks))
    if not callable(model):
        raise ConfigError(f"model: expected a torch.nn.Module, a function that builds one, or a class with build(), got {type(model).__name__}")
    return model


def _itself(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


def _judge_by(tasks: Any, document: Document) -> None:
    """Put the user's own loss and metric in the family's place."""
    if document.get("loss") is not None:
        loss = _function(typed("loss", document["loss"], str), "loss")
        object.__setattr__(tasks, "loss", loss)
    if document.get("metric") is not None:
        metric = document["metric"]
        chosen = settings("metric", {"name": metric} if isinstance(metric, str) else metric, MetricSettings)
        object.__setattr__(tasks, "metric", _function(chosen.name, "metric"))
        object.__setattr__(tasks, "metric_name", chosen.name.partition(":")[2])
        object.__setattr__(tasks, "higher_is_better", chosen.higher_is_better)


def _function(path: str, key: str) -> Any:
    found = import_path(path, key)
    if not callable(found):
        raise ConfigError(f"{key}: '{path}' is {found!r}; expected a function (prediction [N, …], target [N, …]) → one value per example [N]")
    return found


def resolved(config: Config) -> Document:
    """The document with every default filled in: what ``--print-config`` shows and a run records."""
    document: Document = {"name": config.name, "seed": config.seed}
    what = "environment" if "environment" in config.document else "tasks"
    for key, part in ((what, config.tasks), ("model", config.model), ("algorithm", config.algorithm)):
        given = dict(_mapping(key, config.document[key]))
        instance: Any = part
        if key == "model" and isinstance(part, functools.partial) and inspect.ismethod(part.func):
            instance = part.func.__self__
        document[key] = {"name": given.get("name"), **(as_plain(instance) if is_dataclass(instance) else given), **given}
    document["outer"] = as_plain(config.outer)
    document["evaluate"] = as_plain(config.evaluate)
    document["workers"] = [as_plain(g) for g in config.workers]
    for key in ("engine", "checkpoint", "tracking", "control", "outside"):
        document[key] = as_plain(getattr(config, key))
    return {**document, **{k: config.document.get(k) for k in ("init_from", "loss", "metric")}}
