"""A contribution is a sum over tasks: shards, padding and skipped tasks change how it is computed and nothing else."""

from dataclasses import dataclass, replace

import plain
import pytest
import torch
from toys import Blobs, Curves, Ragged, WithoutDropout, keys, learner, relative_error, somewhere

from metadist.algorithms import ANIL, CNP, MAML, MetaSGD, ProtoNet, Reptile
from metadist.core.computation import Evaluate, Gradient
from metadist.core.errors import ConfigError, NonFiniteError
from metadist.core.outer import OuterLoop
from metadist.core.parameters import Layout, Parameters
from metadist.core.round import MetaStepKey
from metadist.core.task import Examples, Task, stack
from metadist.models import MLP, ConditionalNeuralProcess, Conv4

IMAGES = Blobs(input_shape=(1, 8, 8))


def mlp(family, outputs=..., **options):
    return lambda: MLP(hidden=(8,), **options).build(family.input_shape, family.outputs if outputs is ... else outputs)


def subject(algorithm=MAML(inner_lr=0.1, inner_steps=2), family=IMAGES, dtype=torch.float32, **options):
    model = Conv4(filters=4, blocks=2, dropout=0.1)
    return learner(algorithm, lambda: model.build(family.input_shape, family.outputs), family, dtype=dtype, **options)


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [MAML(inner_steps=2), Reptile(inner_steps=2, inner_optimizer="adam"), MetaSGD()])
def test_shards_agree_closely_and_the_same_shards_exactly(algorithm):
    whole = subject(algorithm)
    theta = somewhere(whole)
    once, again = (whole.contribute(theta, keys(*range(6)), 3) for _ in range(2))
    assert all(v.equal(again.slots[n]) for n, v in once.slots.items())
    assert once.metrics == again.metrics
    for cut in ([[0, 1, 2, 3], [4, 5]], [[i] for i in range(6)]):
        parts = [subject(algorithm).contribute(theta, keys(*part), 3) for part in cut]
        total = sum(parts[1:], parts[0])
        assert (total.weight, total.tasks) == (6.0, 6)
        for name, vector in once.slots.items():
            assert relative_error(total.slots[name], vector) < 1e-4
        assert total.metrics["loss"] == pytest.approx(once.metrics["loss"], rel=1e-5)


def test_shards_agree_in_float64():
    whole = subject(dtype=torch.float64)
    theta = somewhere(whole)
    parts = sum(whole.contribute(theta, keys(i), 3).slots["model"] for i in range(5))
    assert relative_error(parts, whole.contribute(theta, keys(*range(5)), 3).slots["model"]) < 1e-12


def test_a_meta_batch_is_cut_without_gap_or_overlap():
    whole = subject(outer=OuterLoop(meta_batch_size=19, shard_size=8))
    shards = whole.shards(MetaStepKey("run", 4, 7), Gradient(), split="train", tasks=19)
    assert [(s.index, s.start, s.count, s.key_step) for s in shards] == [(0, 0, 8, 4), (1, 8, 8, 4), (2, 16, 3, 4)]
    assert {s.key_step for s in whole.shards(MetaStepKey("run", 4, 7), Evaluate(), split="test", tasks=19)} == {0}


@pytest.mark.parametrize("tasks", [1, 8, 9, 17, 19, 24])
def test_a_block_knows_its_shards(tasks):
    shards = subject(outer=OuterLoop(shard_size=8)).shards(
        MetaStepKey("run", 4, 7), Gradient(), split="train", tasks=tasks
    )
    assert [(s.leaves, s.each()) for s in shards] == [(1, (s,)) for s in shards]
    for first in range(len(shards)):
        part = shards[first:]
        block = replace(part[0], count=sum(s.count for s in part), leaf=8)
        assert block.leaves == len(part)
        assert block.each() == tuple(part)
    assert str(replace(shards[0], count=tasks, leaf=8)).startswith(
        f"meta-step 4, round 0, shards 0…{len(shards) - 1} (train task"
    )


def test_a_task_is_the_same_whatever_its_shard():
    for family in (Curves(), IMAGES, Ragged()):
        whole = learner(MAML(), mlp(family), family)
        alone, among = whole.sample(keys(3)), whole.sample(keys(1, 3, 2))
        rows = alone.support.x.shape[1]
        assert alone.support.x[0].equal(among.support.x[1][:rows])
        assert alone.query.y[0].equal(among.query.y[1][: alone.query.y.shape[1]])


def test_compute_is_pure():
    whole = subject()
    state = whole.initial(0)
    before = state.sha256()
    shard = whole.shards(MetaStepKey("run", 0, 7), Gradient(), split="train", tasks=8)[0]
    first = whole.compute(shard, state.slots)
    whole.compute(replace(shard, computation=Evaluate(3)), state.slots)
    second = whole.compute(shard, state.slots)
    assert first.slots["model"].equal(second.slots["model"])
    assert state.sha256() == before


# Tasks of unequal size ------------------------------------------------------------------------------------------------

RAGGED = {
    "maml": (MAML(inner_lr=0.1, inner_steps=2), Curves(), mlp),
    "anil": (ANIL(inner_lr=0.1, inner_steps=2), Curves(), mlp),
    "reptile": (Reptile(inner_lr=0.1, inner_steps=2), Blobs(), mlp),
    "protonet": (ProtoNet(), Blobs(shots=3), lambda family: mlp(family, outputs=None)),
    "cnp": (
        CNP(),
        Curves(),
        lambda family: lambda: ConditionalNeuralProcess(8, 8).build(family.input_shape, family.outputs),
    ),
}


@dataclass(frozen=True)
class Dirty(Ragged):
    """Its padded rows hold what a user's own padding may: NaN, Inf, labels that don't exist."""

    def sample(self, keys, split):
        task = super().sample(keys, split)

        def dirty(e):
            pad = ~e.mask.bool()
            x, y = e.x.clone(), e.y.clone()
            x[pad] = float("nan")
            y[pad] = float("inf") if y.is_floating_point() else 10**6
            return Examples(x, y, e.mask)

        return Task(dirty(task.support), dirty(task.query))


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("padding", [Ragged, Dirty])
def test_padding_changes_nothing(name, padding):
    """One shard of padded tasks against every task alone, unpadded."""
    algorithm, family, factory = RAGGED[name]
    padded, alone = (learner(algorithm, factory(family), f) for f in (padding(family), Ragged(family)))
    theta, shard = somewhere(padded), keys(0, 1, 2, 4)
    assert padded.sample(shard).support.mask is not None
    assert alone.sample(keys(2)).support.mask is None
    got, parts = padded.contribute(theta, shard, 3), [alone.contribute(theta, keys(i), 3) for i in (0, 1, 2, 4)]
    expected = sum(parts[1:], parts[0])
    for slot, vector in expected.slots.items():
        assert relative_error(got.slots[slot], vector) <= 1e-10
    assert got.metrics == pytest.approx(expected.metrics, rel=1e-12)
    records, rows = padded.evaluate(theta, shard, 3), [alone.evaluate(theta, keys(i), 3) for i in (0, 1, 2, 4)]
    torch.testing.assert_close(
        records.columns["loss"], torch.cat([r.columns["loss"] for r in rows]), rtol=1e-10, atol=0
    )


def test_tasks_of_fewer_ways():
    """Prototypes of absent classes don't exist: they can't be chosen, and nothing becomes NaN."""

    @dataclass(frozen=True)
    class FewerWays(Ragged):
        """Task 0 has two of the three classes, task 1 all."""

        def sample_task(self, key, split):
            task = self.family.sample_task(key, split)
            return Task(
                *(
                    Examples(e.x[kept], e.y[kept])
                    for e in (task.support, task.query)
                    for kept in [e.y < 2 + int(key.tasks)]
                )
            )

    family = FewerWays(Blobs())
    few = learner(ProtoNet(), mlp(family, outputs=None), family)
    theta, task = somewhere(few), few.sample(keys(0))
    leaves = {n: t.clone().requires_grad_() for n, t in theta["model"].items()}
    embed = plain.Plain(few.model.module, None)
    support, query = (Examples(embed(leaves, e.x[0]), e.y[0]) for e in (task.support, task.query))
    value = plain.loss(family, plain.prototypical(support.x, query.x, support, ways=2), query)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(leaves.values()))])
    assert relative_error(few.contribute(theta, keys(0), 3).slots["model"], expected) <= 1e-10
    both = few.contribute(theta, keys(0, 1), 3).slots["model"]
    assert relative_error(both, expected + few.contribute(theta, keys(1), 3).slots["model"]) <= 1e-10


def test_stacking_keeps_masks_and_needs_none_where_sizes_agree():
    def examples(rows, mask=None):
        return Examples(torch.ones(rows, 2), torch.arange(rows), mask)

    alike = stack([Task(examples(3), examples(2))] * 2)
    assert alike.support.mask is None is alike.query.mask
    mixed = stack([Task(examples(3, torch.tensor([True, False, True])), examples(2)), Task(examples(4), examples(2))])
    assert mixed.support.mask.tolist() == [[True, False, True, False], [True] * 4]
    assert mixed.support.y.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_batch_norm_over_padded_rows_is_refused():
    """Before anything starts, also when a task alone would have no padding."""
    ragged = learner(MAML(), WithoutDropout, Ragged(Blobs(input_shape=(1, 6, 6))))
    with pytest.raises(ConfigError, match="padded rows"):
        ragged.dry_run(0)
    with pytest.raises(ConfigError, match="padded rows"):
        ragged.contribute(ragged.initial(0).theta(ragged.slots), keys(0, 1), 0)


# Tasks that fail ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned(Curves):
    """The tasks in ``poisoned`` have a NaN among their targets."""

    poisoned: tuple[int, ...] = (12, 14)

    def sample(self, keys, split):
        task = super().sample(keys, split)
        bad = torch.isin(keys.tasks, torch.tensor(self.poisoned))
        y = torch.where(bad[..., None, None], float("nan"), task.query.y)
        return Task(task.support, Examples(task.query.x, y))


class Scaled(torch.nn.Module):
    """With a parameter that has no dimensions."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.mark.parametrize("algorithm", [MAML(inner_lr=0.1), MetaSGD(inner_lr=0.1)])
@pytest.mark.parametrize("factory", [mlp(Curves()), Scaled])
def test_a_nan_names_its_tasks(algorithm, factory):
    poisoned = learner(algorithm, factory, Poisoned())
    with pytest.raises(NonFiniteError, match=r"tasks \[12, 14\] gave NaN or Inf \(seed 7, meta-step 3\)") as caught:
        poisoned.contribute(somewhere(poisoned), keys(11, 12, 13, 14), 3)
    assert caught.value.tasks == (12, 14)


@pytest.mark.parametrize("factory", [mlp(Curves()), Scaled])
def test_skipping_is_running_without_them(factory):
    poisoned, healthy = learner(MAML(), factory, Poisoned(), non_finite="skip"), learner(MAML(), factory, Curves())
    theta = somewhere(poisoned)
    got, expected = poisoned.contribute(theta, keys(11, 12, 13, 14), 3), healthy.contribute(theta, keys(11, 13), 3)
    assert (got.weight, got.tasks) == (2.0, 2)
    assert relative_error(got.slots["model"], expected.slots["model"]) < 1e-14
    assert got.metrics == pytest.approx(expected.metrics)
    nothing = poisoned.contribute(theta, keys(12, 14), 3)
    assert (nothing.weight, nothing.tasks) == (0.0, 0)
    assert not nothing.slots["model"].any()
    assert relative_error((got + nothing).slots["model"], expected.slots["model"]) < 1e-14
    with pytest.raises(NonFiniteError, match="every task of meta-step 3"):
        poisoned.outer.update(poisoned.slots, poisoned.initial(0), nothing, 3)


@dataclass(frozen=True)
class Huge(Reptile):
    """Every task's delta is finite, and the sum of two is not."""

    def delta(self, theta, phi):
        return {"model": theta["model"].map(lambda t: torch.full_like(t, 3e38))}


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_sum_that_overflows_is_not_blamed_on_a_task(policy):
    whole = learner(Huge(), mlp(Curves()), Curves(), dtype=torch.float32, non_finite=policy)
    theta = somewhere(whole)
    assert whole.contribute(theta, keys(4), 3).is_finite()
    with pytest.raises(NonFiniteError, match=r"the sum over tasks \[4, 9\] overflows") as caught:
        whole.contribute(theta, keys(4, 9), 3)
    assert caught.value.tasks == ()


# Layouts --------------------------------------------------------------------------------------------------------------


def test_a_layout_goes_there_and_back():
    tensors = Parameters({"b": torch.randn(2, 3), "a": torch.randn(()), "empty": torch.zeros(0, 4)})
    layout = Layout.of(tensors)
    back = layout.unflatten(layout.flatten(tensors))
    assert list(back) == ["b", "a", "empty"]
    assert all(back[n].equal(t) for n, t in tensors.items())
    assert layout.fingerprint != Layout.of({n: tensors[n] for n in ("a", "b", "empty")}).fingerprint
    with pytest.raises(KeyError):
        layout.flatten(tensors.select(lambda n: n != "a"))
    with pytest.raises(ValueError, match="7 elements"):
        layout.unflatten(torch.zeros(8))
    with pytest.raises(ValueError, match="one dtype"):
        Layout.of({"x": torch.zeros(1), "y": torch.zeros(1, dtype=torch.int64)})
