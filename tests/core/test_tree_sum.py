"""The canonical sum: a balanced tree over shard indices, for every order of arrival."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.core.state import Contribution, TreeSum


def by_definition(leaves, add):
    """Add neighbours, then their sums; an odd last node moves up unchanged."""
    if len(leaves) == 1:
        return leaves[0]
    pairs = [add(*leaves[i : i + 2]) if i + 1 < len(leaves) else leaves[i] for i in range(0, len(leaves), 2)]
    return by_definition(pairs, add)


def summed(leaves, order, add):
    tree = TreeSum(len(leaves), add)
    for i in order:
        tree.add(i, leaves[i])
    return tree.result()


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1, "0"), (2, "(0+1)"), (3, "((0+1)+2)"), (5, "(((0+1)+(2+3))+4)"), (7, "(((0+1)+(2+3))+((4+5)+6))")],
)
def test_shape_is_the_definition(count, shape):
    leaves = [str(i) for i in range(count)]
    assert summed(leaves, range(count), lambda a, b: f"({a}+{b})") == shape


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))))
def test_any_order_gives_the_definition(order):
    leaves = [str(i) for i in range(len(order))]
    add = lambda a, b: f"({a}+{b})"  # noqa: E731
    assert summed(leaves, order, add) == by_definition(leaves, add)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20).flatmap(lambda n: st.permutations(range(n))), st.integers(0, 2**31))
def test_contributions_sum_to_the_same_bits(order, seed):
    generator = torch.Generator().manual_seed(seed)

    def leaf(i):
        vector = torch.randn(33, generator=generator) * 10.0 ** (i % 7)
        return Contribution({"model": vector}, 1.0 + i, i, {"loss": float(vector[0])})

    def add(a, b):
        return Contribution(
            {"model": a.slots["model"] + b.slots["model"]},
            a.weight + b.weight,
            a.tasks + b.tasks,
            {"loss": a.metrics["loss"] + b.metrics["loss"]},
        )

    leaves = [leaf(i) for i in range(len(order))]
    got, expected = summed(leaves, order, lambda a, b: a + b), by_definition(leaves, add)
    assert got.slots["model"].equal(expected.slots["model"])
    assert (got.weight, got.tasks, got.metrics) == (expected.weight, expected.tasks, expected.metrics)


@given(st.integers(1, 64), st.data())
def test_a_complete_subtree_can_be_summed_elsewhere(count, data):
    """2^k leaves from a multiple of 2^k on are one node of the tree, which a worker can sum before it sends it."""
    leaves, add = [str(i) for i in range(count)], lambda a, b: f"({a}+{b})"
    size = 2 ** data.draw(st.integers(0, count.bit_length() - 1))
    start = size * data.draw(st.integers(0, count // size - 1))
    part = summed(leaves[start : start + size], range(size), add)
    assert part in summed(leaves, range(count), add)


def nodes(count, size):
    return [range(at, min(at + size, count)) for at in range(0, count, size)]


@pytest.mark.parametrize("count", range(1, 65))
def test_blocks_summed_on_their_own_give_the_bits_of_the_leaves(count):
    """For every number of leaves and size of block: sum each block, then the blocks in a random order."""
    generator = torch.Generator().manual_seed(count)
    vectors = torch.randn(count, 9, generator=generator) * 10.0 ** torch.randint(-6, 7, (count, 1), generator=generator)
    leaves = [Contribution({"a": v}, 0.1 * float(v[0]), 1, {"loss": float(v[1]) / 3}) for v in vectors]
    letters = [f"{i}" for i in range(count)]
    expected, shape = (
        summed(leaves, range(count), lambda a, b: a + b),
        summed(letters, range(count), lambda a, b: f"({a}+{b})"),
    )
    for size in (1 << k for k in range(count.bit_length() + 1)):
        tree, drawn = TreeSum(count), TreeSum(count, lambda a, b: f"({a}+{b})")
        order = torch.randperm(len(nodes(count, size)), generator=generator).tolist()
        for node in (nodes(count, size)[i] for i in order):
            part, text = TreeSum(len(node)), TreeSum(len(node), lambda a, b: f"({a}+{b})")
            for place, leaf in enumerate(node):
                part.add(place, leaves[leaf])
                text.add(place, letters[leaf])
            tree.add(node.start, part.result(), len(node))
            drawn.add(node.start, text.result(), len(node))
        got = tree.result()
        assert drawn.result() == shape
        assert got.slots["a"].equal(expected.slots["a"])
        assert (got.weight, got.tasks, got.metrics) == (expected.weight, expected.tasks, expected.metrics)


@given(st.integers(1, 64), st.data())
def test_blocks_of_several_sizes_and_single_leaves_go_together(count, data):
    add, at, parts = (lambda a, b: f"({a}+{b})"), 0, []
    while at < count:
        sizes = [1 << k for k in range(7) if at % (1 << k) == 0]
        part = range(at, min(count, at + data.draw(st.sampled_from(sizes))))
        parts.append(part)
        at = part.stop
    tree = TreeSum(count, add)
    for part in data.draw(st.permutations(parts)):
        tree.add(part.start, summed([str(i) for i in part], range(len(part)), add), len(part))
    assert tree.result() == summed([str(i) for i in range(count)], range(count), add)


def test_leaves_that_are_not_a_node_or_overlap_are_an_error():
    for count, index, leaves in ((8, 1, 2), (8, 2, 4), (8, 0, 3), (8, 4, 3), (8, 0, 0), (8, 4, -1), (7, 4, 4)):
        with pytest.raises(ValueError, match=r"not a node of the tree over|not one of"):
            TreeSum(count).add(index, 1.0, leaves)
    tree = TreeSum(7)
    tree.add(4, 1.0, 3)
    with pytest.raises(ValueError, match="leaf 5 arrived twice"):
        tree.add(5, 1.0)
    tree.add(3, 1.0)
    with pytest.raises(ValueError, match="leaf 3 arrived twice"):
        tree.add(0, 1.0, 4)
    with pytest.raises(ValueError, match=r"3 of 7 leaves are missing: \[0, 1, 2\]"):
        tree.result()
    tree.add(0, 1.0, 2)
    tree.add(2, 1.0)
    assert tree.result() == 4.0


def test_misuse_is_an_error():
    tree = TreeSum(3)
    tree.add(1, 1.0)
    for index, message in ((1, "twice"), (3, "not one of 3"), (-1, "not one of 3")):
        with pytest.raises(ValueError, match=message):
            tree.add(index, 1.0)
    with pytest.raises(ValueError, match=r"2 of 3 leaves are missing: \[0, 2\]"):
        tree.result()
    with pytest.raises(ValueError, match="at least one"):
        TreeSum(0)
    one, other = Contribution({"a": torch.ones(1)}, 1.0, 1), Contribution({"b": torch.ones(1)}, 1.0, 1)
    with pytest.raises(ValueError, match="differ"):
        one + other


def test_a_sum_in_the_memory_of_its_terms_has_the_same_bits():
    def terms():
        generator = torch.Generator().manual_seed(0)
        return [
            Contribution({"a": torch.randn(1000, generator=generator)}, 1.0, 1, {"loss": float(i)}) for i in range(7)
        ]

    kept, absorbed = TreeSum(7), TreeSum(7, Contribution.absorb)
    for index in (3, 0, 6, 1, 2, 5, 4):
        kept.add(index, terms()[index])
        absorbed.add(index, terms()[index])
    assert absorbed.result().slots["a"].equal(kept.result().slots["a"])
    assert absorbed.result().metrics == kept.result().metrics
    assert (absorbed.result().weight, absorbed.result().tasks) == (7.0, 7)


def test_terms_that_do_not_fit_keep_their_values():
    one, other = Contribution({"a": torch.ones(2)}, 1.0, 1), Contribution({"b": torch.ones(2)}, 1.0, 1)
    with pytest.raises(ValueError, match="contributions differ"):
        one.absorb(other)
    assert one.slots["a"].equal(torch.ones(2))
