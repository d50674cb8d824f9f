"""Time the samplers: a whole shard against one task and one image at a time, after a proof that all give the same bits.

The plain sampler is written like those of few-shot libraries: task by task, class by class, image by image, then
``torch.stack``. It draws from one sequential generator as they do. Such a generator can't give the same tasks, so the
sampler discards its draws and uses tasks that were drawn before. The floor is one copy of the sampled bytes.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metadist.benchmarks.timing import compare, interleaved, memcpy_rate
from metadist.config.build import build
from metadist.config.document import read_document
from metadist.core.errors import ConfigError, MetadistError
from metadist.core.random import TaskKey
from metadist.core.task import Examples, Task, TaskFamily, stack
from metadist.learners import supervised
from metadist.tasks import ImageFolder, Omniglot, Sinusoid
from metadist.tasks.episodes import Episodes

AT_ONCE, TASKWISE, PLAIN = "a shard at once", "task by task", "plain loop"
BLOCK = 3
SHARDS = (1, 8, 32)
SPLIT, SEED, META_STEP = "train", 0, 5

Sampler = Callable[[], Task]


class DifferentTasksError(MetadistError):
    """Samplers did not make the same tasks, so their times can't be compared."""


def run(
    *, config: str | None = None, tasks: int = 320, shard_sizes: list[int] | None = None, threads: int = 1
) -> dict[str, Any]:
    """Sample ``tasks`` tasks (at least a few shards) per contestant and case, from ``config`` or from every family."""
    torch.set_num_threads(threads)
    sizes = shard_sizes or list(SHARDS)
    if min(sizes) < 1:
        raise ConfigError(f"--shard-sizes {sizes}: each must be at least 1")
    cases = {}
    with _families(config) as families:
        for name, family in families.items():
            family.prepare(torch.device("cpu"))
            for size in sizes:
                cases[f"{name}, shards of {size}"] = _case(family, size, tasks)
    return {"settings": {"config": config, "tasks": tasks, "split": SPLIT, "threads": threads}, "cases": cases}


@contextmanager
def _families(config: str | None) -> Iterator[dict[str, TaskFamily]]:
    if config is not None:
        yield {config: supervised(build(read_document(config)).learner).tasks}
        return
    with tempfile.TemporaryDirectory() as folder, _environment(METADIST_CACHE=os.path.join(folder, "cache")):
        yield {
            "sinusoid 10-shot": Sinusoid(),
            "omniglot 5w1s": Omniglot(n_way=5, k_shot=1, query_shots=1),
            "omniglot 20w5s": Omniglot(n_way=20, k_shot=5, query_shots=5),
            "image_folder 84×84 5w1s": image_folder(Path(folder) / "images"),
        }


def image_folder(root: Path, *, classes: int = 16, images: int = 20, size: int = 84) -> ImageFolder:
    """Return 5-way 1-shot tasks with 15 queries from random images, which are written to ``root``."""
    from PIL import Image

    generator = torch.Generator().manual_seed(SEED)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i, pixels in enumerate(
            torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=generator)
        ):
            Image.fromarray(pixels.numpy()).save(root / f"class{c}" / f"{i}.png", compress_level=1)
    return ImageFolder(path=str(root), image_size=size, channels=3, n_way=5, k_shot=1, query_shots=15)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# One case -------------------------------------------------------------------------------------------------------------


def _case(family: TaskFamily, size: int, tasks: int) -> dict[str, Any]:
    samplers = contestants(family, TaskKey.of(SEED, SPLIT, META_STEP, range(size)))
    made = prove_same(samplers)
    tensors = [made.support.x, made.support.y, made.query.x, made.query.y]
    moved, rows = sum(t.nbytes for t in tensors), made.support.x.shape[1] + made.query.x.shape[1]
    seconds = interleaved(dict(samplers), rounds=max(5, -(-tasks // (size * BLOCK))), block=BLOCK)
    copied = moved / memcpy_rate(moved)
    compared = compare(
        {name: [size / s for s in values] for name, values in seconds.items()}, _base(samplers), block=BLOCK
    )
    for row in compared.values():
        row["examples_per_s"] = row["median"] * rows
        row["of_the_floor"] = row["median"] * copied / size
    return {
        "unit": "tasks/s",
        "contestants": compared,
        "milliseconds_per_shard": {name: 1e3 * size / row["median"] for name, row in compared.items()},
        "floor": {"tasks_per_s": size / copied, "bytes": moved, "memcpy_bytes_per_s": moved / copied},
        "same_bits": True,
    }


def _base(samplers: Mapping[str, Sampler]) -> str:
    return PLAIN if PLAIN in samplers else TASKWISE


def contestants(family: TaskFamily, keys: TaskKey) -> dict[str, Sampler]:
    """Return the samplers of one shard; the plain sampler exists for sinusoids and image episodes."""
    singles = keys.each()
    samplers: dict[str, Sampler] = {
        AT_ONCE: lambda: family.sample(keys, SPLIT),
        TASKWISE: lambda: stack([family.sample_task(key, SPLIT) for key in singles]),
    }
    if isinstance(family, Sinusoid):
        samplers[PLAIN] = _plain_sinusoid(family, keys)
    elif isinstance(family, Episodes):
        samplers[PLAIN] = _plain_episodes(family, keys)
    return samplers


def prove_same(samplers: Mapping[str, Sampler]) -> Task:
    """Return the shard. Raises DifferentTasksError where the samplers do not make the same bits."""
    made = {name: sampler() for name, sampler in samplers.items()}
    expected = made[AT_ONCE]
    for name, task in made.items():
        for part in ("support", "query"):
            for column in ("x", "y"):
                ours, theirs = (getattr(getattr(t, part), column) for t in (expected, task))
                if ours.dtype != theirs.dtype or not ours.equal(theirs):
                    raise DifferentTasksError(f"bench tasks: '{name}' makes other {part}.{column} than '{AT_ONCE}'")
    return expected


# The plain samplers ---------------------------------------------------------------------------------------------


def _plain_sinusoid(family: Sinusoid, keys: TaskKey) -> Sampler:
    amplitudes, phases = (v.tolist() for v in family.amplitude_and_phase(keys))
    drawn = family.sample(keys, SPLIT)
    given = list(zip(amplitudes, phases, drawn.support.x.clone().unbind(), drawn.query.x.clone().unbind()))
    low, high = family.x_range

    def examples(amplitude: float, phase: float, x: Tensor) -> Examples:
        torch.rand(x.shape) * (high - low) + low
        return Examples(x, (amplitude * torch.sin(x.double() - phase)).float())

    def sample() -> Task:
        tasks = []
        for amplitude, phase, support, query in given:
            random.uniform(*family.amplitude), random.uniform(*family.phase)
            tasks.append(Task(examples(amplitude, phase, support), examples(amplitude, phase, query)))
        return _stacked(tasks)

    return sample


def _plain_episodes(family: Episodes, keys: TaskKey) -> Sampler:
    n, k, q = family.shape(SPLIT)
    pixels, chosen = family.pixels.cpu(), family.draw(keys, SPLIT).tolist()
    classes, images_per_class = range(len(family.class_names(SPLIT))), range(k + q)

    def examples(shots: list[list[int]]) -> Examples:
        images, labels = [], []
        for shot in shots:
            for label in range(n):
                images.append(pixels[shot[label]].to(torch.float32) * (1 / 255))
                labels.append(label)
        return Examples(torch.stack(images), torch.tensor(labels))

    def sample() -> Task:
        tasks = []
        for shots in chosen:
            for _ in random.sample(classes, n):
                random.sample(images_per_class, k + q)
            tasks.append(Task(examples(shots[:k]), examples(shots[k:])))
        return _stacked(tasks)

    return sample


def _stacked(tasks: list[Task]) -> Task:
    def part(examples: list[Examples]) -> Examples:
        return Examples(torch.stack([e.x for e in examples]), torch.stack([e.y for e in examples]))

    return Task(part([t.support for t in tasks]), part([t.query for t in tasks]))
