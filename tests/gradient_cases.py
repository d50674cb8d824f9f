"""Algorithms, models and plain autograd loops that the tests of meta-gradients share."""

import math

import plain
import torch
from toys import Blobs, Curves, Everything, learner

from metadist.algorithms import ANIL, CNP, MAML, MetaSGD, ProtoNet
from metadist.models import MLP, ConditionalNeuralProcess, Conv4

IMAGES = Blobs(input_shape=(1, 16, 16))
MODELS = {
    "mlp": (Curves(), MLP(hidden=(8, 8), activation="tanh")),
    "conv4-max-batch": (IMAGES, Conv4(filters=4, pooling="max", norm="batch")),
    "conv4-stride-batch": (IMAGES, Conv4(filters=4, pooling="stride", norm="batch", features="mean")),
    "conv4-max-group": (IMAGES, Conv4(filters=4, pooling="max", norm="group", dropout=0.2)),
    "own": (Blobs(input_shape=(1, 6, 6)), Everything),
}
ALGORITHMS = {
    "maml-1": MAML(inner_lr=0.1),
    "maml-5": MAML(inner_lr=0.1, inner_steps=5),
    "fomaml-1": MAML(inner_lr=0.1, first_order=True),
    "fomaml-3": MAML(inner_lr=0.1, inner_steps=3, first_order=True),
    "anil": ANIL(inner_lr=0.1, inner_steps=2),
    "anil-first-order": ANIL(inner_lr=0.1, inner_steps=2, first_order=True),
    "meta_sgd": MetaSGD(inner_lr=0.1, inner_steps=2),
    "meta_sgd-first-order": MetaSGD(inner_lr=0.1, inner_steps=2, first_order=True),
    "protonet": ProtoNet(),
    "momentum": MAML(inner_lr=0.1, inner_steps=3, inner_momentum=0.9),
    "adam": MAML(inner_lr=0.01, inner_steps=3, inner_optimizer="adam", inner_eps=1e-6),
    "minibatches": MAML(inner_lr=0.1, inner_steps=4, inner_batch_size=4),
}
#: every model with what the paper's claims rest on; the rest where it is cheap
CASES = [
    (a, m)
    for a in ALGORITHMS
    for m in MODELS
    if not (a == "protonet" and m == "mlp")
    and (a in ("maml-1", "maml-5", "fomaml-1", "anil", "meta_sgd", "protonet") or m in ("mlp", "own"))
]


def make(algorithm, model, **options):
    family, config = MODELS[model]

    def factory():
        return config() if config is Everything else config.build(family.input_shape, algorithm.outputs(family))

    return learner(algorithm, factory, family, **options)


def plain_objective(learner, theta, key, task):
    """The query loss of one task, by an ordinary loop; ``theta`` holds leaves that require grad."""
    algorithm, family = learner.algorithm, learner.tasks
    model = plain.Plain(learner.model.module, key)
    fixed = {n: t for slot in theta if slot == "frozen" or slot.startswith("buffers.") for n, t in theta[slot].items()}
    if isinstance(algorithm, ProtoNet):
        whole = {**fixed, **theta["model"]}
        support, query = model(whole, task.support.x, step=0).flatten(1), model(whole, task.query.x).flatten(1)
        return plain.loss(family, plain.prototypical(support, query, task.support, family.outputs), task.query)

    order = []
    if algorithm.inner_batch_size:  # shuffled epoch after shuffled epoch, cut into consecutive pieces
        rows, size = len(task.support.x), algorithm.inner_batch_size
        for epoch in range(math.ceil(algorithm.inner_steps * size / rows)):
            words = key.stream("minibatch", epoch).bits(rows).tolist()
            order += sorted(range(rows), key=words.__getitem__)

    def objective(phi, step):
        chosen = order[step * algorithm.inner_batch_size :][: algorithm.inner_batch_size] if order else slice(None)
        examples = type(task.support)(task.support.x[chosen], task.support.y[chosen])
        body = (
            {**fixed, **{n: t.detach() for n, t in theta["model"].items()}}
            if first_order
            else {**fixed, **theta["model"]}
        )
        return plain.loss(family, model({**body, **phi}, examples.x, step=step), examples)

    first_order = algorithm.first_order
    adapted = [n for n in theta["model"] if not isinstance(algorithm, ANIL) or n in learner.model.head()]
    phi = plain.descend(
        objective,
        {n: theta["model"][n] for n in adapted},
        theta["inner_lr"] if "inner_lr" in theta else dict.fromkeys(adapted, algorithm.inner_lr),
        algorithm.inner_steps,
        first_order=first_order,
        momentum=algorithm.inner_momentum,
        adam=(*algorithm.inner_betas, algorithm.inner_eps) if algorithm.inner_optimizer == "adam" else None,
    )
    return plain.loss(family, model({**fixed, **theta["model"], **phi}, task.query.x), task.query)


def plain_contribution(learner, theta, shard, objective=plain_objective):
    """Σ over the shard's tasks of the gradient of ``objective``: slot → vector; and Σ of the losses."""
    leaves = {
        s: {n: t.clone().requires_grad_(learner.slots[s].rule == "gradient") for n, t in theta[s].items()}
        for s in theta
    }
    learned = {s: list(leaves[s].values()) for s in leaves if learner.slots[s].rule == "gradient"}
    sums, total = {}, 0.0
    for key in shard.each():
        task = learner.tasks.sample_task(key, key.split).to(torch.device("cpu"), torch.float64)
        value = objective(learner, leaves, key, task)
        gradients = iter(torch.autograd.grad(value, [t for ts in learned.values() for t in ts]))
        for slot, tensors in learned.items():
            vector = torch.cat([next(gradients).flatten() for _ in tensors])
            sums[slot] = sums.get(slot, 0.0) + vector
        total += float(value.detach())
    return sums, total


def plain_cnp(learner, theta, key, task):
    model = plain.Plain(learner.model.module, key)
    representation = model(theta["model"], task.support.x, task.support.y, None, method="encode")
    mean, deviation = model(theta["model"], representation, task.query.x, method="decode")
    return -torch.distributions.Normal(mean, deviation).log_prob(task.query.y).sum(1).mean()


def cnp_learner():
    family, config = Curves(), ConditionalNeuralProcess(width=8, representation=6)
    return learner(CNP(), lambda: config.build(family.input_shape, family.outputs), family)
