"""Serve ``metadist.control.v1`` for a ``Steerable`` run over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc

from metadist.control import control_pb2 as pb
from metadist.control import control_pb2_grpc as rpc
from metadist.control.commands import Command, CommandResult, Snapshot, Status, Steerable
from metadist.rpc.endpoint import AddServicer, Refused

#: the longest wait of a reply for its command to take effect; the client may send the same command again
WAIT_SECONDS = 20.0
#: simultaneous watchers; each occupies a thread of the server
MAX_WATCHERS = 8
#: simultaneous calls, and bytes of a message: commands are small and rare
CONCURRENT, MESSAGE_BYTES = 24, 1 << 18


def services(run: Steerable) -> dict[AddServicer, Any]:
    """Return the services of ``run`` for ``endpoint.serve``."""
    return {rpc.add_ControlPlaneServicer_to_server: ControlService(run)}


class ControlService(rpc.ControlPlaneServicer):
    """Translates protobuf messages; the run interprets the commands."""

    def __init__(self, run: Steerable) -> None:
        self._run = run
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        return _status(self._run.status())

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Update]:
        if not self._watchers.acquire(blocking=False):
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} clients watch this run already")
        try:
            with self._run.watch() as subscription:
                while context.is_active():
                    if context.time_remaining() <= 0:
                        raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the time of one call is over; open a new one")
                    try:
                        snapshots = subscription.next(0.5)
                    except EOFError:
                        return
                    for snapshot in snapshots:
                        yield _update(snapshot, subscription.dropped)
        finally:
            self._watchers.release()

    def Pause(self, request: pb.CommandRequest, context: Any) -> pb.CommandReply:
        return self._obey("pause", request, context)

    def Resume(self, request: pb.CommandRequest, context: Any) -> pb.CommandReply:
        return self._obey("resume", request, context)

    def CheckpointNow(self, request: pb.CommandRequest, context: Any) -> pb.CommandReply:
        return self._obey("checkpoint", request, context)

    def Stop(self, request: pb.CommandRequest, context: Any) -> pb.CommandReply:
        return self._obey("stop", request, context)

    def SetMetaBatchSize(self, request: pb.SetMetaBatchSizeRequest, context: Any) -> pb.CommandReply:
        return self._obey("set_meta_batch_size", request, context, value=request.meta_batch_size)

    def SetWorkers(self, request: pb.SetWorkersRequest, context: Any) -> pb.CommandReply:
        return self._obey("set_workers", request, context, value=request.count, role=request.role or "learner")

    def _obey(self, name: str, request: Any, context: Any, **arguments: Any) -> pb.CommandReply:
        order = request.order
        command = Command(name, **arguments, **({"id": order.id} if order.id else {}))
        asked = order.wait_seconds if 0 < order.wait_seconds < WAIT_SECONDS else WAIT_SECONDS
        result = self._run.submit(command, max(0.0, min(asked, context.time_remaining() - 0.5)))
        return pb.CommandReply(
            pending=result.meta_step is None, meta_step=result.meta_step or 0, message=result.message
        )


def result_of(reply: pb.CommandReply) -> CommandResult:
    """Return a command's result from its message."""
    return CommandResult(None if reply.pending else reply.meta_step, reply.message)


def _update(snapshot: Snapshot, dropped: int) -> pb.Update:
    return pb.Update(
        kind=snapshot.kind,
        meta_step=snapshot.meta_step,
        values=snapshot.values,
        message=snapshot.message,
        time=snapshot.time,
        dropped=dropped,
    )


def snapshot_of(update: pb.Update) -> Snapshot:
    """Return a snapshot from its message."""
    return Snapshot(update.kind, update.meta_step, dict(update.values), update.message, update.time)


def _status(s: Status) -> pb.StatusReply:
    return pb.StatusReply(
        run_id=s.run_id,
        run_dir=s.run_dir,
        phase=s.phase,
        meta_step=s.meta_step,
        meta_steps=s.meta_steps,
        meta_batch_size=s.meta_batch_size,
        checkpoint=s.checkpoint,
        tasks_per_second=s.tasks_per_second,
        metrics=s.values,
        validation=s.validation,
        waiting=s.waiting,
        workers={
            role: pb.Workers(asked=s.asked.get(role, 0), there=s.there.get(role, 0)) for role in {*s.asked, *s.there}
        },
        commands=[
            pb.Obeyed(
                meta_step=c["meta_step"],
                command=c["command"],
                value=c.get("value", 0),
                role=c.get("role", ""),
                time=c["time"],
            )
            for c in s.commands
        ],
        pid=s.pid,
        host=s.host,
        started=s.started,
    )


def status_of(reply: pb.StatusReply) -> Status:
    """Return a run's status from its message."""
    commands = [
        {
            "meta_step": c.meta_step,
            "command": c.command,
            **({"value": c.value} if c.value else {}),
            **({"role": c.role} if c.role else {}),
            "time": c.time,
        }
        for c in reply.commands
    ]
    return Status(
        reply.run_id,
        reply.run_dir,
        reply.phase,
        reply.meta_step,
        reply.meta_steps,
        reply.meta_batch_size,
        reply.checkpoint if reply.HasField("checkpoint") else None,
        {r: w.asked for r, w in reply.workers.items()},
        {r: w.there for r, w in reply.workers.items()},
        reply.tasks_per_second,
        dict(reply.metrics),
        dict(reply.validation),
        commands,
        list(reply.waiting),
        reply.pid,
        reply.host,
        reply.started,
    )
