"""The scaling benchmark: both contestants compute the same shards; nothing is timed here."""

from __future__ import annotations

import pytest
import tiny

from metadist.benchmarks import bench, scaling
from metadist.core.errors import ConfigError


@pytest.mark.lane("ray")
@pytest.mark.long
def test_actors_and_processes_compute_and_the_rest_is_measured() -> None:
    report = scaling.run(tiny.document(), workers=[2], steps=8, sizes=[0.5])
    alone, empty, driver = report["cases"].values()
    assert list(alone["contestants"]) == ["alone", "actors"]
    assert alone["efficiency_ci95"][0] <= alone["efficiency"] <= alone["efficiency_ci95"][1]
    assert alone["shards_per_meta_step"] == 5
    assert 2 <= alone["results_per_meta_step"] <= 5
    assert alone["ms_per_meta_step"]["compute_per_worker"] > 0
    assert empty["overhead_of_ray_ms"] > 0
    assert empty["parameters"] == tiny.learner().slots["model"].layout.numel
    assert list(driver["contestants"]) == ["memcpy", "decode, check and add"]


def test_the_processes_compute_other_shards_each_and_all_of_them(monkeypatch) -> None:
    """Without processes: what each of three is given in one turn."""
    given = []

    class Connection:
        def __init__(self) -> None:
            self.orders = [0, None]

        def recv(self):
            return self.orders.pop(0)

        def send(self, _) -> None: ...

    from metadist.workers.local import LocalExecutor

    submit = LocalExecutor.submit
    monkeypatch.setattr(
        LocalExecutor,
        "submit",
        lambda self, shard, attempt: (given.append((shard.meta_step, shard.index)), submit(self, shard, attempt)),
    )
    for index in range(3):
        scaling._alone(Connection(), tiny.document(), index, 3, 0)
    assert sorted(given) == [(step, index) for step in range(scaling.TURN) for index in range(5)]


@pytest.mark.parametrize("workers", [[], [0], [1, -1]])
def test_senseless_numbers_of_workers_are_one_line(workers) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        bench("scaling", document=tiny.document(), workers=workers, steps=8)
