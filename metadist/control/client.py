"""Steer a running driver from another process; ``metadist control`` uses this client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc

from metadist.control import control_pb2 as pb
from metadist.control import control_pb2_grpc as rpc
from metadist.control.commands import Command, CommandResult, Snapshot, Status
from metadist.control.service import MESSAGE_BYTES, WAIT_SECONDS, result_of, snapshot_of, status_of
from metadist.rpc.channel import ServiceError, calling, connect

#: timeout of a status call, and margin of a command's; a healthy server answers in milliseconds
STATUS_SECONDS = 10.0
#: replies of one command that may be lost before the command fails
MAX_LOST_REPLIES = 3


class RemoteRun:
    """The run of the driver at ``address`` (HOST:PORT).

    Every method raises ``ServiceError`` (one line) if the run refuses or no server answers.
    """

    def __init__(self, address: str, token_file: str | None = None, tls_ca: str | None = None) -> None:
        self.address = address
        self._channel = connect(address, token_file, tls_ca, message_bytes=MESSAGE_BYTES)
        self._stub: Any = rpc.ControlPlaneStub(self._channel)

    def __enter__(self) -> RemoteRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def status(self) -> Status:
        """Return the current state of the run."""
        with calling(self.address):
            return status_of(self._stub.Status(pb.StatusRequest(), timeout=STATUS_SECONDS))

    def obey(self, command: Command, timeout: float) -> CommandResult:
        """Send a command until it takes effect or ``timeout`` seconds have passed. The run obeys it once."""
        deadline, lost = time.monotonic() + timeout, 0
        while True:
            wait = max(0.01, min(WAIT_SECONDS, deadline - time.monotonic()))
            try:
                with calling(self.address):
                    result = result_of(
                        self._send(command, pb.Order(id=command.id, wait_seconds=wait), wait + STATUS_SECONDS)
                    )
            except ServiceError as error:  # the reply is lost; the command may have arrived
                lost += 1
                if (
                    error.code != grpc.StatusCode.UNAVAILABLE
                    or lost > MAX_LOST_REPLIES
                    or time.monotonic() + 1.0 > deadline
                ):
                    raise
                time.sleep(0.5)
                continue
            if result.meta_step is not None or time.monotonic() >= deadline:
                return result

    def _send(self, command: Command, order: pb.Order, timeout: float) -> pb.CommandReply:
        if command.name == "set_meta_batch_size":
            return self._stub.SetMetaBatchSize(
                pb.SetMetaBatchSizeRequest(order=order, meta_batch_size=command.value), timeout=timeout
            )
        if command.name == "set_workers":
            return self._stub.SetWorkers(
                pb.SetWorkersRequest(order=order, count=command.value, role=command.role), timeout=timeout
            )
        methods = {
            "pause": self._stub.Pause,
            "resume": self._stub.Resume,
            "checkpoint": self._stub.CheckpointNow,
            "stop": self._stub.Stop,
        }
        return methods[command.name](pb.CommandRequest(order=order), timeout=timeout)

    def watch(self, seconds: float | None = None) -> Iterator[Snapshot]:
        """Yield the snapshots from now on, until the run ends or ``seconds`` have passed."""
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or (left := end - time.monotonic()) > 0:
            updates = self._stub.Watch(pb.WatchRequest(), timeout=None if end is None else left)
            try:
                with calling(self.address):
                    for update in updates:
                        yield snapshot_of(update)
                return
            except ServiceError as error:
                if (
                    error.code != grpc.StatusCode.DEADLINE_EXCEEDED
                ):  # the server ends a call after an hour; then open a new one
                    raise
            finally:
                updates.cancel()
