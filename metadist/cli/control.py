"""``metadist control``: steer a run while it trains."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from metadist.cli.terminal import clean_errors, say, set_up_logging

ACTIONS = ("status", "watch", "pause", "resume", "checkpoint", "set", "stop")
Seconds = Annotated[
    float, typer.Option(help="How long to wait until a command has taken effect, at the end of a meta-step.", min=0.1)
]


def control(
    run: Annotated[str, typer.Argument(help="The folder that train printed, or HOST:PORT of a driver.")],
    action: Annotated[str, typer.Argument(help=", ".join(ACTIONS))],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Of set: meta_batch_size=64, workers=3, workers=environments=2."),
    ] = None,
    token_file: Annotated[str | None, typer.Option(help="The driver's token; default: where its record says.")] = None,
    tls_ca: Annotated[
        str | None, typer.Option(help="PEM file with the certificate, or its authority, of a driver that speaks TLS.")
    ] = None,
    timeout: Seconds = 600.0,
    seconds: Annotated[
        float | None, typer.Option(help="Of watch: for so long; default: until the run is over.", min=0.1)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: one object; of watch and set one a line.")
    ] = False,
) -> None:
    """Look at a run that trains, pause and resume it, write a checkpoint, change meta-batch size or workers, stop it.

    Commands take effect between two meta-steps and are kept in the run's command log; a resumed run repeats those that change
    the parameters, so they are the same bits as without the interruption.
    """
    set_up_logging()
    with clean_errors():
        from metadist.control.commands import COMMANDS, Command
        from metadist.core.errors import ConfigError, nearest

        if action not in ACTIONS:
            raise ConfigError(f"control: '{action}' is not one of {', '.join(ACTIONS)}{nearest(action, ACTIONS)}")
        if (action == "set") != bool(assignments):
            given = " ".join(assignments or [])
            raise ConfigError(
                "control set: expected meta_batch_size=N or workers=N"
                if action == "set"
                else f"control {action}: '{given}' is not expected"
            )
        orders = (
            [Command(*order) for order in _orders(assignments or [])] or [Command(action)]
            if action in ("set", *COMMANDS)
            else []
        )
        with _connected(run, token_file, tls_ca) as remote:
            if action == "status":
                _show_status(remote.status(), as_json)
            elif action == "watch":
                _watch(remote, seconds, as_json)
            else:
                for command in orders:
                    _obey(remote, command, timeout, as_json)


@contextmanager
def _connected(run: str, token_file: str | None, tls_ca: str | None) -> Iterator[Any]:
    from metadist.core.errors import ConfigError

    try:
        from metadist.control.client import RemoteRun
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"control: {error.name} is not installed; pip install grpcio grpcio-health-checking grpcio-reflection protobuf"
        ) from error
    import os

    if re.fullmatch(r"(grpcs?://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+", run) and not os.path.isdir(run):
        if token_file is None:
            raise ConfigError(
                f"control {run}: give the driver's token, --token-file FILE; it lies in the run's folder as control.token"
            )
        with RemoteRun(run, token_file, tls_ca) as remote:
            yield remote
        return
    from metadist.control.driver_record import driver_of

    record = driver_of(run)
    token = token_file or record["token_file"]
    if not os.path.isfile(token):
        raise ConfigError(
            f"control: the driver's token file {token} is not on this machine; give a copy, --token-file FILE"
        )
    address, authority = record["address"], tls_ca or record["tls_ca"]
    if record["tls"] and authority is None and "://" not in address:
        address = f"grpcs://{address}"
    with RemoteRun(address, token, authority) as remote:
        if (found := remote.status().run_id) != record["run_id"]:
            raise ConfigError(f"at {address} another run answers, {found}; the record in {run} is out of date")
        yield remote


def _orders(assignments: Sequence[str]) -> list[tuple[str, int, str]]:
    """(command, value, role) of ``meta_batch_size=64``, ``workers=3``, ``workers=learners=3,environments=2``."""
    from metadist.core.errors import ConfigError, nearest

    orders: list[tuple[str, int, str]] = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key not in ("meta_batch_size", "workers") or not equals:
            raise ConfigError(
                f"control set: '{assignment}'; expected meta_batch_size=N or workers=N{nearest(key, ('meta_batch_size', 'workers'))}"
            )
        for part in text.split(",") if key == "workers" else [text]:
            role, named, number = part.rpartition("=") if key == "workers" else ("", "", part)
            if not re.fullmatch(r"\d{1,18}", number.strip()):
                raise ConfigError(
                    f"control set {assignment}: '{part}' is not a whole number"
                    + (" or role=number" if key == "workers" else "")
                )
            orders.append((f"set_{key}", int(number), role.strip().removesuffix("s") if named else "learner"))
    return orders


def _obey(remote: Any, command: Any, timeout: float, as_json: bool) -> None:
    answer = remote.obey(command, timeout)
    if as_json:
        print(
            json.dumps(
                {
                    "command": command.name,
                    "value": command.value,
                    "meta_step": answer.meta_step,
                    "message": answer.message,
                }
            )
        )
    elif answer.meta_step is None:
        print(f"{answer.message}; look for it with: metadist control … status")
    else:
        print(f"meta-step {answer.meta_step}: {answer.message}")


def _watch(remote: Any, seconds: float | None, as_json: bool) -> None:
    until = None if seconds is None else time.monotonic() + seconds
    for sight in remote.watch(seconds):
        if as_json:
            values = _finite(sight.values)
            about = {
                "kind": sight.kind,
                "meta_step": sight.meta_step,
                "values": values,
                "message": sight.message,
                "time": sight.time,
            }
            print(json.dumps(about), flush=True)
        else:
            what = "validation  " if sight.kind == "validation" else ""
            print(f"meta-step {sight.meta_step}  {what}{sight.message or _figures(sight.values)}", flush=True)
        if until is not None and time.monotonic() > until:
            return
    if until is None:
        say("the run is over")


def _show_status(standing: Any, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        about = asdict(standing)
        print(json.dumps({**about, "values": _finite(standing.values), "validation": _finite(standing.validation)}))
        return
    workers = ", ".join(
        _workers(role, asked, standing.there.get(role, 0)) for role, asked in sorted(standing.asked.items()) if asked
    )
    rows = {
        "run": f"{standing.run_id}, process {standing.pid} on {standing.host}",
        "phase": standing.phase,
        "meta-step": f"{standing.meta_step} of {standing.meta_steps}",
        "meta-batch": f"{standing.meta_batch_size} tasks",
        "workers": workers or "none: the driver computes itself",
        "tasks/s": f"{standing.tasks_per_second:.1f}" if standing.tasks_per_second else "",
        "newest": _figures(standing.values),
        "validation": _figures({k: v for k, v in standing.validation.items() if k != "meta_step"})
        + (f"  at meta-step {standing.validation['meta_step']:.0f}" if standing.validation else ""),
        "checkpoint": "" if standing.checkpoint is None else f"meta-step {standing.checkpoint}",
        "obeyed": "; ".join(f"{_named(c)} at {c['meta_step']}" for c in standing.commands[-5:]),
        "waiting": "; ".join(standing.waiting),
    }
    for key, value in rows.items():
        if value:
            print(f"{key:<12}{value}")


def _workers(role: str, asked: int, there: int) -> str:
    return f"{asked} {role}{'s' if asked != 1 else ''}" + (f" ({there} there)" if there != asked else "")


def _named(command: Mapping[str, Any]) -> str:
    value = f"={command['value']}" if "value" in command else ""
    role = f" ({command['role']}s)" if command.get("role", "learner") != "learner" else ""
    return f"{command['command'].replace('set_', 'set ')}{value}{role}"


def _figures(values: Mapping[str, float]) -> str:
    last = ("gradient_norm", "lr", "tasks_per_second")
    shown = sorted(values, key=lambda k: (last.index(k) if k in last else -1, k))
    return "  ".join(f"{k} {values[k]:.1f}" if k == "tasks_per_second" else f"{k} {values[k]:.4g}" for k in shown)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
