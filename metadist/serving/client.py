"""A Python client of the adaptation service."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from google.protobuf.message import Message

from metadist.core.tree import Tree, arrays
from metadist.rpc.channel import calling, connect
from metadist.serving import adapt_pb2 as pb
from metadist.serving import adapt_pb2_grpc
from metadist.serving.tensors import from_reply, tree_to_message

#: the largest limit that a server can be started with; the server's own limit decides
MESSAGE_BYTES = 1 << 30


class Client:
    """Adapt and predict on a server of ``metadist serve``, as ``Result`` does in this process.

    ::

        with metadist.Client("127.0.0.1:8470") as client:
            handle = client.adapt(x, y)
            logits = client.predict(handle, queries)

    ``token_file`` holds the server's token, ``tls_ca`` its certificate or authority. Every method raises
    ``MetadistError`` with one line if the server refuses or does not answer.
    """

    def __init__(
        self, address: str, *, token_file: str | None = None, tls_ca: str | None = None, seconds: float = 60.0
    ) -> None:
        self.address = address
        self._channel = connect(address, token_file, tls_ca, message_bytes=MESSAGE_BYTES, seconds=seconds)
        self._stub = adapt_pb2_grpc.AdaptationStub(self._channel)

    def adapt(self, x: Any, y: Any, *, model: str = "", inner_steps: int | None = None) -> str:
        """Adapt to a support set x [N, …], y [N, …] and return a handle for ``predict``.

        x and y are arrays, or dicts or tuples of arrays, as in training.
        """
        request = pb.AdaptRequest(model=model, x=_message(x), y=_message(y), inner_steps=inner_steps)
        return self._call(self._stub.Adapt, request).handle

    def predict(self, handle: str, x: Any) -> Tree:
        """Return predictions for x [N, …]: logits or values [N, …], or a dict or tuple of them."""
        return from_reply(self._call(self._stub.Predict, pb.PredictRequest(handle=handle, x=_message(x))).prediction)

    def adapt_predict(self, x: Any, y: Any, query: Any, *, model: str = "", inner_steps: int | None = None) -> Tree:
        """Adapt and predict in one call; the server stores nothing."""
        request = pb.AdaptPredictRequest(
            model=model, x=_message(x), y=_message(y), query=_message(query), inner_steps=inner_steps
        )
        return from_reply(self._call(self._stub.AdaptPredict, request).prediction)

    def forget(self, handle: str) -> bool:
        """Remove adapted parameters from the server; return whether the handle was valid."""
        return self._call(self._stub.Forget, pb.ForgetRequest(handle=handle)).existed

    def models(self) -> list[dict[str, Any]]:
        """Return the served models with the shapes and limits of their inputs."""
        return [_plain(m) for m in self._call(self._stub.ListModels, pb.ListModelsRequest()).models]

    def statistics(self) -> dict[str, Any]:
        """Return the counts of adaptations, batches, handles and evictions, and the latencies."""
        return _plain(self._call(self._stub.ListModels, pb.ListModelsRequest()).statistics)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        with calling(self.address):
            return method(request)


def _message(values: Any) -> pb.Tensor:
    return tree_to_message(arrays(values))


def _plain(message: Any) -> dict[str, Any]:
    """Return a message as a dict. Protobuf's own JSON writes int64 as text."""
    known = {f.name: getattr(message, f.name) for f in message.DESCRIPTOR.fields if f.message_type is None}
    nested = {
        f.name: _plain(v) if isinstance(v, Message) else [_plain(one) for one in v]
        for f, v in message.ListFields()
        if f.message_type is not None
    }
    return {k: list(v) if not isinstance(v, (str, int, float, bool)) else v for k, v in known.items()} | nested
