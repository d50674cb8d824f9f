"""``metadist control``: control a run while it trains."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metadist.cli.terminal import clean_errors, say, set_up_logging
from metadist.core.text import show as print  # no call can forget to escape control characters

if TYPE_CHECKING:
    from metadist.control.client import RemoteRun
    from metadist.control.commands import Command, Status

ACTIONS = ("status", "watch", "pause", "resume", "checkpoint", "set", "stop")
Seconds = Annotated[
    float, typer.Option(help="How long to wait until a command takes effect, at the end of a meta-step.", min=0.1)
]


def control(
    run: Annotated[str, typer.Argument(help="The run directory that train printed, or HOST:PORT of a driver.")],
    action: Annotated[str, typer.Argument(help=", ".join(ACTIONS))],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="For set: meta_batch_size=64, workers=3, workers=environments=2."),
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The driver's token; default: the file in its record.")
    ] = None,
    tls_ca: Annotated[
        str | None, typer.Option(help="The certificate of a driver with TLS, or of its authority (PEM).")
    ] = None,
    timeout: Seconds = 600.0,
    seconds: Annotated[
        float | None, typer.Option(help="For watch: the duration; default: until the run ends.", min=0.1)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object; watch and set print one object per line.")
    ] = False,
) -> None:
    """Show the status of a run that trains, watch it, pause, resume, save, resize or stop it.

    Commands take effect between two meta-steps and are recorded in the run's command log. A resumed run repeats the
    commands that change the parameters, so its final parameters are the same bits as without the interruption.
    """
    set_up_logging()
    with clean_errors():
        commands = _commands(action, assignments or [])
        with _connected(run, token_file, tls_ca) as remote:
            if action == "status":
                _show_status(remote.status(), as_json)
            elif action == "watch":
                _watch(remote, seconds, as_json)
            else:
                for command in commands:
                    _obey(remote, command, timeout, as_json)


def _commands(action: str, assignments: Sequence[str]) -> list[Command]:
    """Return the commands of ``action``; none for status and watch. ConfigError where the arguments are wrong."""
    from metadist.control.commands import COMMANDS, Command
    from metadist.core.errors import ConfigError, nearest

    if action not in ACTIONS:
        raise ConfigError(f"control: '{action}' is not one of {', '.join(ACTIONS)}{nearest(action, ACTIONS)}")
    if action == "set":
        if not assignments:
            raise ConfigError("control set: expected meta_batch_size=N or workers=N")
        return [Command(*parsed) for parsed in _parse(assignments)]
    if assignments:
        raise ConfigError(f"control {action}: unexpected argument '{' '.join(assignments)}'; expected none")
    return [Command(action)] if action in COMMANDS else []


@contextmanager
def _connected(run: str, token_file: str | None, tls_ca: str | None) -> Iterator[RemoteRun]:
    """Connect to the driver at an address, or to the driver in the record of a run directory."""
    from metadist.core.errors import ConfigError

    try:
        from metadist.control.client import RemoteRun
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"control: {error.name} is not installed; pip install grpcio grpcio-health-checking grpcio-reflection "
            "protobuf"
        ) from error
    if re.fullmatch(r"(grpcs?://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+", run) and not os.path.isdir(run):
        if token_file is None:
            raise ConfigError(
                f"control {run}: give the driver's token, --token-file FILE; it is control.token in the run directory"
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
            raise ConfigError(f"another run, {found}, answers at {address}; the record in {run} is out of date")
        yield remote


def _parse(assignments: Sequence[str]) -> list[tuple[str, int, str]]:
    """Return (command, value, role) of each ``meta_batch_size=64``, ``workers=3``, ``workers=environments=2``."""
    from metadist.core.errors import ConfigError, nearest

    parsed: list[tuple[str, int, str]] = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if key not in ("meta_batch_size", "workers") or not equals:
            raise ConfigError(
                f"control set: '{assignment}'; expected meta_batch_size=N or "
                f"workers=N{nearest(key, ('meta_batch_size', 'workers'))}"
            )
        for part in text.split(",") if key == "workers" else [text]:
            role, named, number = part.rpartition("=") if key == "workers" else ("", "", part)
            if not re.fullmatch(r"\d{1,18}", number.strip()):
                raise ConfigError(
                    f"control set {assignment}: '{part}' is not a whole number"
                    + (" or role=number" if key == "workers" else "")
                )
            parsed.append((f"set_{key}", int(number), role.strip().removesuffix("s") if named else "learner"))
    return parsed


def _obey(remote: RemoteRun, command: Command, timeout: float, as_json: bool) -> None:
    result = remote.obey(command, timeout)
    if as_json:
        about = {"command": command.name, "value": command.value}
        print(json.dumps({**about, "meta_step": result.meta_step, "message": result.message}))
    elif result.meta_step is None:
        print(f"{result.message}; see whether it took effect: metadist control … status")
    else:
        print(f"meta-step {result.meta_step}: {result.message}")


def _watch(remote: RemoteRun, seconds: float | None, as_json: bool) -> None:
    until = None if seconds is None else time.monotonic() + seconds
    for snapshot in remote.watch(seconds):
        if as_json:
            values = _finite(snapshot.values)
            about = {
                "kind": snapshot.kind,
                "meta_step": snapshot.meta_step,
                "values": values,
                "message": snapshot.message,
                "time": snapshot.time,
            }
            print(json.dumps(about), flush=True)
        else:
            label = "validation  " if snapshot.kind == "validation" else ""
            print(f"meta-step {snapshot.meta_step}  {label}{snapshot.message or _figures(snapshot.values)}", flush=True)
        if until is not None and time.monotonic() > until:
            return
    if until is None:
        say("the run has ended")


def _show_status(status: Status, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        about = asdict(status)
        print(json.dumps({**about, "values": _finite(status.values), "validation": _finite(status.validation)}))
        return
    workers = ", ".join(
        _workers(role, asked, status.there.get(role, 0)) for role, asked in sorted(status.asked.items()) if asked
    )
    rows = {
        "run": f"{status.run_id}, process {status.pid} on {status.host}",
        "phase": status.phase,
        "meta-step": f"{status.meta_step} of {status.meta_steps}",
        "meta-batch": f"{status.meta_batch_size} tasks",
        "workers": workers or "none: the driver computes",
        "tasks/s": f"{status.tasks_per_second:.1f}" if status.tasks_per_second else "",
        "newest": _figures(status.values),
        "validation": _figures({k: v for k, v in status.validation.items() if k != "meta_step"})
        + (f"  at meta-step {status.validation['meta_step']:.0f}" if status.validation else ""),
        "checkpoint": "" if status.checkpoint is None else f"meta-step {status.checkpoint}",
        "obeyed": "; ".join(f"{_described(c)} at {c['meta_step']}" for c in status.commands[-5:]),
        "waiting": "; ".join(status.waiting),
    }
    for key, value in rows.items():
        if value:
            print(f"{key:<12}{value}")


def _workers(role: str, asked: int, there: int) -> str:
    return f"{asked} {role}{'s' if asked != 1 else ''}" + (f" ({there} present)" if there != asked else "")


def _described(command: Mapping[str, Any]) -> str:
    value = f"={command['value']}" if "value" in command else ""
    role = f" ({command['role']}s)" if command.get("role", "learner") != "learner" else ""
    return f"{command['command'].replace('set_', 'set ')}{value}{role}"


def _figures(values: Mapping[str, float]) -> str:
    last = ("gradient_norm", "lr", "tasks_per_second")
    shown = sorted(values, key=lambda k: (last.index(k) if k in last else -1, k))
    return "  ".join(f"{k} {values[k]:.1f}" if k == "tasks_per_second" else f"{k} {values[k]:.4g}" for k in shown)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
