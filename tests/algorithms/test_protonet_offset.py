"""Prototypical networks whose embeddings have a common offset: distances must not lose their digits to it."""

import pytest
import torch
from toys import Blobs, Ragged, keys, learner, relative_error

from metadist.algorithms import ProtoNet
from metadist.core.task import Examples, Task, TaskFamily


class Offset(torch.nn.Module):
    """A linear embedding with a common offset, and one of a float64 copy that has the same weights."""

    def __init__(self, offset):
        super().__init__()
        self.linear = torch.nn.Linear(4, 8)
        torch.nn.init.constant_(self.linear.bias, offset)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("family", [Blobs(), Ragged(Blobs())], ids=["equal", "ragged"])
def test_the_gradient_is_that_of_float64(offset, family):
    def gradient(dtype):
        subject = learner(ProtoNet(), lambda: Offset(offset), family, dtype=dtype)
        theta = subject.initial(0).theta(subject.slots)
        found = subject.contribute(theta, keys(0, 1, 2), 0)
        return found.slots["model"].double(), found.metrics["loss"]

    (single, loss), (exact, true_loss) = (gradient(dtype) for dtype in (torch.float32, torch.float64))
    assert relative_error(single, exact) < 1e-6 * (1 + offset)  # rounding of the embeddings themselves
    assert loss == pytest.approx(true_loss, rel=1e-5 * (1 + offset / 30))


def test_distances_are_those_of_the_differences():
    """−‖f(x) − c_k‖² by hand, with a class that has no support example."""

    class ThreeOfFour(TaskFamily):
        kind, metric_name, higher_is_better, input_shape, outputs = "classification", "accuracy", True, (4,), 4
        loss, metric = Blobs().loss, Blobs().metric

        def ways(self, split):
            return 4

        def sample_task(self, key, split):
            x = torch.arange(24, dtype=torch.float32).reshape(6, 4).cos()
            return Task(
                Examples(x, torch.tensor([0, 0, 1, 1, 3, 3])), Examples(x + 0.1, torch.tensor([0, 0, 1, 1, 3, 3]))
            )

    subject = learner(ProtoNet(), lambda: Offset(1000.0), ThreeOfFour())
    state = subject.initial(0)
    task = torch.utils._pytree.tree_map(lambda t: t[0], subject.sample(keys(0)))
    logits = subject.predict(state, subject.adapt(state, task.support), task.query.x, task.support)
    weight, bias = subject.parameters(state).values()
    support, query = task.support.x @ weight.T + bias, task.query.x @ weight.T + bias
    for k in (0, 1, 3):
        centre = support[task.support.y == k].mean(0)
        torch.testing.assert_close(logits[:, k], -(query - centre).square().sum(1), rtol=1e-9, atol=1e-9)
    assert logits[:, 2].eq(-torch.inf).all()
