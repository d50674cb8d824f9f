"""States of particles that are lost, saved, damaged or restored, in this process: the bits of an untroubled run."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path

import long_trials
import particles
import pytest
import tiny
from faults import everywhere

from metadist.config.build import build
from metadist.core.errors import CheckpointError, ConfigError
from metadist.core.round import MetaStepKey, run_rounds
from metadist.training.observers import Observer
from metadist.training.scheduler import Scheduler
from metadist.workers.faulty import FaultyExecutor, Lose
from metadist.workers.local import LocalExecutor

STEPS = 6


def train(learner, wrap=None, kind=LocalExecutor, steps=STEPS):
    executor = kind(learner)
    fleet = Scheduler(executor if wrap is None else wrap(executor), learner)
    state = learner.initial(0)
    for step in range(steps):
        state, _ = run_rounds(learner.meta_step(MetaStepKey("run", step, 0), state), fleet.sum)
    executor.close()
    return state.sha256(), fleet


EXPECTED = train(particles.learner())[0]


def forget(chance, likelihood):
    """Drops states at random, whenever a shard is given out."""

    def drop(executor, shard):
        for key in list(executor._kept.outputs):
            if chance.random() < likelihood:
                del executor._kept.outputs[key]

    return everywhere(drop)


@pytest.mark.parametrize("seed", range(3))
def test_lost_states_are_computed_again_under_the_parameters_of_each_meta_step(seed):
    sha256, fleet = train(particles.learner(), forget(random.Random(seed), 0.04))
    assert fleet.retried["missing"] > 2
    assert sha256 == EXPECTED
    assert fleet.tasks_done == 5 * STEPS, "states that are computed again count once"


def lose_all(meta_step):
    """Drops all states once, when the first shard of ``meta_step`` is given out."""
    done = []

    def drop(executor, shard):
        if shard.meta_step == meta_step and not done:
            executor._kept.outputs.clear()
            done.append(shard)

    return everywhere(drop)


def test_all_states_are_lost_at_once():
    sha256, fleet = train(particles.learner(), lose_all(4))
    assert sha256 == EXPECTED
    assert fleet.retried["missing"] >= 3 * 4, "every shard goes back to the first meta-step"


def test_under_another_theta_the_states_would_be_others():
    """Else the tests above could not fail."""

    class Mistaken(LocalExecutor):
        def publish(self, meta_step, round, state):
            size = super().publish(meta_step, round, state)
            self._kept.thetas = dict.fromkeys(self._kept.thetas, self._kept.thetas[meta_step, round])
            return size

    sha256, fleet = train(particles.learner(), lose_all(4), Mistaken)
    assert fleet.retried["missing"]
    assert sha256 != EXPECTED


def test_shards_that_are_lost_go_out_again():
    def wrap(executor):
        faulty = FaultyExecutor(executor)
        for index in range(3):
            faulty.fail_at(lambda shard, index=index: shard.meta_step == index + 1 and shard.index == index, Lose())
        return faulty

    sha256, fleet = train(particles.learner(), wrap)
    assert sha256 == EXPECTED
    assert fleet.retried == Counter(lost=3)


# ---- whole runs, with checkpoints


class Notes(Observer):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


def run(folder, *overrides, document=particles.document, **request):
    notes = Notes()
    result = tiny.train(
        build(document(*overrides)), run_dir=str(folder), plots=False, test=False, display=notes, **request
    )
    return result.params_sha256, result, notes.lines


numerics = pytest.mark.lane("numerics")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The hash of a run of 9 meta-steps without trouble."""
    return run(tmp_path_factory.mktemp("whole") / "run")[0]


@numerics
def test_a_resumed_run_goes_on_from_the_states_of_its_checkpoint(whole, tmp_path):
    run(tmp_path / "run", "outer.meta_steps=6")
    folders = sorted(p.name for p in (tmp_path / "run" / "states").iterdir())
    assert folders == ["step-00000004", "step-00000006"], "one per checkpoint"
    sha256, result, _ = run(tmp_path / "run", resume=True)
    assert sha256 == whole
    assert not result.retried


@numerics
def test_long_trials_go_on_in_a_resumed_run(tmp_path):
    """The states are trials here: environments, memories, returns so far."""
    of_trials = partial(run, document=long_trials.document)
    expected = of_trials(tmp_path / "whole")[0]
    of_trials(tmp_path / "run", "outer.meta_steps=6")
    sha256, result, _ = of_trials(tmp_path / "run", resume=True)
    assert sha256 == expected
    assert not result.retried
    with pytest.raises(ConfigError, match="outer.meta_batch_size is 6, the run began with 5"):
        of_trials(tmp_path / "run", "outer.meta_batch_size=6", "outer.meta_steps=12", resume=True)


@numerics
def test_states_go_wherever_the_run_goes(whole, monkeypatch):
    sha256, _, _ = run("memory://particles/run", "outer.meta_steps=6")
    sha256, _, _ = run("memory://particles/run", resume=True)
    assert sha256 == whole


@numerics
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_checkpoint_whose_states_are_gone_is_skipped(whole, tmp_path, caplog, damage):
    run(tmp_path / "run", "outer.meta_steps=6")
    file = tmp_path / "run" / "states" / "step-00000006" / "shard-00001.frame"
    file.write_bytes(file.read_bytes()[:-1]) if damage == "truncated" else file.unlink()
    sha256, _, notes = run(tmp_path / "run", resume=True)
    assert sha256 == whole
    assert "resumed at meta-step 4" in notes
    assert "shard-00001.frame has" in caplog.text


@numerics
def test_flipped_bits_are_found_by_the_reader(tmp_path):
    run(tmp_path / "run", "outer.meta_steps=6")
    file = tmp_path / "run" / "states" / "step-00000006" / "shard-00001.frame"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(Exception, match=r"shard-00001.frame are damaged .*remove the checkpoint"):
        run(tmp_path / "run", resume=True)


@numerics
def test_lost_states_of_a_run_with_saved_ones_go_back_no_further(whole, tmp_path):
    seen = []

    def drop(executor, shard):
        if shard.function == "advance" and shard.meta_step == 6 and shard.index == 0 and not seen:
            executor._kept.outputs.clear()
            seen.append(True)
        if seen:
            seen.append((shard.function, shard.meta_step))

    sha256, result, _ = run(tmp_path / "run", wrap=everywhere(drop))
    assert sha256 == whole
    again = {call for call in seen if call is not True and call[1] < 6}
    assert again == {("load", 3), ("advance", 4), ("advance", 5)}, "states were saved after 3 and 4 meta-steps"


@numerics
def test_a_store_that_is_full_costs_checkpoints_and_not_the_run(whole, tmp_path, monkeypatch):
    from metadist.storage.store import Store

    original, asked = Store.write, []

    def write(self, name, data):
        if name.endswith(".frame"):
            asked.append(self.root)
            raise OSError(28, "No space left on device")
        original(self, name, data)

    monkeypatch.setattr(Store, "write", write)
    sha256, _, notes = run(tmp_path / "run")
    assert sha256 == whole
    assert any("no checkpoint of meta-step 4: the states of 3 of 3 shards could not be written" in n for n in notes)
    assert not Path(tmp_path / "run" / "checkpoints").exists()
    steps = sorted({int(str(root).rpartition("-")[2]) for root in asked})
    assert steps == [3, 4, 7, 8, 9], "the store is asked when states are due, and not in every meta-step"


@numerics
def test_another_population_is_refused(tmp_path):
    run(tmp_path / "run", "outer.meta_steps=4")
    with pytest.raises((CheckpointError, ConfigError), match=r"outer.meta_batch_size|3 shards"):
        run(tmp_path / "run", "outer.meta_batch_size=7", resume=True)
