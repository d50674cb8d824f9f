"""Averaged weights in a run: resumed exactly, judged, exported, registered and served in place of the trained ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import train

from metadist.core.errors import ConfigError
from metadist.core.round import EvaluationRequest, MetaStepKey
from metadist.core.state import State
from metadist.experiment.load import load_run
from metadist.experiment.registration import _about
from metadist.serving.load import open_model
from metadist.storage.checkpoints import Checkpoints, exported_metadata, load_parameters

OUTER = {
    "ema": ("outer.ema=0.7",),
    "tail": ("outer.tail=0.7", "outer.schedule=linear", "outer.warmup=2"),
    "schedule_free": ("outer.optimizer=schedule_free", "outer.clip_value=0.1"),
    "muon": ("outer.optimizer=muon", "outer.ema=0.7", "model.hidden=[6,6]"),
    "slots": (
        "algorithm={name: meta_sgd}",
        "outer.optimizers={model: {optimizer: schedule_free, lr: 0.02}, inner_lr: {optimizer: sgd, momentum: 0.9}}",
    ),
}
X = torch.linspace(-2, 2, 10).unsqueeze(1)


def stopped_after(steps):
    calls = itertools.count()
    return lambda: next(calls) >= steps


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("name", OUTER)
def test_an_interrupted_run_goes_on_to_the_same_bits_averages_included(tmp_path, name):
    experiment = tiny.experiment(*OUTER[name])
    whole = train(experiment, run_dir=str(tmp_path / "whole"), plots=False)
    half = train(experiment, run_dir=str(tmp_path / "run"), stop=stopped_after(3), plots=False)
    assert half.outcome.progress.meta_step == 3 and half.averaged_sha256 != whole.averaged_sha256
    done = train(experiment, run_dir=str(tmp_path / "run"), resume=True, plots=False)
    assert (done.params_sha256, done.averaged_sha256) == (whole.params_sha256, whole.averaged_sha256)
    assert done.averaged_sha256 not in (None, done.params_sha256)
    assert done.evaluations == whole.evaluations
    assert done.outcome.progress.validation == whole.outcome.progress.validation
    assert done.outcome.progress.curve == whole.outcome.progress.curve


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an exponential average, whose last validation is its best."""
    folder = str(tmp_path_factory.mktemp("averages") / "run")
    return train(tiny.experiment("outer.ema=0.5", "evaluate.every=100"), run_dir=folder, plots=False)


def by_hand(result, state):
    """The score on the test tasks of the slots of ``state``."""
    learner = result.experiment.learner
    request = EvaluationRequest(MetaStepKey(result.run_id, 6, 3), "test", 8, 2)
    shards = learner.evaluation(request, state).shards
    parts = [learner.compute(shard, state.slots) for shard in shards]
    return learner.summarise(request, parts[0].concatenate(parts)).mean


def test_scores_are_of_the_averages_and_training_is_not_touched(run, tmp_path):
    last = run.outcome.progress.state
    averages = State({"model": last.outer["model/average"]})
    assert run.averaged_sha256 == averages.sha256() and run.weights == "averaged"
    assert run.evaluations[0].mean == by_hand(run, averages) != by_hand(run, last.trained())
    plain = train(tiny.experiment("evaluate.every=100"), run_dir=str(tmp_path / "plain"), plots=False)
    assert plain.params_sha256 == run.params_sha256 and plain.averaged_sha256 is None
    validated, other = (r.outcome.progress.validation[-1]["mean"] for r in (run, plain))
    assert validated != other


def test_both_can_be_judged_again_and_the_record_says_which(run):
    for weights, state in {"trained": run.outcome.best.trained(), "averaged": run.outcome.best.judged()}.items():
        judged = run.judged(run_options(weights))
        assert judged.evaluations[0].mean == by_hand(run, state)
        record = json.loads((Path(judged.evaluation_dir) / "evaluation.json").read_text())
        assert (record["weights"], record["params_sha256"]) == (weights, state.sha256())
    assert run.evaluate(record=False).mean == by_hand(run, run.state)
    with pytest.raises(ConfigError, match="'mean' is not one of trained, averaged"):
        run.evaluate(weights="mean")


def run_options(weights):
    from metadist.experiment.judging import EvaluationOptions

    return EvaluationOptions(workers="0", weights=weights)


def test_a_checkpoint_holds_both_and_its_manifest_says_which_is_judged(run):
    loaded = Checkpoints(run.run_dir).latest(run.experiment.learner.slots)
    assert loaded.state.sha256() == run.params_sha256
    assert loaded.state.judged().sha256() == run.averaged_sha256
    assert loaded.manifest["weights"] == "averaged"
    about = json.loads((Path(run.run_dir) / "result.json").read_text())
    assert (about["weights"], about["averaged_sha256"]) == ("averaged", run.averaged_sha256)


def test_an_export_says_which_weights_it_holds(run, tmp_path):
    learner, last = run.experiment.learner, run.outcome.progress.state
    for weights, state in ((None, last.judged()), ("averaged", last.judged()), ("trained", last.trained())):
        path = str(tmp_path / f"{weights}.safetensors")
        run.export(path, weights)
        assert exported_metadata(path)["weights"] == (weights or "averaged")
        assert all(t.equal(learner.parameters(state)[n]) for n, t in load_parameters(path).items())
        served = open_model(path)
        assert (served.weights, served.params_sha256) == (weights or "averaged", state.sha256())
    assert exported_metadata(f"{run.run_dir}/model.safetensors")["weights"] == "averaged"


def test_a_loaded_run_adapts_serves_and_registers_the_averages(run):
    loaded = load_run(run.run_dir)
    assert loaded.state.sha256() == run.averaged_sha256 and loaded.outcome.best.sha256() == run.params_sha256
    learner, support = loaded.experiment.learner, loaded.adapt(X, torch.sin(X)).support
    expected = learner.predict(run.state, learner.adapt(run.state, support), X, support)
    assert loaded.predict(loaded.adapt(X, torch.sin(X)), X).equal(expected)
    trained = run.outcome.best.trained()
    assert not expected.equal(learner.predict(trained, learner.adapt(trained, support), X, support))
    served = open_model(run.run_dir)
    assert (served.weights, served.params_sha256) == ("averaged", run.averaged_sha256)
    assert _about(loaded, 6)["weights"] == "averaged"


def test_another_run_starts_from_the_averages(run, tmp_path):
    other = tiny.experiment(f"init_from={run.run_dir}", "outer.lr=0", "outer.meta_steps=1")
    assert train(other, run_dir=str(tmp_path / "run"), plots=False).params_sha256 == run.averaged_sha256


def test_a_run_without_averages_has_none_to_judge_or_export(tmp_path):
    plain = train(tiny.experiment("outer.meta_steps=1"), run_dir=str(tmp_path / "run"), plots=False)
    assert plain.weights == "trained"
    for ask in (lambda: plain.evaluate(weights="averaged"), lambda: plain.export(tmp_path / "x", "averaged")):
        with pytest.raises(ConfigError, match="has no averages; it needs outer.ema, outer.tail or optimizer"):
            ask()
    assert plain.evaluate(weights="trained", record=False).mean == plain.evaluations[0].mean
    assert exported_metadata(f"{plain.run_dir}/model.safetensors")["weights"] == "trained"


def test_settings_without_an_effect_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="outer.final_lr: 0.1 has no effect with schedule: constant"):
        train(tiny.experiment("outer.final_lr=0.1"), run_dir=str(tmp_path / "run"), plots=False)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["outer.optimizers.modle={lr: 0.1}"],
            "outer.optimizers.modle: slot 'modle' is not in this experiment",
        ),
        (["outer.optimizers.model={lrr: 0.1}"], "unknown key 'outer.optimizers.model.lrr'; did you mean 'lr'"),
        (["outer.optimizers.model={lr: fast}"], "outer.optimizers.model.lr: 'fast' is not allowed; expected a number"),
        (["outer.optimizers=adam"], "outer.optimizers: expected keys and values, the names of sections, got 'adam'"),
        (["outer.optimizers.model=adam"], "outer.optimizers.model: expected keys and values (optimizer, lr"),
    ],
)
def test_mistakes_in_the_optimiser_of_a_slot_are_named(overrides, message):
    with pytest.raises(ConfigError) as refused:
        tiny.experiment(*overrides).learner  # noqa: B018
    assert message in str(refused.value)


def test_the_optimisers_of_slots_are_keys_of_a_config():
    experiment = tiny.experiment(
        "outer.optimizers={model: {optimizer: muon, betas: [0.9, 0.95]}}", "model.hidden=[4,4]"
    )
    assert experiment.outer.optimizers["model"].betas == (0.9, 0.95)
    again = tiny.build(experiment.document)
    assert again.outer == experiment.outer and again.document == experiment.document
    assert experiment.document["outer"]["optimizers"]["model"]["optimizer"] == "muon"


@pytest.mark.lane("numerics")
def test_a_run_with_an_average_over_its_tail_cannot_become_longer(tmp_path):
    train(tiny.experiment("outer.tail=0.5"), run_dir=str(tmp_path / "run"), stop=stopped_after(2), plots=False)
    with pytest.raises(ConfigError, match="outer.meta_steps is 8"):
        train(tiny.experiment("outer.tail=0.5", "outer.meta_steps=8"), run_dir=str(tmp_path / "run"), resume=True)
    train(tiny.experiment("outer.ema=0.5"), run_dir=str(tmp_path / "other"), stop=stopped_after(2), plots=False)
    longer = tiny.experiment("outer.ema=0.5", "outer.meta_steps=8")
    assert train(longer, run_dir=str(tmp_path / "other"), resume=True, plots=False).outcome.progress.meta_step == 8
