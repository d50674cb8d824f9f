"""Check every gRPC call before its servicer: token, deadline, parsing of requests, and the errors that callers see."""

from __future__ import annotations

import hmac
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from metadist.core.errors import ConfigError, MetadistError

log = logging.getLogger(__name__)

#: methods that need no token: the probe of a load balancer has none, and learns only that the server is SERVING
WITHOUT_TOKEN = ("/grpc.health.v1.Health/Check",)
MAX_ERROR_CHARACTERS = 400


Observe = Callable[[str, str, float], None]
"""(method, status, seconds) of a call that has ended."""


class Refused(Exception):
    """A servicer refuses a call: a status code, and one line for the caller."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class GrpcGuard(grpc.ServerInterceptor):
    """Wraps every method of a server.

    Requests arrive as bytes and are parsed here, so that a malformed request is the caller's error. A unary method is
    registered as a stream of one request: the handler of a unary call waits in a thread until its request has arrived,
    and calls that send nothing could occupy every thread.
    """

    def __init__(
        self, token: str | None, seconds: float, stream_seconds: float, observe: Observe | None = None
    ) -> None:
        self.token = token.encode() if token is not None else None
        self.seconds, self.stream_seconds = seconds, stream_seconds
        self.timer = _CallTimer()
        self.observe: Observe = observe or (lambda method, code, seconds: None)

    def close(self) -> None:
        """Stop the timer's thread."""
        self.timer.close()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Return the guarded handler of one call; None (UNIMPLEMENTED) for an unknown method."""
        handler = continuation(details)
        if handler is None:
            if self._allowed(details):
                return None
            handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
        allowed = details.method in WITHOUT_TOKEN or self._allowed(details)
        servicer_method = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        streams = handler.request_streaming or handler.response_streaming
        limit = self.stream_seconds if streams else self.seconds

        def begin(requests: Iterator[bytes], context: Any) -> tuple[Any, _BoundedContext]:
            if not allowed:
                raise Refused(
                    grpc.StatusCode.UNAUTHENTICATED, "this server requires a token; the call has none or a wrong one"
                )
            bounded = _BoundedContext(context, limit)
            parsed = self._parsed(requests, handler.request_deserializer, context, None if streams else limit)
            return (parsed if handler.request_streaming else self._only(parsed)), bounded

        def unary(requests: Iterator[bytes], context: Any) -> Any:
            with self._answered(context, details.method):
                return servicer_method(*begin(requests, context))

        def stream(requests: Iterator[bytes], context: Any) -> Iterator[Any]:
            with self._answered(context, details.method):
                request, bounded = begin(requests, context)
                for item in servicer_method(request, bounded):
                    if bounded.time_remaining() <= 0:
                        raise Refused(
                            grpc.StatusCode.DEADLINE_EXCEEDED, f"a stream lasts at most {limit:g} s; open a new one"
                        )
                    with self.timer.limit(context, self.seconds):  # ends a call whose client does not read
                        yield item

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)

    def _allowed(self, details: Any) -> bool:
        if self.token is None:
            return True
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        sent = given[0] if len(given) == 1 else ""
        return hmac.compare_digest(sent.encode() if isinstance(sent, str) else bytes(sent), b"Bearer " + self.token)

    def _parsed(
        self, requests: Iterator[bytes], parse: Callable[[bytes], Any] | None, context: Any, limit: float | None
    ) -> Iterator[Any]:
        while True:
            # A streaming method has no ``limit``: its client may pause between messages for the stream's whole time.
            with self.timer.limit(context, limit or self.stream_seconds):
                try:
                    data = next(requests)
                except StopIteration:
                    return
            try:
                request = data if parse is None else parse(data)
            except Exception:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid message of this method's type"
                ) from None
            yield request

    @staticmethod
    def _only(requests: Iterator[Any]) -> Any:
        for request in requests:
            return request
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")

    @contextmanager
    def _answered(self, context: Any, method: str) -> Iterator[None]:
        """Convert any exception into a status and one line that reveals nothing about this machine."""
        began, name = time.perf_counter(), method.rpartition("/")[2]
        try:
            yield
            self.observe(name, "OK", time.perf_counter() - began)
            return
        except (GeneratorExit, grpc.RpcError):
            raise
        except Refused as error:
            code, message = error.code, str(error)
        except ConfigError as error:
            code, message = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except MetadistError as error:
            code, message = grpc.StatusCode.FAILED_PRECONDITION, str(error)
        except NotImplementedError:
            code, message = grpc.StatusCode.UNIMPLEMENTED, "this server does not offer the method"
        except Exception:
            if not context.is_active():  # the caller has left; sending the answer to it failed
                return
            number = uuid.uuid4().hex[:12]
            log.exception("%s failed (error %s)", method, number)
            code, message = grpc.StatusCode.INTERNAL, f"internal error {number}; the server's log has the details"
        self.observe(name, code.name, time.perf_counter() - began)
        context.abort(code, " ".join(message.split())[:MAX_ERROR_CHARACTERS])


class _BoundedContext:
    """A servicer's context whose remaining time is bounded even if the client set no deadline."""

    def __init__(self, context: Any, limit: float) -> None:
        self._context, self._end = context, time.monotonic() + limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def time_remaining(self) -> float:
        """Return the seconds until the server's limit or the client's deadline, the earlier of both."""
        ours, theirs = self._end - time.monotonic(), self._context.time_remaining()
        return ours if theirs is None else min(ours, theirs)

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Refused(code, details)


class _CallTimer:
    """Cancels calls that wait too long for their client. One thread watches all calls."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, Any]] = {}
        self._numbers, self._lock, self._closed = itertools.count(), threading.Lock(), threading.Event()
        threading.Thread(target=self._run, name="rpc-timer", daemon=True).start()

    @contextmanager
    def limit(self, context: Any, seconds: float) -> Iterator[None]:
        """Cancel the call of ``context`` if the block takes longer than ``seconds``."""
        number = next(self._numbers)
        with self._lock:
            self._waiting[number] = (time.monotonic() + seconds, context)
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(0.5):
            now = time.monotonic()
            with self._lock:
                late = [number for number, (end, _) in self._waiting.items() if end < now]
                contexts = [self._waiting.pop(number)[1] for number in late]
            for context in contexts:
                context.cancel()
