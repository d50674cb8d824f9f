"""The scheduler against workers in memory that fail as they are told."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import tiny
import torch

from metadist.core.errors import WorkerError
from metadist.core.round import EvaluationRequest, Failed, Finished, MetaStepKey
from metadist.core.state import Contribution, Records
from metadist.training import scheduler as scheduling
from metadist.training.scheduler import Scheduler

LEARNER = tiny.learner()
STATE = LEARNER.initial(0)
SHARDS = 5


class Toy:
    """``workers`` in memory, one shard at a time each, that finish in random order.

    ``fail_at`` scripts what becomes of attempts.

    A deed is a function (shard, attempt, worker, result) → events. ``hang`` is none of them: the worker does not
    answer.
    """

    blocks = False

    def __init__(self, workers=2, order=0, learner=LEARNER):
        self.learner, self.chance = learner, random.Random(order)
        self.names = (f"toy-{n}" for n in itertools.count())
        self.alive = {next(self.names): [] for _ in range(workers)}
        self.hung, self.deeds, self.submitted = set(), defaultdict(list), []
        self.theta, self.extra, self.cancelled, self.closed = {}, [], [], False

    def fail_at(self, index, *deeds):
        """Attempts 1, 2, … at shard ``index`` (of any round) end like this; later ones go well."""
        self.deeds[index] += deeds
        return self

    def publish(self, meta_step, round, state):
        self.theta = dict(state.slots)
        return sum(v.numel() for v in state.slots.values())

    def capacity(self, role):
        return sum(not calls for calls in self.alive.values()) if role == "learner" else 0

    def submit(self, shard, attempt):
        worker = next(w for w, calls in self.alive.items() if not calls)
        self.alive[worker].append((shard, attempt, dict(self.theta)))
        self.submitted.append((shard.index, attempt))
        if self.deeds[shard.index] and self.deeds[shard.index][0] is hang:
            self.deeds[shard.index].pop(0)
            self.hung.add(worker)

    def cancel(self, shard, attempt):
        self.cancelled.append((shard.index, attempt))
        for worker, calls in list(self.alive.items()):
            if any((s, a) == (shard, attempt) for s, a, _ in calls):
                self.extra += self.die(worker, "was recycled")

    def die(self, worker, message):
        calls = self.alive.pop(worker)
        self.hung.discard(worker)
        self.alive[next(self.names)] = []
        return [Failed(s, a, worker, "lost", message) for s, a, _ in calls]

    def wait(self, timeout):
        if self.extra:
            events, self.extra = self.extra, []
            return events
        busy = [w for w, calls in self.alive.items() if calls and w not in self.hung]
        if not busy:
            time.sleep(min(timeout, 0.005))
            return []
        worker = self.chance.choice(busy)
        shard, attempt, theta = self.alive[worker][0]
        deed = self.deeds[shard.index].pop(0) if self.deeds[shard.index] else finish
        if deed is death:
            return self.die(worker, "died: killed by the test")
        self.alive[worker].clear()
        return deed(shard, attempt, worker, self.learner.compute(shard, theta))

    def shortage(self):
        return "asked for 2 toys; there are 0"

    def workers(self):
        return {w: {"role": "learner"} for w in self.alive}

    def close(self):
        self.closed = True


def finish(shard, attempt, worker, result):
    return [Finished(shard, attempt, worker, result, {"seconds": 0.01, "bytes": 8.0})]


def twice(shard, attempt, worker, result):
    return finish(shard, attempt, worker, result) * 2


def death(*_): ...


def hang(*_): ...


def error(message="ValueError: no such sine", tasks=(4,)):
    return lambda shard, attempt, worker, _: [
        Failed(shard, attempt, worker, "error", message, tasks, detail=f"traceback of {message}")
    ]


def altered(change):
    """A result that arrives as ``change`` makes it."""
    return lambda shard, attempt, worker, result: finish(shard, attempt, worker, change(result))


def with_slot(change, name="model"):
    return altered(lambda r: replace(r, slots={**r.slots, name: change(r.slots["model"])}))


def gradient_round(meta_step=0, state=STATE, learner=LEARNER):
    return next(learner.meta_step(MetaStepKey("run", meta_step, 7), state))


def scheduler(toy, **options):
    return Scheduler(toy, toy.learner, **options)


def bits(total):
    return [(n, v.numpy().tobytes()) for n, v in sorted(total.slots.items())], total.weight, total.tasks, total.metrics


EXPECTED = bits(scheduler(Toy(1)).run(gradient_round()))


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_any_order_and_number_of_workers_gives_the_same_bits(workers, order):
    assert bits(scheduler(Toy(workers, order)).run(gradient_round())) == EXPECTED


@pytest.mark.parametrize("order", range(4))
def test_lost_shards_are_given_out_again(order):
    toy = Toy(2, order).fail_at(0, death).fail_at(3, death, death)
    fleet = scheduler(toy)
    assert bits(fleet.run(gradient_round())) == EXPECTED
    assert fleet.retried == Counter(lost=3)
    assert Counter(index for index, _ in toy.submitted) == Counter({0: 2, 1: 1, 2: 1, 3: 3, 4: 1})
    assert fleet.tasks_done == 10, "no task is counted twice"


def test_all_workers_die_at_once():
    toy = Toy(5).fail_at(0, death).fail_at(1, death).fail_at(2, death).fail_at(3, death).fail_at(4, death)
    assert bits(scheduler(toy).run(gradient_round())) == EXPECTED


def test_duplicates_are_dropped_and_counted():
    fleet = scheduler(Toy(2).fail_at(1, twice).fail_at(4, twice))
    assert bits(fleet.run(gradient_round())) == EXPECTED
    first = fleet.measured.read().counts["duplicates"]
    fleet.run(gradient_round(1))  # the copy of the last shard may arrive in the next round only
    assert first + fleet.measured.read().counts["duplicates"] == 2


def test_a_result_of_an_earlier_round_never_enters_a_later_one():
    toy = Toy(2)
    fleet = scheduler(toy)
    fleet.run(gradient_round())
    wrong = Contribution({"model": torch.full_like(STATE.slots["model"], 1e6)}, 2.0, 2, {"loss": 0.0, "mse": 0.0})
    expected = bits(scheduler(Toy(1)).run(gradient_round(1)))
    old = gradient_round(0).shards
    toy.extra = [event for shard in old for event in finish(shard, 1, "toy-0", wrong)]  # same indices, same attempt
    assert bits(fleet.run(gradient_round(1))) == expected
    assert fleet.measured.read().counts["duplicates"] == len(old)


def test_a_result_that_nobody_asked_for_is_dropped():
    toy = Toy(1)
    fleet = scheduler(toy)
    wrong = Contribution({"model": torch.zeros_like(STATE.slots["model"])}, 2.0, 2, {"loss": 0.0, "mse": 0.0})
    shards = gradient_round().shards
    toy.extra = finish(shards[0], 9, "stranger", wrong) + finish(replace(shards[0], index=77), 1, "stranger", wrong)
    assert bits(fleet.run(gradient_round())) == EXPECTED
    assert fleet.measured.read().counts["duplicates"] == 2


def test_a_slow_attempt_of_the_last_round_may_end_in_the_next(monkeypatch):
    monkeypatch.setattr(scheduling, "BACKUP_SECONDS", 0.2)
    toy = Toy(2).fail_at(2, hang)
    fleet = scheduler(toy, timeout=60)
    fleet._durations["gradient"].extend([1e-3] * 8)
    scheduling_floor = time.monotonic()
    assert bits(fleet.run(gradient_round())) == EXPECTED, "an idle worker computes the shard as well"
    assert time.monotonic() - scheduling_floor < 55
    assert fleet.measured.read().counts["backups"] == 1
    toy.hung.clear()  # it wakes up during the next round
    assert bits(fleet.run(gradient_round(1))) == bits(scheduler(Toy(1)).run(gradient_round(1)))
    assert fleet.measured.read().counts["duplicates"] == 1
    assert fleet.retried == Counter()


def test_a_hung_worker_is_recycled_after_the_timeout():
    toy = Toy(1).fail_at(0, hang)
    fleet = scheduler(toy, timeout=0.2)
    began = time.monotonic()
    assert bits(fleet.run(gradient_round())) == EXPECTED
    assert toy.cancelled == [(0, 1)]
    assert 0.2 < time.monotonic() - began < 60
    assert fleet.retried == Counter(lost=1)


def test_a_worker_that_hangs_on_a_finished_shard_is_recycled_too(monkeypatch):
    monkeypatch.setattr(scheduling, "BACKUP_SECONDS", 0.2)
    toy = Toy(2).fail_at(0, hang)
    fleet = scheduler(toy, timeout=0.6)
    fleet._durations["gradient"].extend([1e-3] * 8)
    for meta_step in range(2):
        fleet.run(gradient_round(meta_step))
    assert len(toy.hung) == 1, "its backup won, it hangs on"
    deadline = time.monotonic() + 60
    while toy.hung and time.monotonic() < deadline:
        fleet.run(gradient_round(2))
    assert not toy.hung
    assert toy.cancelled == [(0, 1)]


def test_three_hangs_end_the_run():
    with pytest.raises(WorkerError, match=r"killed 3 workers.*recycled.*seed 7"):
        scheduler(Toy(1).fail_at(0, hang, hang, hang), timeout=0.1).run(gradient_round())


def test_three_deaths_end_the_run_naming_tasks_seed_and_workers():
    with pytest.raises(WorkerError) as caught:
        scheduler(Toy(2).fail_at(1, death, death, death, death)).run(gradient_round(4))
    message = str(caught.value)
    assert "killed 3 workers" in message
    assert "tasks 2…3" in message
    assert "seed 7" in message
    assert "meta-step 4" in message
    assert message.count("toy-") == 3


def test_the_queue_behind_a_victim_is_not_blamed():
    """Shards that were merely queued behind a death, however often, are no culprits."""
    toy = Toy(1)
    fleet = scheduler(toy)
    shards = gradient_round().shards

    def innocent(shard, attempt, worker, _):
        return [Failed(shard, attempt, worker, "lost", "died", guilty=False)]

    toy.fail_at(shards[2].index, *[innocent] * 7)
    assert bits(fleet.run(gradient_round())) == EXPECTED
    assert fleet.retried["lost"] == 7


def test_failing_alike_twice_ends_the_run_naming_task_and_seed():
    details = []

    def on_failure(detail):
        details.append(detail)
        return " (see there)"

    toy = Toy(2).fail_at(2, error(), error())
    with pytest.raises(WorkerError) as caught:
        scheduler(toy, on_failure=on_failure).run(gradient_round())
    message = str(caught.value)
    assert "failed alike twice: task 4: ValueError: no such sine (see there)" in message
    assert "seed 7" in message
    assert details == ["traceback of ValueError: no such sine"]


def test_a_single_error_is_forgiven():
    fleet = scheduler(Toy(2).fail_at(2, error()).fail_at(3, error("other"), error("another")))
    assert bits(fleet.run(gradient_round())) == EXPECTED
    assert fleet.retried == Counter(error=3)


def test_errors_that_differ_every_time_end_the_run_too():
    """Messages may hold addresses or times: a shard must not be tried for ever."""
    deeds = [error(f"ValueError: <Thing at 0x{n:x}>") for n in range(50)]
    toy = Toy(2).fail_at(2, *deeds)
    with pytest.raises(
        WorkerError, match=rf"failed {scheduling.MAX_FAILURES} times, the last with: task 4: ValueError: <Thing at 0x4>"
    ):
        scheduler(toy).run(gradient_round())


def test_alike_counts_also_with_something_else_between():
    toy = Toy(2).fail_at(2, error("a"), death, error("b"), error("a"))
    with pytest.raises(WorkerError, match="failed alike twice: task 4: a"):
        scheduler(toy).run(gradient_round())


WRONG = {
    "NaN": (with_slot(lambda v: v * float("nan")), "NaN or Inf"),
    "Inf": (with_slot(lambda v: torch.where(torch.arange(len(v)) == 3, float("inf"), v)), "NaN or Inf"),
    "shape": (with_slot(lambda v: v[:-1]), r"\(\d+,\) torch.float32, expected"),
    "matrix": (with_slot(lambda v: v.unsqueeze(0)), "expected"),
    "dtype": (with_slot(lambda v: v.double()), "float64"),
    "slot": (with_slot(lambda v: v, "other"), "slot 'other' takes no contributions"),
    "missing slot": (altered(lambda r: replace(r, slots={})), r"slots \[\], expected \['model'\]"),
    "no weight": (altered(lambda r: replace(r, weight=0.0)), "weight 0.0"),
    "negative weight": (altered(lambda r: replace(r, weight=-2.0)), "weight -2.0"),
    "NaN weight": (altered(lambda r: replace(r, weight=float("nan"))), "weight nan"),
    "infinite weight": (altered(lambda r: replace(r, weight=float("inf"))), "weight inf"),
    "too many tasks": (altered(lambda r: replace(r, tasks=3)), "3 tasks for a shard of 2"),
    "no tasks": (altered(lambda r: replace(r, tasks=0)), "0 tasks"),
    "records": (altered(lambda r: Records({"task": torch.arange(2)})), "records where a contribution should be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_rejected_before_the_sum_and_attributed(name, caplog):
    deed, reason = WRONG[name]
    fleet = scheduler(Toy(2).fail_at(3, deed))
    with caplog.at_level(logging.WARNING, logger="metadist"):
        assert bits(fleet.run(gradient_round())) == EXPECTED
    assert fleet.retried == Counter(rejected=1)
    assert any("toy-" in r.getMessage() and "shard 3" in r.getMessage() for r in caplog.records), caplog.text
    with pytest.raises(WorkerError, match=rf"shard 3 .*seed 7.*failed alike twice.*{reason}"):
        scheduler(Toy(2).fail_at(3, deed, deed)).run(gradient_round())


def evaluation_round():
    return LEARNER.evaluation(EvaluationRequest(MetaStepKey("run", 0, 7), "validation", 7, 2), STATE)


@pytest.mark.parametrize("order", range(4))
def test_records_come_in_the_order_of_their_shards(order):
    toy = Toy(3, order).fail_at(1, death).fail_at(2, twice)
    records = scheduler(toy).run(evaluation_round())
    assert records.columns["task"].tolist() == list(range(7))
    assert records.columns["loss"].shape == (7, 3)
    assert all(torch.equal(v, scheduler(Toy(1)).run(evaluation_round()).columns[n]) for n, v in records.columns.items())


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        (altered(lambda r: Records({n: c[:1] for n, c in r.columns.items()})), "1 rows for 2 tasks"),
        (
            altered(lambda r: Contribution({"model": STATE.slots["model"]}, 2.0, 2)),
            "contribution where records should be",
        ),
    ],
)
def test_wrong_records_are_rejected(deed, reason):
    scheduler(Toy(2).fail_at(1, deed)).run(evaluation_round())
    with pytest.raises(WorkerError, match=reason):
        scheduler(Toy(2).fail_at(1, deed, deed)).run(evaluation_round())


def test_no_workers_end_the_run_after_a_bounded_wait():
    began = time.monotonic()
    with pytest.raises(WorkerError, match="no worker for 0 s: asked for 2 toys; there are 0"):
        scheduler(Toy(0), patience=0.3).run(gradient_round())
    assert 0.3 < time.monotonic() - began < 60


def test_a_round_with_one_short_last_shard():
    learner = tiny.learner("outer.meta_batch_size=7", "outer.shard_size=3")
    rounds = gradient_round(state=learner.initial(0), learner=learner)
    assert [s.count for s in rounds.shards] == [3, 3, 1]
    total = scheduler(Toy(2, learner=learner)).run(rounds)
    assert total.tasks == 7


def test_measurements_start_anew_at_every_reading():
    fleet = scheduler(Toy(2).fail_at(0, death))
    fleet.run(gradient_round())
    taken = fleet.measured.read()
    assert taken.counts["retried"] == 1
    assert taken.counts["bytes_received"] == 8 * SHARDS
    assert taken.workers
    assert taken.seconds["gather"] > 0
    again = fleet.measured.read()
    assert not again.counts
    assert not again.seconds
    assert not again.workers
    assert fleet.retried == Counter(lost=1), "totals stay"
