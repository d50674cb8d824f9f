"""The adaptation service without a transport: gRPC, HTTP and Ray Serve are three doors to it."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as Late
from typing import Any

import grpc
from torch import Tensor

from metadist.core.errors import ConfigError, nearest
from metadist.core.task import Examples
from metadist.rpc.grpc_guard import Refused
from metadist.serving.batching import Batcher
from metadist.serving.cache import Handles, SharedHandles
from metadist.serving.metrics import Measures
from metadist.serving.model import Adapted, Diverged, ServedModel, Wrong

log = logging.getLogger(__name__)
MIB = 1 << 20

Left = Callable[[], float]
"""The seconds that the caller still waits."""

Shelf = Callable[..., Any]
"""(method, *arguments) → the answer of a ``handles.Shelf`` elsewhere, which several servers share."""


class Adaptation:
    """Several models, one thread that computes for all of them, one budget for what is kept. Every method refuses by ``Refused``."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        budget: int = 256 * MIB,
        largest: int = 64,
        patience: float = 0.002,
        shelf: Shelf | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models) or not models:
            raise ConfigError(
                f"serve: models need different names, got {', '.join(m.name for m in models) or 'none'}; use NAME=RUN"
            )
        self.kept: Handles[tuple[ServedModel, Adapted]] = (
            Handles(budget) if shelf is None else SharedHandles(budget, shelf, self._pack, self._unpack)
        )
        self.adaptations = self.predictions = 0
        self.measures = Measures(self.statistics)
        self._adapting = Batcher(self._compute, largest=largest, patience=patience)

    def close(self) -> None:
        self._adapting.close()

    # What callers ask for ---------------------------------------------------------------------------------------------

    def model(self, name: str) -> ServedModel:
        if not name and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            message = (
                f"there is no model '{name[:80]}' here; there are {known}{nearest(name[:80], self.models)}"
                if name
                else (f"several models are served; name one of {known}")
            )
            raise Refused(grpc.StatusCode.NOT_FOUND if name else grpc.StatusCode.INVALID_ARGUMENT, message)
        return self.models[name]

    def adapt(self, model: ServedModel, support: Examples, inner_steps: int | None, left: Left) -> tuple[str, int]:
        """A handle, and the bytes that it takes."""
        adapted = self._adapted(model, support, inner_steps, left)
        handle = self.kept.put((model, adapted), adapted.bytes)
        if handle is None:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"one adaptation of '{model.name}' takes {adapted.bytes / MIB:.1f} MiB, the server's budget is "
                f"{self.kept.budget / MIB:.1f} MiB; use AdaptPredict, or serve with a larger --budget-mib",
            )
        return handle, adapted.bytes

    def found(self, handle: str) -> tuple[ServedModel, Adapted]:
        kept = self.kept.get(handle)
        if kept is None:
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                f"handle '{handle[:40]}' is not here: it was forgotten, evicted (the budget is {self.kept.budget / MIB:.1f} MiB, "
                f"{self.kept.evictions} evictions so far) or is another server's; adapt again, or use AdaptPredict",
            )
        return kept

    def predict(self, model: ServedModel, adapted: Adapted, x: Tensor, left: Left) -> Tensor:
        shape = (tuple(x.shape), None if adapted.support is None else tuple(adapted.support.shape), adapted.structure)
        prediction = _within(left, self._adapting.submit(("predict", model.name, *shape), (adapted, x)))
        self.predictions += 1
        return prediction

    def adapt_predict(
        self, model: ServedModel, support: Examples, x: Tensor, inner_steps: int | None, left: Left
    ) -> Tensor:
        return self.predict(model, self._adapted(model, support, inner_steps, left), x, left)

    def forget(self, handle: str) -> bool:
        return self.kept.forget(handle)

    def statistics(self) -> dict[str, float]:
        counts, times = self._adapting.counts, sorted(self._adapting.counts.milliseconds)
        cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [*times, 0.0] * 99
        return {
            "adaptations": self.adaptations,
            "predictions": self.predictions,
            "batches": counts.batches,
            "largest_batch": counts.largest,
            **self.kept.counts(),
            "p50_ms": round(cuts[49], 3),
            "p99_ms": round(cuts[98], 3),
        }

    def _pack(self, kept: tuple[ServedModel, Adapted]) -> Any:
        model, adapted = kept
        return model.name, model.pack(adapted)

    def _unpack(self, packed: Any) -> tuple[tuple[ServedModel, Adapted], int]:
        name, parts = packed
        adapted = self.models[name].unpack(parts)
        return (self.models[name], adapted), adapted.bytes

    # How it is computed -----------------------------------------------------------------------------------------------

    def _adapted(self, model: ServedModel, support: Examples, inner_steps: int | None, left: Left) -> Adapted:
        key = ("adapt", model.name, tuple(support.x.shape), tuple(support.y.shape), inner_steps)
        adapted = _within(left, self._adapting.submit(key, support))
        self.adaptations += 1
        return adapted

    def _compute(self, key: tuple[Any, ...], items: Sequence[Any]) -> Sequence[Any]:
        what, name = key[:2]
        if what == "adapt":
            return self.models[name].adapt(items, key[-1])
        return self.models[name].predict(*zip(*items))


def _within(left: Left, future: Future[Any]) -> Any:
    try:
        return future.result(max(left(), 0.0))
    except Late:
        future.cancel()
        raise Refused(
            grpc.StatusCode.DEADLINE_EXCEEDED, "the server is too busy to answer within the call's deadline"
        ) from None
    except CancelledError:
        raise Refused(grpc.StatusCode.UNAVAILABLE, "the server is stopping") from None
    except Diverged as error:
        raise Refused(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    except Wrong as error:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
