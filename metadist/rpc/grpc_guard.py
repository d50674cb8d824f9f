"""What stands before every servicer: the token, the deadline, the parsing of requests, and the errors that callers may see."""

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

#: answered without a token: a load balancer's probe has none, and learns nothing but SERVING
OPEN = ("/grpc.health.v1.Health/Check",)
LONGEST_MESSAGE = 400


Observe = Callable[[str, str, float], None]
"""(method, status, seconds) of a call that has ended."""


class Refused(Exception):
    """A servicer's no: a status code and one line for the caller."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Guard(grpc.ServerInterceptor):
    """Wraps every method. Requests arrive as bytes and are parsed here, so that a malformed one is the caller's error.

    Even a single request is read as a stream of one: a call without the token, or whose request never arrives, then takes no
    thread for longer than it must.
    """

    def __init__(
        self, token: str | None, seconds: float, stream_seconds: float, observe: Observe | None = None
    ) -> None:
        self.token = token.encode() if token is not None else None
        self.seconds, self.stream_seconds = seconds, stream_seconds
        self.clock = _Clock()
        self.observe: Observe = observe or (lambda method, code, seconds: None)

    def close(self) -> None:
        self.clock.close()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            if self._allowed(details):
                return None  # UNIMPLEMENTED
            handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
        allowed = details.method in OPEN or self._allowed(details)
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        streams = handler.request_streaming or handler.response_streaming
        limit = self.stream_seconds if streams else self.seconds

        def begin(requests: Iterator[bytes], context: Any) -> tuple[Any, _Context]:
            if not allowed:
                raise Refused(
                    grpc.StatusCode.UNAUTHENTICATED, "this server wants a token, and the call has none or a wrong one"
                )
            own = _Context(context, limit)
            parsed = self._parsed(requests, handler.request_deserializer, context, None if streams else limit)
            return (parsed if handler.request_streaming else self._only(parsed)), own

        def unary(requests: Iterator[bytes], context: Any) -> Any:
            with self._answered(context, details.method):
                return inner(*begin(requests, context))

        def stream(requests: Iterator[bytes], context: Any) -> Iterator[Any]:
            with self._answered(context, details.method):
                request, own = begin(requests, context)
                for item in inner(request, own):
                    if own.time_remaining() <= 0:
                        raise Refused(
                            grpc.StatusCode.DEADLINE_EXCEEDED, f"a stream lasts {limit:g} s at most; open it again"
                        )
                    with self.clock.limit(context, self.seconds):  # a reader that doesn't read
                        yield item

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(stream if handler.response_streaming else unary, None, handler.response_serializer)

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
            # Between the messages of a stream a client may think; the first one is due.
            with self.clock.limit(context, limit or self.stream_seconds):
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
        """Whatever the servicer raises, as a status and one line that tells nothing about this machine."""
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
            if not context.is_active():  # the caller is gone, and what failed is the way to it
                return
            number = uuid.uuid4().hex[:12]
            log.exception("%s failed (error %s)", method, number)
            code, message = (
                grpc.StatusCode.INTERNAL,
                f"internal error {number}; the server's log has it under this number",
            )
        self.observe(name, code.name, time.perf_counter() - began)
        context.abort(code, " ".join(message.split())[:LONGEST_MESSAGE])


class _Context:
    """A servicer's context whose time is bounded even where the client set no deadline."""

    def __init__(self, context: Any, limit: float) -> None:
        self._context, self._end = context, time.monotonic() + limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def time_remaining(self) -> float:
        ours, theirs = self._end - time.monotonic(), self._context.time_remaining()
        return ours if theirs is None else min(ours, theirs)

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Refused(code, details)


class _Clock:
    """Cancels calls that wait for their client longer than they may: one thread for all of them."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, Any]] = {}
        self._numbers, self._lock, self._closed = itertools.count(), threading.Lock(), threading.Event()
        threading.Thread(target=self._run, name="rpc-clock", daemon=True).start()

    @contextmanager
    def limit(self, context: Any, seconds: float) -> Iterator[None]:
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
