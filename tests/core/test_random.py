"""Philox-4x32-10 against its published answers; streams depend only on their key."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from metadist.core.random import SPLITS, TaskKey, _words_fast, choose, integers, philox, seeded, uniform

KNOWN = [  # Random123, kat_vectors: counter, key, result
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor(c) for c in counter), key)
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("count", [1, 17, 20])
def test_known_answers_of_a_whole_shard(count):
    """The fast form counts its blocks from 0: only some published answers apply, and the others come from Python."""
    wanted, tasks = ((KNOWN[0][1], count), (KNOWN[1][1], 8), (KNOWN[2][1], 0)), torch.tensor([0, 0xFFFFFFFF, 70_000])
    for meta_step, high_word in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x13198A2E, 0x03707344)):
        for (key, n), words in zip(wanted, _words_fast(wanted, tasks, meta_step, high_word), strict=True):
            blocks = [[in_python([b, t, meta_step, high_word], key) for b in range(5)] for t in tasks.tolist()]
            assert words.tolist() == [[w for block in row for w in block][:n] for row in blocks]
    assert _words_fast(((KNOWN[0][1], 4),), tasks[0], 0, 0)[0].tolist() == KNOWN[0][2]


def in_python(counter, key):
    """Ten rounds on Python's integers, which do not wrap."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [p1 >> 32 ^ counter[1] ^ key[0], p1 & mask, p0 >> 32 ^ counter[3] ^ key[1], p0 & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


word = st.integers(0, 2**32 - 1)


@given(st.lists(word, min_size=4, max_size=4), st.tuples(word, word))
def test_any_counter_and_key(counter, key):
    assert [int(w) for w in philox(tuple(torch.tensor(c) for c in counter), key)] == in_python(counter, key)


def test_counter_is_block_task_step_and_place():
    """The layout of the counter determines every task: it must never change."""
    stream = TaskKey.of(5, "test", 11, [70_000]).stream("x", step=3, call=2)
    assert (
        stream.key == TaskKey.of(5, "train", 0, [0]).stream("x").key != TaskKey.of(6, "test", 11, [0]).stream("x").key
    )
    high = SPLITS.index("test") << 28 | 3 << 14 | 2
    expected = [w for block in range(2) for w in in_python([block, 70_000, 11, high], stream.key)]
    assert stream.bits(1, 7).flatten().tolist() == expected[:7]


KINDS = {
    "bits": lambda s: s.bits(3, 5),
    "one word": lambda s: s.bits(),
    "uniform": lambda s: s.uniform(7, low=-5.0, high=5.0),
    "normal": lambda s: s.normal(3, 7),
    "integers": lambda s: s.integers(1000, 9),
    "choose": lambda s: s.choose(20, 6, rows=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_independent_of_the_shard(kind):
    """Bitwise: alone, in shards of any size and order, as a scalar key, and under vmap."""
    draw = KINDS[kind]
    whole = draw(keys(range(100)).stream("s"))
    assert draw(keys([]).stream("s")).shape == (0, *whole.shape[1:])
    for part in (range(3, 4), range(10, 17), range(37, 100), [5, 99, 5, 0]):
        assert draw(keys(part).stream("s")).equal(whole[list(part)])
    assert all(draw(key.stream("s")).equal(whole[i]) for i, key in enumerate(keys(range(20)).each()))
    mapped = torch.func.vmap(lambda t: draw(TaskKey(3, "train", 8, t).stream("s")))(torch.arange(100))
    assert mapped.equal(whole)


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_steps_can_be_tensors_of_a_traced_graph(kind, mode):
    """The same bits from ints, from scalars, under vmap, and from a graph that was traced at other values."""

    def drawn(tasks, meta_step, step, call):
        return KINDS[kind](TaskKey(3, "test", meta_step, tasks).stream("s", step, call))

    def batched(tasks, *numbers):
        return torch.func.vmap(lambda task: drawn(task, *numbers))(tasks)

    tasks, numbers = torch.arange(5), (8, 2**14 - 1, 3)
    scalars = tuple(map(torch.tensor, numbers))
    expected = drawn(tasks, *numbers)
    assert drawn(tasks, *scalars).equal(expected) and batched(tasks, *scalars).equal(expected)
    for function in (drawn, batched):
        graph = make_fx(function, tracing_mode=mode)(torch.arange(7, 12), *map(torch.tensor, (0, 0, 0)))
        assert graph(tasks, *scalars).equal(expected)
    assert drawn(tasks, *numbers).equal(expected), "a trace left its tensors in the cache"


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_draw_can_be_traced_first(mode):
    """The cache of constants neither keeps tensors of a trace nor gives tensors to it."""
    key = TaskKey.of(hash(mode) % 1000, "train", 4, range(3))
    graph = make_fx(
        lambda tasks: torch.cat(TaskKey(key.seed, "train", 4, tasks).words(a=5, b=2), -1), tracing_mode=mode
    )(key.tasks)
    words = torch.cat(key.words(a=5, b=2), -1)
    assert type(words) is torch.Tensor and words.equal(graph(key.tasks))


def test_streams_drawn_together_are_those_drawn_alone():
    counts = {"a": 1, "b": 9, "none": 0, "c": 4, "images": 50}
    for part in (keys(range(20)), keys([]), keys([7]).each()[0]):
        for (name, count), words in zip(counts.items(), part.words(**counts), strict=True):
            assert words.equal(part.stream(name).bits(count)), name
    words = keys(range(20)).words(a=6)[0]
    assert uniform(words, -5.0, 5.0).equal(keys(range(20)).stream("a").uniform(6, low=-5.0, high=5.0))
    assert integers(words, 7).equal(keys(range(20)).stream("a").integers(7, 6))


def shuffled(words, population):
    """A partial Fisher–Yates shuffle of a list."""
    deck = list(range(population))
    for j, word in enumerate(words):
        pick = j + (word * (population - j) >> 32)
        deck[j], deck[pick] = deck[pick], deck[j]
    return deck[: len(words)]


@pytest.mark.parametrize(
    ("population", "k"), [(1, 1), (2, 2), (3, 3), (3, 2), (5, 4), (9, 9), (20, 10), (64, 64), (1000, 7)]
)
def test_choose_is_a_shuffle_s_beginning(population, k):
    words = keys(range(200)).stream("c").bits(k)
    expected = [shuffled(row, population) for row in words.tolist()]
    assert choose(words, population).tolist() == expected
    assert choose(words, torch.full((200,), population)).tolist() == expected
    assert choose(words[:, :0], population).shape == (200, 0)


def keys(tasks):
    return TaskKey.of(3, "train", 8, tasks)


def test_everything_that_keys_a_stream_changes_it():
    base = {"seed": 3, "split": "train", "meta_step": 8, "tasks": torch.tensor([4])}
    variants = [
        TaskKey(**base).stream("s"),
        *(
            TaskKey(**{**base, k: v}).stream("s")
            for k, v in {"seed": 4, "split": "test", "meta_step": 9, "tasks": torch.tensor([5])}.items()
        ),
        TaskKey(**base).stream("t"),
        TaskKey(**base).stream("s", step=1),
        TaskKey(**base).stream("s", call=1),
    ]
    draws = [tuple(s.bits(4).flatten().tolist()) for s in variants]
    assert len(set(draws)) == len(draws)
    with pytest.raises(ValueError, match="16384"):
        TaskKey(**base).stream("s", step=1 << 14)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-5.0, 5.0), (0.1, 5.0)])
def test_uniform_fills_its_range(low, high):
    drawn = keys(range(200)).stream("u").uniform(5000, low=low, high=high)
    assert low <= float(drawn.min()) < low + 1e-4 * (high - low)
    assert high - 1e-4 * (high - low) < float(drawn.max()) < high


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected))


def test_choose_is_uniform_over_ordered_draws():
    drawn = keys(range(60_000)).stream("c").choose(5, 3).squeeze(1)
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()
    codes = drawn @ torch.tensor([25, 5, 1])
    counts = torch.bincount(codes, minlength=125)[codes.unique()].tolist()
    assert len(counts) == 60
    assert chi_square(counts, [1000] * 60) < 59 + 5 * math.sqrt(2 * 59)
    with pytest.raises(ValueError, match="cannot choose 6 of 5"):
        keys([0]).stream("c").choose(5, 6)


def test_distributions():
    """Means and variances within five standard errors; neighbouring tasks and streams are uncorrelated."""
    n = 200_000
    uniform, normal = keys(range(n // 50)).stream("u").uniform(50), keys(range(n // 50)).stream("n").normal(50)
    assert abs(float(uniform.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(float(normal.mean())) < 5 / math.sqrt(n)
    assert abs(float(normal.double().var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((normal**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert abs(float((normal[:-1] * normal[1:]).mean())) < 5 / math.sqrt(n)
    counts = torch.bincount(keys(range(1000)).stream("i").integers(7, 70).flatten(), minlength=7).tolist()
    assert chi_square(counts, [10_000] * 7) < 6 + 5 * math.sqrt(12)
    assert math.isfinite(float(normal.abs().max()))


def test_integers_of_any_size():
    large = keys(range(100)).stream("i").integers(2**32, 10)
    assert int(large.min()) >= 0 and 2**31 < int(large.max()) < 2**32
    with pytest.raises(ValueError, match="4294967297"):
        keys([0]).stream("i").integers(2**32 + 1, 1)


def test_generators_are_keyed():
    a, b = (torch.rand(4, generator=keys([0, 1]).each()[i].generator()) for i in (0, 1))
    assert not a.equal(b)
    assert a.equal(torch.rand(4, generator=keys([0]).each()[0].generator()))
    assert seeded(0, "model").initial_seed() != seeded(1, "model").initial_seed()
    assert statistics.pvariance([seeded(i, "x").initial_seed() % 2 for i in range(64)]) > 0.1


# Values that are not words of the counter ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks",
    [[-1], [5, 2**32], [2**32 + 5], range(-2, 3), range(2**32 - 1, 2**32 + 1), [0.5], [None], range(2, -2, -1)],
    ids=str,
)
def test_an_index_that_would_repeat_another_task_is_refused(tasks):
    """Word 2³² + 5 is word 5, −1 is word 2³² − 1, and .5 is word 0."""
    with pytest.raises(ValueError, match=r"^task index \S+; expected an integer of 0 or more and below 2\*\*32$"):
        TaskKey.of(3, "train", 8, tasks)


@pytest.mark.parametrize("meta_step", [-1, 2**32, 0.5])
def test_a_meta_step_that_would_repeat_another_one_is_refused(meta_step):
    for make in (
        lambda: TaskKey.of(3, "train", meta_step, [0]),
        lambda: TaskKey(3, "train", meta_step, torch.arange(2)),
    ):
        with pytest.raises(ValueError, match=r"^meta_step \S+; expected an integer"):
            make()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split 'validate' is unknown; expected one of train, validation, test"):
        TaskKey.of(3, "validate", 8, [0])


def test_the_last_words_and_other_integers_are_keys():
    last = TaskKey.of(3, "train", 2**32 - 1, [2**32 - 1]).stream("s")
    expected = in_python([0, 2**32 - 1, 2**32 - 1, 0], last.key)
    assert last.bits(4).flatten().tolist() == list(expected)
    assert keys(range(2**32 - 2, 2**32)).tasks.tolist() == [2**32 - 2, 2**32 - 1]
    assert keys(range(4, 0, -2)).tasks.tolist() == [4, 2]
    assert keys(range(4, 2)).tasks.tolist() == keys([]).tasks.tolist() == []
    assert keys(list(np.arange(3))).tasks.tolist() == [0, 1, 2]


def test_choose_of_the_largest_populations():
    """Products with more than 63 bits: draws stay in range, and larger populations than words are refused."""
    words = keys(range(200)).stream("c").bits(3)
    for population in (2**31, 2**31 + 7, 2**32):
        assert choose(words, population).tolist() == [largest(row, population) for row in words.tolist()]
    with pytest.raises(ValueError, match="population is 4294967297"):
        choose(words, 2**32 + 1)


def largest(words, population):
    """Return the beginning of a shuffle of range(``population``), without the list."""
    moved, found = {}, []
    for j, word in enumerate(words):
        pick = j + (word * (population - j) >> 32)
        found.append(moved.get(pick, pick))
        moved[pick] = moved.get(j, j)
    return found
