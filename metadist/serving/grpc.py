"""Serve ``metadist.adapt.v1`` over gRPC."""

from __future__ import annotations

from typing import Any

from metadist.core.task import Examples
from metadist.core.tree import Tree, first
from metadist.serving import adapt_pb2 as pb
from metadist.serving import adapt_pb2_grpc
from metadist.serving.model import ServedModel
from metadist.serving.service import AdaptationService, TimeLeft
from metadist.serving.tensors import tree_from_message, tree_to_message


class GrpcAdaptationService(adapt_pb2_grpc.AdaptationServicer):
    """Translates messages into calls of an ``AdaptationService``."""

    def __init__(self, service: AdaptationService) -> None:
        self.service = service

    def Adapt(self, request: pb.AdaptRequest, context: Any) -> pb.AdaptReply:
        model = self.service.model(request.model)
        handle, size = self.service.adapt(model, _support(model, request), _steps(model, request), _left(context))
        return pb.AdaptReply(handle=handle, bytes=size)

    def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictReply:
        model, adapted = self.service.find(request.handle)
        x = _inputs(model, "x", request.x, model.limits.queries)
        return pb.PredictReply(
            prediction=tree_to_message(self.service.predict(model, adapted, x, _left(context)), request.arrow)
        )

    def AdaptPredict(self, request: pb.AdaptPredictRequest, context: Any) -> pb.PredictReply:
        model = self.service.model(request.model)
        x = _inputs(model, "query", request.query, model.limits.queries)
        support, steps = _support(model, request), _steps(model, request)
        return pb.PredictReply(
            prediction=tree_to_message(
                self.service.adapt_predict(model, support, x, steps, _left(context)), request.arrow
            )
        )

    def Forget(self, request: pb.ForgetRequest, context: Any) -> pb.ForgetReply:
        return pb.ForgetReply(existed=self.service.forget(request.handle))

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsReply:
        models = [pb.Model(**model.describe()) for model in self.service.models.values()]
        return pb.ListModelsReply(models=models, statistics=pb.Statistics(**self.service.statistics()))


def _inputs(model: ServedModel, name: str, message: pb.Tensor, max_rows: int) -> Tree:
    return model.inputs(name, _tree_x(model, name, message, max_rows))


def _tree_x(model: ServedModel, name: str, message: pb.Tensor, max_rows: int) -> Tree:
    def check(part: str, shape: list[int]) -> None:
        model.check_shape(name, shape, max_rows, part)

    return tree_from_message(name, message, model.signature.x, check)


def _support(model: ServedModel, request: Any) -> Examples:
    x = _tree_x(model, "x", request.x, model.limits.support)

    def check(part: str, shape: list[int]) -> None:
        model.signature.check_target_shape(shape, len(first(x)), part)

    return model.support(x, tree_from_message("y", request.y, model.signature.y, check))


def _steps(model: ServedModel, request: Any) -> int | None:
    return model.check_steps(request.inner_steps if request.HasField("inner_steps") else None)


def _left(context: Any) -> TimeLeft:
    return context.time_remaining
