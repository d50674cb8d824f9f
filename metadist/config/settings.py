"""The settings of an experiment, one dataclass per section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.core.errors import ConfigError, at_least
from metadist.core.text import has_password


@dataclass(frozen=True)
class EvaluateSettings:
    """Validation and test.

    Every ``every`` meta-steps ``tasks`` validation tasks judge θ, after ``inner_steps`` adaptation steps (null: the
    algorithm's own number). ``test_tasks`` test tasks judge the best θ once, at the end. Training stops after
    ``patience`` validations without a better one. ``policy`` is the choice of actions in a meta-environment. ``seed``
    is the seed of validation and test tasks (null: the run's own seed); all seeds of a group share it, so that the
    same tasks judge them.
    """

    every: int = 500
    tasks: int = 600
    test_tasks: int = 1000
    inner_steps: int | None = None
    normalization: Literal["transductive", "inductive"] = "transductive"
    patience: int | None = None
    policy: Literal["greedy", "sampled"] = "greedy"
    seed: int | None = None

    def __post_init__(self) -> None:
        at_least(1, **{f"evaluate.{n}": getattr(self, n) for n in ("every", "tasks", "test_tasks", "patience")})
        at_least(0, **{"evaluate.inner_steps": self.inner_steps, "evaluate.seed": self.seed})


@dataclass(frozen=True)
class CheckpointSettings:
    """A checkpoint every ``every`` meta-steps. The newest ``keep`` and the best on validation stay.

    The states of particles (algorithms with carried state) are saved with every checkpoint, and every ``states_every``
    meta-steps: a state that is lost with its worker is computed again from there.
    """

    every: int = 500
    keep: int = 2
    states_every: int = 100

    def __post_init__(self) -> None:
        at_least(1, **{f"checkpoint.{n}": getattr(self, n) for n in ("every", "keep", "states_every")})


@dataclass(frozen=True)
class TrackingSettings:
    """Experiment tracking.

    ``uri`` is any MLflow tracking URI, ``auto`` (``MLFLOW_TRACKING_URI``, else a SQLite file in the folder of the
    runs), ``none``, or the URI of a tracker plug-in. At the end, the best parameters become a version of the
    registered model ``register``.
    """

    uri: str = "auto"
    experiment: str = "metadist"
    log_every: int = 10
    register: str | None = None

    def __post_init__(self) -> None:
        at_least(1, **{"tracking.log_every": self.log_every})
        if has_password(self.uri):
            raise ConfigError(
                "tracking.uri: a password in a config would stand in the run's files, in its exports and in MLflow; "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole URI as MLFLOW_TRACKING_URI "
                "with tracking.uri: auto"
            )
        if self.register is not None and (not self.register.strip() or set("/:") & set(self.register)):
            raise ConfigError(
                f"tracking.register: {self.register!r} is not a valid model name; expected a name without '/' and ':'"
            )
        if self.register is not None and self.uri == "none":
            raise ConfigError(f"tracking.register: {self.register!r} needs MLflow, and tracking.uri is none")


@dataclass(frozen=True)
class ControlSettings:
    """The control plane of a run (``metadist control``).

    ``port`` 0 takes a free port. Without ``token_file`` the driver writes a token that only this user can read. A
    ``host`` other than loopback needs ``tls_cert`` and ``tls_key``; clients verify the server with ``tls_ca``.
    """

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
    """The server for remote workers (groups with ``outside: true``).

    ``listen`` is HOST:PORT; port 0 takes a free port. On loopback the token is optional; other hosts need
    ``token_file``, ``tls_cert`` and ``tls_key``. A worker that sends nothing for ``lease`` seconds loses its shards to
    other workers.
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
    """The user's own metric: its import path ``package.module:function``, and whether higher values are better."""

    name: str
    higher_is_better: bool = False
