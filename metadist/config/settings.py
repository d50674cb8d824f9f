"""The settings of an experiment, one dataclass per section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metadist.core.errors import ConfigError, at_least


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

    def __post_init__(self) -> None:
        at_least(1, **{f"evaluate.{n}": getattr(self, n) for n in ("every", "tasks", "test_tasks", "patience")})
        at_least(0, **{"evaluate.inner_steps": self.inner_steps})


@dataclass(frozen=True)
class CheckpointSettings:
    """Every ``every`` meta-steps; the newest ``keep`` and the best on validation stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        at_least(1, **{"checkpoint.every": self.every, "checkpoint.keep": self.keep})


@dataclass(frozen=True)
class TrackingSettings:
    """``uri``: any MLflow tracking URI, ``auto`` (``MLFLOW_TRACKING_URI``, else a SQLite file beside the runs) or ``none``.
    ``register``: the registered model that the best parameters become a version of, at the end."""

    uri: str = "auto"
    experiment: str = "metadist"
    log_every: int = 10
    register: str | None = None

    def __post_init__(self) -> None:
        at_least(1, **{"tracking.log_every": self.log_every})
        if self.register is not None and (not self.register.strip() or set("/:") & set(self.register)):
            raise ConfigError(
                f"tracking.register: {self.register!r} is no name of a model; expected one without '/' and ':'"
            )
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
