"""The Python interface: import, train, adapt, predict, export, load."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import metadist
from metadist import MAML, EvaluateSettings, Examples, OuterLoop, Sinusoid, Task, TaskFamily


class Lines(TaskFamily):
    """y = a x with a ~ N(0, 1)."""

    input_shape = (1,)

    def sample_task(self, key: metadist.TaskKey, split: str) -> Task:
        generator = key.generator()
        slope, x = torch.randn(1, generator=generator), torch.randn(20, 1, generator=generator)
        return Task(Examples(x[:10], slope * x[:10]), Examples(x[10:], slope * x[10:]))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def parts(**changes: object) -> dict[str, object]:
    short = EvaluateSettings(every=100, tasks=32, test_tasks=64)
    outer = OuterLoop(meta_batch_size=16, meta_steps=200, lr=5e-3)
    return {
        "tasks": Lines(),
        "model": network,
        "algorithm": MAML(inner_lr=0.1),
        "outer": outer,
        "evaluate": short,
        "tracking": "none",
        **changes,
    }


@pytest.mark.lane("services")
def test_import_is_light() -> None:
    program = "import metadist, sys; print([m for m in ('torch', 'ray', 'mlflow', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in metadist.__all__:
        assert getattr(metadist, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'maml'"):
        metadist.maml  # noqa: B018


def named_types(function: object) -> set[type]:
    """The classes of metadist in the signature of a function, inside unions and generics too."""
    found, left = set(), list(typing.get_type_hints(function).values())
    while left:
        hint = left.pop()
        left += typing.get_args(hint)
        if inspect.isclass(hint) and hint.__module__.startswith("metadist."):
            found.add(hint)
    return found


@pytest.mark.parametrize(
    "base",
    [
        "Algorithm",
        "InnerLoop",
        "Descent",
        "TaskFamily",
        "MetaEnvironment",
        "TrialAlgorithm",
        "TaskContext",
        "TrialContext",
    ],
)
def test_what_an_own_class_must_name_is_public(base: str) -> None:
    cls = getattr(metadist, base)
    methods = [m for n, m in inspect.getmembers(cls, inspect.isfunction) if not n.startswith("_")]
    needed = set().union(*map(named_types, [cls, *methods]))
    public = {getattr(metadist, name) for name in metadist.__all__}
    assert {c.__name__ for c in needed - public if not c.__name__.startswith("_")} == set()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> metadist.experiment.result.Result:
    return metadist.train(run_dir=str(tmp_path_factory.mktemp("api") / "run"), **parts())


@pytest.mark.lane("numerics")
def test_adapts_to_a_new_line(trained: metadist.experiment.result.Result) -> None:
    x = torch.linspace(-1, 1, 10).unsqueeze(1)
    for slope in (-1.5, 1.0):
        predicted = trained.predict(trained.adapt(x, slope * x, inner_steps=10), torch.tensor([[0.5]]))
        assert abs(float(predicted) - slope * 0.5) < 0.3
    before, after = trained.evaluations[0].mean[0], trained.evaluations[0].mean[-1]
    assert after < before / 2


@pytest.mark.lane("numerics")
def test_loads_what_was_trained(trained: metadist.experiment.result.Result) -> None:
    loaded = metadist.load(trained.run_dir, trust=[__name__])
    assert loaded.state.sha256() == trained.state.sha256()
    again = metadist.load(trained.run_dir, metadist.api.compose(**parts()))
    x = torch.linspace(-1, 1, 10).unsqueeze(1)
    predictions = [r.predict(r.adapt(x, 2 * x), x) for r in (trained, loaded, again)]
    assert torch.equal(predictions[0], predictions[1])
    assert torch.equal(predictions[0], predictions[2])


@pytest.mark.lane("numerics")
def test_exports_under_the_models_own_names(trained: metadist.experiment.result.Result, tmp_path: Path) -> None:
    trained.export(tmp_path / "model.safetensors")
    module = network()
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    x = torch.linspace(-1, 1, 10).unsqueeze(1)
    unadapted = trained.adapt(x, x, inner_steps=0)
    assert torch.allclose(module(x), trained.predict(unadapted, x))


@pytest.mark.lane("numerics")
def test_starts_from_a_module_or_an_earlier_run(trained: metadist.experiment.result.Result, tmp_path: Path) -> None:
    module = network()
    started = metadist.compose(**parts(model=module)).learner.initial(0)
    assert torch.equal(started.slots["model"], torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    frozen = metadist.compose(**parts(model=module, freeze=("0.*",)))
    assert set(frozen.learner.slots) == {"model", "frozen"}
    goes_on = metadist.train(
        run_dir=str(tmp_path / "on"), **parts(init_from=trained.run_dir, outer=OuterLoop(meta_steps=1, lr=0.0))
    )
    assert goes_on.params_sha256 == trained.state.sha256()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(metadist.MetadistError, match="TaskFamily"):
        metadist.compose(**parts(tasks=network))
    with pytest.raises(metadist.MetadistError, match="prototypes are class means"):
        metadist.compose(**parts(tasks=Sinusoid(), algorithm=metadist.ProtoNet()))
