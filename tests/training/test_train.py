"""The outer loop and the experiment around it, in this process: resumption, stores without rename, stopping, the
best, the test.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random

import fsspec
import pytest
import tiny
import torch
from faults import everywhere
from tiny import train

from metadist.core.errors import MetadistError, WorkerError
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.state import State
from metadist.experiment.evaluate import evaluate_run
from metadist.experiment.judging import EvaluationOptions
from metadist.experiment.load import load_run
from metadist.learners.evaluation import Evaluation
from metadist.training import loop as training
from metadist.training.checkpointing import RunCheckpoints
from metadist.training.evaluation import evaluate
from metadist.training.progress import Progress
from metadist.training.scheduler import Scheduler
from metadist.workers.local import LocalExecutor


def stopped_after(steps):
    """A ``stop`` that asks for the end after so many meta-steps."""
    calls = itertools.count()
    return lambda: next(calls) >= steps


@pytest.fixture
def whole(tmp_path):
    return train(tiny.experiment(), run_dir=str(tmp_path / "whole"), plots=False)


def test_the_same_experiment_gives_the_same_bits(whole, tmp_path):
    again = train(tiny.experiment(), run_dir=str(tmp_path / "again"), plots=False)
    assert again.params_sha256 == whole.params_sha256
    assert again.evaluations[0] == whole.evaluations[0]
    assert (
        train(tiny.experiment("seed=4"), run_dir=str(tmp_path / "else"), plots=False).params_sha256
        != whole.params_sha256
    )


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("at", "overrides"),
    [
        (1, ("outer.optimizer=sgd", "outer.momentum=0.9", "outer.lr=0.1")),
        (3, ("outer.schedule=cosine", "outer.clip_norm=0.1")),
        (
            5,
            (
                "algorithm={name: reptile, inner_optimizer: adam, inner_lr: 0.01, inner_steps: 2, moments: carried}",
                "outer.optimizer=sgd",
            ),
        ),
        (3, ("algorithm={name: meta_sgd}", "outer.optimizer=adamw", "outer.weight_decay=0.1")),
        (1, ("model.dropout=0.5",)),
        (5, ("model={name: cnp, width: 8, representation: 8}", "algorithm={name: cnp}")),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, overrides, at):
    whole = train(tiny.experiment(*overrides), run_dir=str(tmp_path / "whole"), plots=False)
    half = train(tiny.experiment(*overrides), run_dir=str(tmp_path / "run"), stop=stopped_after(at), plots=False)
    assert half.outcome.stopped == "interrupted"
    assert half.outcome.progress.meta_step == at
    assert half.evaluations == [], "the test set is not touched before the end"
    done = train(tiny.experiment(*overrides), run_dir=str(tmp_path / "run"), resume=True, plots=False)
    assert done.params_sha256 == whole.params_sha256
    assert done.evaluations == whole.evaluations
    assert done.outcome.progress.validation == whole.outcome.progress.validation
    assert done.outcome.progress.curve == whole.outcome.progress.curve


@pytest.mark.lane("numerics")
def test_interrupted_at_every_meta_step(tmp_path, whole):
    for _ in range(6):
        half = train(tiny.experiment(), run_dir=str(tmp_path / "run"), resume=True, stop=stopped_after(1), plots=False)
    assert half.params_sha256 == whole.params_sha256


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("store", ["memory://runs-{}/a", "memory://runs-{}"])
def test_a_store_without_rename(tmp_path, monkeypatch, whole, store):
    url = store.format(random.random())
    monkeypatch.setenv("METADIST_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fs), "mv", None)
    monkeypatch.setattr(type(fs), "rename", None, raising=False)
    half = train(tiny.experiment(), run_dir=url, stop=stopped_after(3), plots=True)
    assert half.run_dir == url
    done = train(tiny.experiment(), run_dir=url, resume=True, plots=True)
    assert done.params_sha256 == whole.params_sha256
    assert done.run_id == half.run_id
    assert fs.exists(f"{url}/plots/learning_curve.png")
    assert evaluate_run(url).evaluations == done.evaluations
    done.export(f"{url}/exported.safetensors")
    assert fs.exists(f"{url}/exported.safetensors")


def test_a_run_that_fails_keeps_what_it_learned(tmp_path, whole):
    experiment = tiny.experiment("checkpoint.every=100", "evaluate.every=100")

    def watch(_, shard):
        if shard.meta_step == 4:
            raise WorkerError("no worker for 60 s")

    with pytest.raises(WorkerError):
        train(experiment, run_dir=str(tmp_path / "run"), wrap=everywhere(watch), plots=False)
    assert load_run(str(tmp_path / "run")).outcome.best_step == 4
    done = train(experiment, run_dir=str(tmp_path / "run"), resume=True, plots=False)
    assert done.params_sha256 == whole.params_sha256


def test_a_failure_during_validation_keeps_it_too(tmp_path):
    experiment = tiny.experiment("checkpoint.every=100")

    def watch(_, shard):
        if shard.function == "evaluate":
            raise WorkerError("no worker for 60 s")

    with pytest.raises(WorkerError):
        train(experiment, run_dir=str(tmp_path / "run"), wrap=everywhere(watch), plots=False)
    assert load_run(str(tmp_path / "run")).outcome.best_step == 3


def test_a_failure_at_once_leaves_no_checkpoint(tmp_path):
    def watch(_, shard):
        raise WorkerError("no worker for 60 s")

    with pytest.raises(WorkerError):
        train(tiny.experiment(), run_dir=str(tmp_path / "run"), wrap=everywhere(watch), plots=False)
    assert not (tmp_path / "run/checkpoints").exists()
    assert (
        train(tiny.experiment(), run_dir=str(tmp_path / "run"), resume=True, plots=False).outcome.progress.meta_step
        == 6
    )


def test_being_killed_while_files_are_written_is_survived(tmp_path, whole, monkeypatch):
    """``config.yaml`` is written again at every resumption: half of it must never be all there is."""
    train(tiny.experiment(), run_dir=str(tmp_path / "run"), stop=stopped_after(2), plots=False)

    class Killed(BaseException): ...

    def killed(*_):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr("os.replace", killed)
        with pytest.raises(Killed):
            train(tiny.experiment("tracking.log_every=2"), run_dir=str(tmp_path / "run"), resume=True, plots=False)
    done = train(tiny.experiment(), run_dir=str(tmp_path / "run"), resume=True, plots=False)
    assert done.params_sha256 == whole.params_sha256


# Validation, stopping and the test ------------------------------------------------------------------------------------


def scripted(monkeypatch, scores):
    """Validation scores as told, one after the other; the test is as it is. Returns the θ that each was asked of."""
    seen, real = [], training.evaluate

    def scored(fleet, learner, state, request):
        judged = real(fleet, learner, state, request)
        seen.append(state)
        return dataclasses.replace(judged, mean=[*judged.mean[:-1], scores[len(seen) - 1]])

    monkeypatch.setattr(training, "evaluate", scored)
    return seen


def outcome(tmp_path, *overrides, resume=False):
    often = ("evaluate.every=1", "outer.meta_steps=8", "checkpoint.every=100", "checkpoint.keep=1")
    return train(tiny.experiment(*often, *overrides), run_dir=str(tmp_path / "run"), resume=resume, plots=False)


def test_patience_ends_the_run_and_the_best_is_tested(tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [3.0, 2.0, 2.5, 2.2, 2.1, 9.0])
    result = outcome(tmp_path, "evaluate.patience=3")
    assert result.outcome.progress.meta_step == 5
    assert "no better validation in 3 evaluations" in result.outcome.stopped
    assert result.outcome.best_step == 2
    assert result.state.sha256() == seen[1].sha256()
    assert result.params_sha256 == seen[4].sha256(), "the final parameters are the last ones"
    [judged] = result.evaluations
    assert judged == evaluated(result, seen[1])
    assert evaluate_run(result.run_dir).evaluations == [judged]
    assert load_run(result.run_dir).state.sha256() == seen[1].sha256()


def evaluated(result, state: State) -> Evaluation:
    learner = result.experiment.learner
    fleet = Scheduler(LocalExecutor(learner), learner)
    return evaluate(fleet, learner, state, EvaluationRequest(MetaStepKey("x", 0, 3), "test", 8, 2))


def test_a_run_that_was_stopped_by_patience_stays_stopped(tmp_path, monkeypatch):
    scripted(monkeypatch, [1.0, 2.0, 2.0, 0.0])
    first = outcome(tmp_path, "evaluate.patience=2")
    again = outcome(tmp_path, "evaluate.patience=2", resume=True)
    assert (again.outcome.progress.meta_step, again.params_sha256) == (3, first.params_sha256)
    assert again.evaluations == first.evaluations


def test_nan_scores_are_never_the_best(tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [math.nan, 3.0, math.inf, 2.0, math.nan, 2.5, math.nan, 2.5])
    result = outcome(tmp_path)
    assert result.outcome.best_step == 4
    assert result.state.sha256() == seen[3].sha256()
    stored = [v["mean"] for v in Progress.of(load_checkpoint(tmp_path)).validation]
    assert [v for v in stored if math.isfinite(v)] == [3.0, 2.0, 2.5, 2.5]
    assert len(stored) == 8


def load_checkpoint(tmp_path):
    from metadist.storage.checkpoints import Checkpoints

    return Checkpoints(tmp_path / "run").latest()


def test_nan_scores_use_up_patience(tmp_path, monkeypatch):
    scripted(monkeypatch, [math.nan] * 8)
    result = outcome(tmp_path, "evaluate.patience=4")
    assert result.outcome.progress.meta_step == 4
    assert result.outcome.best_step == 4, "without any score the last parameters are tested"


def test_accuracy_is_better_when_larger(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.9, 0.7, 0.6, 0.8, 0.1, 0.2, 0.3])
    (tmp_path / "upward.py").write_text("def score(p, t):\n    return -(p - t).square().flatten(1).mean(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = outcome(tmp_path, "metric={name: 'upward:score', higher_is_better: true}")
    assert result.outcome.best_step == 2
    assert result.evaluations[0].metric == "score"


def test_a_lost_best_checkpoint_falls_back_to_the_last(tmp_path, monkeypatch):
    scripted(monkeypatch, [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    real = RunCheckpoints.best

    def after_damage(*arguments):
        for payload in (tmp_path / "run/checkpoints/step-00000001").glob("*.safetensors"):
            payload.write_bytes(b"\0" * payload.stat().st_size)
        return real(*arguments)

    monkeypatch.setattr(RunCheckpoints, "best", after_damage)
    result = outcome(tmp_path)
    assert result.outcome.best_step == 8
    assert result.evaluations


def test_the_test_is_evaluated_once_at_the_end(tmp_path):
    splits = []
    result = train(
        tiny.experiment(),
        run_dir=str(tmp_path / "run"),
        plots=False,
        wrap=everywhere(lambda _, shard: splits.append((shard.split, shard.function, shard.start))),
    )
    tested = [s for s in splits if s[0] == "test"]
    assert [s[2] for s in tested] == [0, 2, 4, 6]
    assert splits[-4:] == tested
    assert {s[1] for s in splits if s[0] == "train"} == {"gradient"}
    assert result.evaluations[0].tasks == 8


def test_the_protocol_names_what_a_score_must_be_read_with(tmp_path, whole):
    protocol = whole.evaluations[0].protocol
    assert set(protocol) >= {
        "split",
        "seed",
        "tasks",
        "normalization",
        "inner_steps",
        "family",
        "k_shot",
        "query_shots",
        "task_list_sha256",
    }
    assert (protocol["split"], protocol["seed"], protocol["tasks"], protocol["inner_steps"]) == ("test", 3, 8, 2)
    again = evaluate_run(whole.run_dir).evaluations[0]
    assert again == whole.evaluations[0]
    assert (
        json.loads((tmp_path / "whole/evaluation.json").read_text())[0]["protocol"]["task_list_sha256"]
        == protocol["task_list_sha256"]
    )
    hashes = [
        evaluate_run(whole.run_dir, EvaluationOptions(**change)).evaluations[0].protocol["task_list_sha256"]
        for change in ({}, {"inner_steps": 1}, {"tasks": 7}, {"split": "validation"}, {"split": "train"})
    ]
    assert hashes[0] == hashes[1], "the same tasks, adapted to less long"
    assert len(set(hashes)) == 4


def test_another_family_or_seed_has_another_task_list():
    def task_list(*change):
        experiment = tiny.experiment(*change)
        learner, state = experiment.learner, experiment.learner.initial(0)
        fleet = Scheduler(LocalExecutor(learner), learner)
        request = EvaluationRequest(MetaStepKey("x", 0, experiment.seed), "test", 4, 1)
        judged = evaluate(fleet, learner, state, request)
        return judged.protocol["task_list_sha256"]

    others = ("seed=4",), ("tasks.k_shot=5",), ("tasks.amplitude=[1, 2]",)
    assert len({task_list(), *(task_list(*change) for change in others)}) == 4
    assert task_list("outer.lr=0.5") == task_list("model.hidden=[3]") == task_list()


@pytest.mark.parametrize("shard_size", [1, 3, 8])
def test_shards_do_not_change_the_evaluation(tmp_path, whole, shard_size):
    learner = dataclasses.replace(
        whole.experiment.learner, outer=dataclasses.replace(whole.experiment.learner.outer, shard_size=shard_size)
    )
    fleet = Scheduler(LocalExecutor(learner), learner)
    judged = evaluate(fleet, learner, whole.state, EvaluationRequest(MetaStepKey("x", 9, 3), "test", 8, 2))
    assert judged.protocol == whole.evaluations[0].protocol
    assert judged.mean == pytest.approx(whole.evaluations[0].mean, rel=1e-5)


# Statistics -----------------------------------------------------------------------------------------------------------


def records(losses):
    from metadist.core.state import Records

    loss = torch.tensor(losses, dtype=torch.float64)
    return Records({"task": torch.arange(len(losses)), "loss": loss, "mse": loss.clone()})


def judged(losses):
    return tiny.learner().summarise(EvaluationRequest(MetaStepKey("x", 0, 0), "test", len(losses), 1), records(losses))


def test_means_intervals_and_medians():
    result = judged([[1.0, 0.5], [2.0, 0.1], [3.0, 4.0], [6.0, 0.0]])
    assert result.mean == pytest.approx([3.0, 1.15])
    assert result.ci95[0] == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    assert result.median[0] == pytest.approx(2.5)
    assert result.divergence_rate == 0.25


def test_tasks_that_diverge_are_counted_and_left_out():
    result = judged([[1.0, 0.5], [2.0, math.inf], [3.0, math.nan], [math.nan, 0.0]])
    assert result.mean == [1.0, 0.5]
    assert (result.divergence_rate, result.loss_rose) == (0.0, 0)
    assert (result.tasks, result.left_out, result.left_out_note) == (4, 3, "3 of 4 left out: not finite")
    assert result.as_dict()["ci95"] == [None, None]
    everything = judged([[1.0, math.nan], [math.inf, 1.0]])
    assert math.isnan(everything.divergence_rate) and everything.left_out == 2
    assert math.isnan(everything.mean[1])
    json.dumps(everything.as_dict(), allow_nan=False)


def test_a_curve_is_thinned_and_stays_in_order():
    progress = Progress(0, None)
    for meta_step in range(1, 2001):
        progress = dataclasses.replace(progress, meta_step=meta_step).logged({})
    assert [p["meta_step"] for p in progress.curve] == list(range(1, 2001))
    thinned = dataclasses.replace(progress, meta_step=2001).logged({}).curve
    assert [p["meta_step"] for p in thinned] == list(range(2, 2001, 2))


def test_a_failing_folder_is_an_error_that_names_it(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MetadistError, match=r"run_dir '.*': config.yaml can't be written: .*No space left"):
        train(tiny.experiment(), run_dir=str(tmp_path / "run"), plots=False)
