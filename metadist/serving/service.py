"""The adaptation service without a transport. gRPC, HTTP and Ray Serve call it."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import grpc

from metadist.core.errors import ConfigError, nearest
from metadist.core.signature import DivergedAdaptation, InvalidInput
from metadist.core.task import Examples
from metadist.core.tree import Tree, shapes
from metadist.rpc.grpc_guard import Refused
from metadist.serving.batching import Batcher
from metadist.serving.cache import HandleCache, ReplicaCache
from metadist.serving.metrics import ServiceMetrics
from metadist.serving.model import ServedAdaptation, ServedModel

log = logging.getLogger(__name__)
MIB = 1 << 20
#: about the size of a handle, its entry and its objects
HANDLE_BYTES = 1024

TimeLeft = Callable[[], float]
"""Returns the seconds until the caller's deadline."""

CallSharedCache = Callable[..., Any]
"""(method, *arguments) → the result of that method of a ``cache.SharedCache`` in another process."""


class AdaptationService:
    """Several models, one thread that computes for all of them, and one cache of adapted parameters.

    ``budget``: bytes of the cache. ``largest``: requests in a batch. ``max_wait``: seconds that a request may wait for
    others. ``shared_cache``: the cache of all replicas, if there are several. Every method raises ``Refused`` for the
    errors of its caller.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        *,
        budget: int = 256 * MIB,
        largest: int = 64,
        max_wait: float = 0.002,
        shared_cache: CallSharedCache | None = None,
    ) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models) or not models:
            raise ConfigError(
                f"serve: models need different names, got {', '.join(m.name for m in models) or 'none'}; use NAME=RUN"
            )
        self.cache: HandleCache[tuple[ServedModel, ServedAdaptation]] = (
            HandleCache(budget)
            if shared_cache is None
            else ReplicaCache(budget, shared_cache, self._pack, self._unpack)
        )
        self.adaptations = self.predictions = 0
        self.metrics = ServiceMetrics(self.statistics)
        self._batcher = Batcher(self._compute, largest=largest, max_wait=max_wait)

    def close(self) -> None:
        """Stop the computing thread; waiting requests are refused."""
        self._batcher.close()

    # Calls ------------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> ServedModel:
        """Return a model by name; an empty name selects the only model."""
        if not name and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            message = (
                f"unknown model '{name[:80]}'; expected one of {known}{nearest(name[:80], self.models)}"
                if name
                else f"the server has several models; name one of {known}"
            )
            raise Refused(grpc.StatusCode.NOT_FOUND if name else grpc.StatusCode.INVALID_ARGUMENT, message)
        return self.models[name]

    def adapt(self, model: ServedModel, support: Examples, inner_steps: int | None, left: TimeLeft) -> tuple[str, int]:
        """Adapt to a support set; return a handle and the bytes that it occupies in the cache."""
        adapted = self._adapted(model, support, inner_steps, left)
        occupied = _occupied(adapted)
        handle = self.cache.put((model, adapted), occupied)
        if handle is None:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"one adaptation of '{model.name}' needs {occupied / MIB:.1f} MiB, but the server's budget is "
                f"{self.cache.budget / MIB:.1f} MiB; use AdaptPredict, or serve with a larger --budget-mib",
            )
        return handle, occupied

    def find(self, handle: str) -> tuple[ServedModel, ServedAdaptation]:
        """Return the model and the adapted parameters of a handle."""
        found = self.cache.get(handle)
        if found is None:
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                f"handle '{handle[:40]}' is unknown: it was forgotten, was evicted (the budget is "
                f"{self.cache.budget / MIB:.1f} MiB, {self.cache.evictions} evictions so far) or belongs to another "
                "server; adapt again, or use AdaptPredict",
            )
        return found

    def predict(self, model: ServedModel, adapted: ServedAdaptation, x: Tree, left: TimeLeft) -> Tree:
        """Return predictions for x [N, …]: logits or values [N, …]."""
        shape = (shapes(x), None if adapted.support is None else shapes(adapted.support), adapted.structure)
        prediction = _within(left, self._batcher.submit(("predict", model.name, *shape), (adapted, x)))
        self.predictions += 1
        return prediction

    def adapt_predict(
        self, model: ServedModel, support: Examples, x: Tree, inner_steps: int | None, left: TimeLeft
    ) -> Tree:
        """Adapt to a support set and return predictions for x [N, …]; the cache stores nothing."""
        return self.predict(model, self._adapted(model, support, inner_steps, left), x, left)

    def forget(self, handle: str) -> bool:
        """Remove adapted parameters; return whether the handle was valid."""
        return self.cache.forget(handle)

    def statistics(self) -> dict[str, float]:
        """Return the fields of the message ``Statistics``."""
        counts, times = self._batcher.counts, sorted(self._batcher.counts.milliseconds)
        cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [*times, 0.0] * 99
        return {
            "adaptations": self.adaptations,
            "predictions": self.predictions,
            "batches": counts.batches,
            "largest_batch": counts.largest,
            **self.cache.counts(),
            "p50_ms": round(cuts[49], 3),
            "p99_ms": round(cuts[98], 3),
        }

    def _pack(self, item: tuple[ServedModel, ServedAdaptation]) -> Any:
        model, adapted = item
        return model.name, model.pack(adapted)

    def _unpack(self, packed: Any) -> tuple[tuple[ServedModel, ServedAdaptation], int]:
        name, parts = packed
        adapted = self.models[name].unpack(parts)
        return (self.models[name], adapted), _occupied(adapted)

    # Computation ------------------------------------------------------------------------------------------------------

    def _adapted(
        self, model: ServedModel, support: Examples, inner_steps: int | None, left: TimeLeft
    ) -> ServedAdaptation:
        key = ("adapt", model.name, shapes(support.x), shapes(support.y), model.signature.ways(support.y), inner_steps)
        adapted = _within(left, self._batcher.submit(key, support))
        self.adaptations += 1
        return adapted

    def _compute(self, key: tuple[Any, ...], items: Sequence[Any]) -> Sequence[Any]:
        call, name = key[:2]
        if call == "adapt":
            return self.models[name].adapt(items, key[-1])
        return self.models[name].predict(*zip(*items))


def _occupied(adapted: ServedAdaptation) -> int:
    """Return the bytes of a handle in the cache: an algorithm that returns θ itself still costs an entry."""
    return max(adapted.bytes, HANDLE_BYTES)


def _within(left: TimeLeft, future: Future[Any]) -> Any:
    """Return the result of ``future``; translate its failures and the caller's deadline into ``Refused``."""
    try:
        return future.result(max(left(), 0.0))
    except FutureTimeout:
        future.cancel()
        raise Refused(
            grpc.StatusCode.DEADLINE_EXCEEDED, "the server is too busy to answer within the call's deadline"
        ) from None
    except CancelledError:
        raise Refused(grpc.StatusCode.UNAVAILABLE, "the server is stopping") from None
    except DivergedAdaptation as error:
        raise Refused(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    except InvalidInput as error:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
