"""The control plane of a running driver: ``metadist.control.v1`` over whatever is ``Steerable``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc

from metadist.control import control_pb2 as pb
from metadist.control import control_pb2_grpc as rpc
from metadist.control.commands import Answer, Command, Sight, Standing, Steerable
from metadist.rpc.endpoint import Add, Refused

#: an answer waits so long at most for its command to take effect; the same command may be sent again
WAIT_SECONDS = 20.0
#: watchers at once: each holds a thread of the server
WATCHERS = 8
#: calls at once, and the bytes of a message: commands are small, and few give them
CONCURRENT, MESSAGE_BYTES = 24, 1 << 18


def services(run: Steerable) -> dict[Add, Any]:
    """What ``endpoint.serve`` is to serve for ``run``."""
    return {rpc.add_ControlPlaneServicer_to_server: ControlPlane(run)}


class ControlPlane(rpc.ControlPlaneServicer):
    """Translates messages; what a command means is the run's affair."""

    def __init__(self, run: Steerable) -> None:
        self._run = run
        self._watchers = threading.BoundedSemaphore(WATCHERS)

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        return _status(self._run.standing())

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Update]:
        if not self._watchers.acquire(blocking=False):
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS} watch this run already")
        try:
            with self._run.watch() as feed:
                while context.is_active():
                    if context.time_remaining() <= 0:
                        raise Refused(
                            grpc.StatusCode.DEADLINE_EXCEEDED, "watched for as long as one call may; open it again"
                        )
                    try:
                        sights = feed.next(0.5)
                    except EOFError:
                        return
                    for sight in sights:
                        yield _update(sight, feed.dropped)
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

    def _obey(self, name: str, request: Any, context: Any, **what: Any) -> pb.CommandReply:
        order = request.order
        command = Command(name, **what, **({"id": order.id} if order.id else {}))
        asked = order.wait_seconds if 0 < order.wait_seconds < WAIT_SECONDS else WAIT_SECONDS
        answer = self._run.submit(command, max(0.0, min(asked, context.time_remaining() - 0.5)))
        return pb.CommandReply(
            pending=answer.meta_step is None, meta_step=answer.meta_step or 0, message=answer.message
        )


def answer_of(reply: pb.CommandReply) -> Answer:
    return Answer(None if reply.pending else reply.meta_step, reply.message)


def _update(sight: Sight, dropped: int) -> pb.Update:
    return pb.Update(
        kind=sight.kind,
        meta_step=sight.meta_step,
        values=sight.values,
        message=sight.message,
        time=sight.time,
        dropped=dropped,
    )


def sight_of(update: pb.Update) -> Sight:
    return Sight(update.kind, update.meta_step, dict(update.values), update.message, update.time)


def _status(s: Standing) -> pb.StatusReply:
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


def standing_of(reply: pb.StatusReply) -> Standing:
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
    return Standing(
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
