"""An experiment from beginning to end: fleet, tracker, checkpoints, loop, test score, plots. Used by the command line and from Python."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import metadist
from metadist import config as configuration
from metadist import run_page
from metadist.comparison import Regret, paired
from metadist.config import CheckpointSettings, Config, ControlSettings, EngineSettings, EvaluateSettings, OutsideSettings, TrackingSettings
from metadist.core.check import check
from metadist.core.errors import CheckpointError, ConfigError
from metadist.core.executor import Shard
from metadist.core.learner import Learner
from metadist.core.state import State
from metadist.core.task import Examples
from metadist.core.trial_learner import TrialLearner
from metadist.exporting import exporting
from metadist.fleet import fleet, planner_for
from metadist.run_folder import RunFolder, new_run_id, newest_run, runs_root
from metadist.runtime.board import Board
from metadist.runtime.checkpoint import Checkpoints, export_parameters, load_parameters
from metadist.runtime.evaluation import Evaluation, TrialEvaluation, as_json, evaluate
from metadist.runtime.groups import WorkerGroup
from metadist.runtime.plan import as_it_is, obey
from metadist.runtime.scheduler import Scheduler
from metadist.runtime.train import Display, Outcome, Progress, Run, evaluation_metrics, meta_train
from metadist.schema import flatten, parse_yaml
from metadist.steered import checked, claimed, served, steering_of

log = logging.getLogger(__name__)

#: what may differ between a run and its resumption: nothing of it enters θ
FREE_ON_RESUME = (
    "workers", "outside", "tracking", "control", "checkpoint", "evaluate", "engine.exact", "engine.shard_timeout", "engine.worker_patience",
)  # fmt: skip


#: in an exported file: the names of what isn't the model's
BEYOND = "slots/"


@dataclass(frozen=True)
class Experiment:
    """A learner and everything around it. From YAML by ``Experiment.of(config)``, or made in Python."""

    name: str
    seed: int
    learner: Learner | TrialLearner
    evaluate: EvaluateSettings = EvaluateSettings()
    workers: tuple[WorkerGroup, ...] = (WorkerGroup(max=0, min=0),)
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    control: ControlSettings = ControlSettings()
    outside: OutsideSettings = OutsideSettings()
    init_from: str | None = None
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config) -> Experiment:
        return cls(
            config.name, config.seed, config.learner(), config.evaluate, config.workers, config.engine, config.checkpoint,
            config.tracking, config.control, config.outside, config.init_from, configuration.resolved(config),
        )  # fmt: skip


@dataclass(frozen=True)
class Adapted:
    """φ and the support set that it was adapted to."""

    phi: Any
    support: Examples


@dataclass
class Result:
    """A trained (or loaded) meta-learner: scores, and ``adapt`` / ``predict`` on new support sets."""

    run_id: str
    run_dir: str
    experiment: Experiment
    outcome: Outcome
    evaluations: list[Evaluation]
    params_sha256: str
    retried: dict[str, int]
    wall_seconds: float
    undelivered: int = 0
    #: who computed other bits than the run began with, where it may not be exact
    inexact: list[str] = field(default_factory=list)
    tracking_url: str | None = None

    @property
    def state(self) -> State:
        """The parameters that validated best."""
        return self.outcome.best

    def adapt(self, x: Tensor, y: Tensor, inner_steps: int | None = None) -> Adapted:
        """Adapt to a support set x [N, …], y [N, …]; hand the result to ``predict``."""
        learner = self._supervised("adapt")
        dtype = learner.model.dtype
        support = Examples(x.to(dtype), y.to(dtype) if y.is_floating_point() else y)
        return Adapted(learner.adapt(self.state, support, inner_steps), support)

    def predict(self, adapted: Adapted, x: Tensor) -> Tensor:
        """Predictions for x [N, …]: logits or values [N, …]."""
        learner = self._supervised("predict")
        return learner.predict(self.state, adapted.phi, x.to(learner.model.dtype), adapted.support)

    def _supervised(self, method: str) -> Learner:
        learner = self.experiment.learner
        if not isinstance(learner, Learner):
            raise ConfigError(f"{method}: {type(learner.tasks).__name__} is a meta-environment; its policy adapts by acting (evaluate)")
        return learner

    def export(self, path: str | Path) -> None:
        """The model's parameters under their own names, as one safetensors file; beside them what else the algorithm learned
        (Meta-SGD's rates), and the config in the metadata, so that the file can be served."""
        learner = self.experiment.learner
        beyond = {
            f"{BEYOND}{slot}/{name}": tensor
            for slot in learner.algorithm.slots(learner.model, learner.model.initial(0)[0])
            for name, tensor in self.state.theta(learner.slots)[slot].items()
        }
        metadata = {"run_id": self.run_id, "format": "metadist", "config": json.dumps(self.experiment.document)}
        export_parameters(path, {**learner.parameters(self.state), **beyond}, metadata)

    def as_dict(self) -> dict[str, Any]:
        about = {
            "run_id": self.run_id,
            "run_dir": self.run_dir,
            "meta_step": self.outcome.progress.meta_step,
            "best_meta_step": self.outcome.best_step,
            "params_sha256": self.params_sha256,
            "tasks_per_second": round(self.outcome.tasks_per_second, 2),
            "evaluation": self.evaluations[-1].as_dict() if self.evaluations else None,
            "validation": self.outcome.progress.validation[-1:],
            "shards_retried": self.retried,
            "stopped": self.outcome.stopped,
            "inexact": self.inexact,
            "wall_seconds": round(self.wall_seconds, 2),
            "undelivered": self.undelivered,
            "tracking_url": self.tracking_url,
        }
        return as_json(about)


class Quiet:
    """A display that shows nothing."""

    def step(self, meta_step: int, report: Mapping[str, float], tasks_per_second: float) -> None: ...

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None: ...

    def note(self, message: str) -> None: ...


# The main job ---------------------------------------------------------------------------------------------------------


def train(
    experiment: Experiment,
    *,
    run_dir: str | None = None,
    resume: bool = False,
    display: Display | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Scheduler, Shard], None] | None = None,
    parent: str | None = None,
    test: bool = True,
    plots: bool = True,
    run_id: str | None = None,
) -> Result:
    """Meta-train, test once, and record everything under ``run_dir`` (default: a new folder under ``METADIST_RUNS``)."""
    began = time.perf_counter()
    display = display or Quiet()
    learner = experiment.learner
    checked(experiment.control)
    if resume and run_dir is None:
        run_dir = newest_run(experiment.name)
    run_id = run_id or new_run_id(experiment.name)
    folder = RunFolder(run_dir or f"{runs_root()}/{run_id}")
    checkpoints = Checkpoints(folder.url, keep=experiment.checkpoint.keep, higher_is_better=learner.tasks.higher_is_better)
    learner.prepare(torch.device("cpu"))
    check(learner, experiment.seed)  # before the folder is claimed: a mistake in the config leaves nothing behind
    with claimed(folder):
        run_id = _open(folder, experiment, run_id, resume)
        result = _train(experiment, folder, checkpoints, run_id, display, stop, watch, parent, test, plots)
    result.wall_seconds = time.perf_counter() - began
    return result


def _train(
    experiment: Experiment, folder: RunFolder, checkpoints: Checkpoints, run_id: str, display: Display, stop: Callable[[], bool],
    watch: Callable[[Scheduler, Shard], None] | None, parent: str | None, test: bool, plots: bool,
) -> Result:  # fmt: skip
    """``train`` in a folder that is this process's."""
    began, learner = time.perf_counter(), experiment.learner
    earlier = checkpoints.latest(learner.slots)
    progress = Progress.of(earlier) if earlier else Progress(0, learner.initial(experiment.seed, _initial(experiment)))
    expected = _checked_manifest(experiment, earlier.manifest) if earlier else None
    _refuse_other_config(folder, experiment, progress.meta_step)
    tracker = _start_tracker(experiment, folder, run_id, parent, earlier.manifest.get("mlflow_run_id") if earlier else None)
    status, result = "FAILED", None
    try:
        run_page.record(folder, None)
        planner = obey(earlier.manifest.get("engine", {})) if earlier else planner_for(experiment)
        board = Board(display)
        inexact = list(earlier.manifest.get("inexact", ())) if earlier else []

        def mark(other: str) -> None:
            if other not in inexact:
                inexact.append(other)
                board.note(f"the run is inexact from now on: {other}")
                tracker.tags({"metadist.inexact": "; ".join(inexact)})

        steering = steering_of(experiment, folder, run_id, earlier, board, tracker, stop)
        with (
            served(steering, board, experiment.control, folder, run_id),
            fleet(experiment, run_id, planner, expected=expected, watch=watch, folder=folder, note=board.note, mark=mark) as workers,
        ):
            # The list itself: what joins later stands in the checkpoints from then on.
            run = _run(experiment, run_id, {**_facts(experiment, workers), "inexact": inexact})
            if progress.meta_step:
                board.note(f"resumed at meta-step {progress.meta_step}")
            watched = exporting(tracker, experiment.workers, run_id)
            outcome = meta_train(run, progress, workers, watched, checkpoints, board, steering)
            evaluations = []
            if test and outcome.stopped != "interrupted":
                evaluations = [_test(experiment, run_id, workers, outcome)]
                watched.metrics(progress.meta_step, {**evaluation_metrics(evaluations[0]), **run.beside(evaluations[0])})
            retried, workers.ended = dict(workers.retried), outcome.stopped or ""
        learner.prepare(torch.device("cpu"))  # an executor in this process may have moved it to a GPU
        ended = "KILLED" if outcome.stopped == "interrupted" else "FINISHED"
        result = Result(
            run_id, folder.url, experiment, outcome, evaluations, progress.state.sha256(), retried, time.perf_counter() - began,
            inexact=inexact,
        )  # fmt: skip
        _record(folder, result, tracker, finished=ended == "FINISHED", plots=plots)
        status = ended
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        left = tracker.finish(status, timeout=60.0 if status == "FINISHED" else 10.0)
        run_page.record(folder, tracker.url())
    result.undelivered, result.tracking_url = left, tracker.url()
    return result


def _run(experiment: Experiment, run_id: str, manifest: dict[str, Any]) -> Run:
    e = experiment
    return Run(
        run_id, e.seed, e.learner, e.evaluate.every, e.evaluate.tasks, e.evaluate.inner_steps, e.evaluate.patience,
        e.checkpoint.every, e.tracking.log_every, manifest, Regret(e.learner, e.seed),
    )  # fmt: skip


def _open(folder: RunFolder, experiment: Experiment, run_id: str, resume: bool) -> str:
    """Claim the folder for a new run, or find out whose it is; returns the run id."""
    about = folder.read_json("run.json")
    if about is not None:
        if not resume:
            raise ConfigError(f"run_dir '{folder.url}' holds a run already; go on with it by --resume, or choose another --run-dir")
        return about["run_id"]
    if folder.read("group.json") is not None:
        raise ConfigError(f"run_dir '{folder.url}' holds a group of seeds; go on with it by --seeds, or choose another --run-dir")
    if resume:
        log.warning("run_dir %s holds no run yet; a new one starts", folder.url)
    folder.write("config.yaml", yaml.safe_dump(experiment.document, sort_keys=False, allow_unicode=True))
    folder.write("run.json", json.dumps({"run_id": run_id, "name": experiment.name, "created": time.time()}))
    return run_id


def _initial(experiment: Experiment) -> Mapping[str, Tensor] | None:
    """Parameters to begin with: a safetensors file, or an earlier run's best."""
    source = experiment.init_from
    if source is None:
        return None
    if source.endswith(".safetensors"):
        return {name: tensor for name, tensor in load_parameters(source).items() if not name.startswith(BEYOND)}
    folder = RunFolder(source)
    if folder.read("run.json") is None:
        raise ConfigError(f"init_from: '{source}' is neither a .safetensors file nor a run directory")
    earlier = load_run(source)
    return earlier.experiment.learner.parameters(earlier.state)


def _refuse_other_config(folder: RunFolder, experiment: Experiment, meta_step: int) -> None:
    """A resumed run must be the run that was begun, in everything that enters θ."""
    text = folder.read("config.yaml")
    before = flatten(parse_yaml(text or "{}", "config.yaml") or {})
    now = flatten(experiment.document)
    if meta_step:
        longer = experiment.learner.outer.schedule == "constant"
        for key in sorted(before.keys() | now.keys()):
            free = key.startswith(FREE_ON_RESUME) or (key == "outer.meta_steps" and longer)
            if not free and before.get(key) != now.get(key):
                raise ConfigError(
                    f"--resume: {key} is {now.get(key)!r}, the run began with {before.get(key)!r}; only "
                    f"{', '.join(FREE_ON_RESUME)} (and outer.meta_steps of a constant schedule) may change"
                )
    folder.write("config.yaml", yaml.safe_dump(experiment.document, sort_keys=False, allow_unicode=True))


def _checked_manifest(experiment: Experiment, manifest: dict[str, Any]) -> dict[str, Any]:
    """The numerics fingerprint that the run began with, after a look at seed and data."""
    if manifest["seed"] != experiment.seed:
        raise CheckpointError(f"--resume: the run's seed is {manifest['seed']}, not {experiment.seed}")
    data = getattr(experiment.learner.tasks, "data_sha256", None)
    if manifest["data_sha256"] != data:
        raise CheckpointError(f"--resume: the run began on other data (sha256 {manifest['data_sha256']}, here {data})")
    return manifest["fingerprint"]


def _facts(experiment: Experiment, workers: Scheduler) -> dict[str, Any]:
    first = next(iter(workers.executor.workers().values()))
    return {
        "config": experiment.document,
        "fingerprint": first["fingerprint"],
        "engine": dataclasses.asdict(workers.executor.plan.engine),
        "data_sha256": getattr(experiment.learner.tasks, "data_sha256", None),
        "versions": {"metadist": metadist.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _start_tracker(experiment: Experiment, folder: RunFolder, run_id: str, parent: str | None, mlflow_run_id: str | None) -> Any:
    from metadist import tracking

    settings = experiment.tracking
    tracker = tracking.make_tracker(
        settings.uri, spool=folder.scratch / "tracking", experiment=settings.experiment, runs_root=tracking_root(folder)
    )
    tags = {
        "metadist.run_id": run_id,
        "metadist.run_dir": folder.url,
        "metadist.version": metadist.__version__,
        "git.revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": platform.node(),
        "platform": platform.platform(),
        **run_page.tags(),
    }
    tracker.start(
        run_id=run_id, name=folder.url.rsplit("/", 1)[-1], params=flatten(experiment.document),
        tags={k: v for k, v in tags.items() if v}, parent=parent, mlflow_run_id=mlflow_run_id,
    )  # fmt: skip
    if folder.local and (Path(folder.url) / "config.yaml").is_file():
        tracker.artifact(Path(folder.url) / "config.yaml")
    return tracker


def tracking_root(folder: RunFolder) -> Path:
    """Where the default SQLite store lies: METADIST_RUNS, or a local folder where that is remote."""
    return folder.scratch.parent if "://" in runs_root() else Path(runs_root()).resolve()


def _git_revision() -> str:
    """Of the working directory, else of metadist's own checkout, else nothing."""
    for folder in (Path.cwd(), Path(__file__).parent):
        try:
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
    return ""


def _test(experiment: Experiment, run_id: str, workers: Scheduler, outcome: Outcome) -> Evaluation:
    settings = experiment.evaluate
    return evaluate(
        workers, experiment.learner, outcome.best, run=run_id, meta_step=outcome.best_step, seed=experiment.seed,
        split="test", tasks=settings.test_tasks, inner_steps=settings.inner_steps,
    )  # fmt: skip


def _record(folder: RunFolder, result: Result, tracker: Any, *, finished: bool, plots: bool) -> None:
    """The model and the scores, and of a finished run the registered model and the plots, in the run's folder and as MLflow artifacts."""
    result.export(f"{folder.url}/model.safetensors")
    folder.write("result.json", json.dumps(result.as_dict(), indent=1))
    if folder.local:
        tracker.artifact(Path(folder.url) / "model.safetensors")
    if result.evaluations:
        folder.write("evaluation.json", json.dumps([e.as_dict() for e in result.evaluations], indent=1))
    if finished and result.experiment.tracking.register:
        from metadist.registered import log_models

        log_models(tracker, folder, result, result.experiment.tracking.register)
    if not (finished and plots):
        return
    from metadist.pictures import draw

    for path in draw(result, folder.scratch / "plots"):
        tracker.artifact(path, "plots")
        folder.upload(path, f"plots/{path.name}")


# Afterwards -----------------------------------------------------------------------------------------------------------


def load_run(run_dir: str, experiment: Experiment | None = None) -> Result:
    """A run's best parameters, ready to ``adapt`` and ``predict``; built from the run's own config unless ``experiment`` is given."""
    folder = RunFolder(run_dir)
    text, about = folder.read("config.yaml"), folder.read_json("run.json")
    if text is None or about is None:
        raise ConfigError(f"run directory '{run_dir}' has no config.yaml and run.json; is it the folder that train printed?")
    if experiment is None:
        experiment = Experiment.of(configuration.build(parse_yaml(text, f"{run_dir}/config.yaml")))
    learner = experiment.learner
    checkpoints = Checkpoints(folder.url, higher_is_better=learner.tasks.higher_is_better)
    loaded = checkpoints.best(learner.slots) or checkpoints.latest(learner.slots)
    if loaded is None:
        raise CheckpointError(f"run directory '{run_dir}' has no checkpoint yet")
    outcome = Outcome(Progress.of(loaded), loaded.state, loaded.meta_step, 0.0)
    return Result(about["run_id"], folder.url, experiment, outcome, [], loaded.state.sha256(), {}, 0.0)


def evaluate_run(
    run_dir: str, *, tasks: int | None = None, split: str = "test", inner_steps: int | None = None, workers: str | None = None,
    normalization: str | None = None, beside: Sequence[str] = (),
) -> Result:  # fmt: skip
    """Judge a run's best parameters again, on as many tasks and steps as wanted, ``beside`` known methods on the same trials."""
    loaded = load_run(run_dir)
    experiment = loaded.experiment
    if workers is not None:
        groups = configuration.set_workers(experiment.document, workers)
        experiment = dataclasses.replace(experiment, workers=configuration.build(groups).workers)
    mine = tuple(g for g in experiment.workers if not g.outside) or (WorkerGroup(min=0, max=0),)
    experiment = dataclasses.replace(experiment, workers=mine)  # nobody waits outside for an evaluation
    settings = experiment.evaluate
    learner = experiment.learner
    if normalization is not None:
        if not isinstance(learner, Learner):
            raise ConfigError(f"--normalization: {type(learner.tasks).__name__} is a meta-environment; it goes with supervised tasks")
        learner.normalization = normalization
    if beside and not isinstance(learner, TrialLearner):
        raise ConfigError(f"--beside: {type(learner.tasks).__name__} is no meta-environment; there are no known methods to compare with")
    learner.prepare(torch.device("cpu"))
    steps = settings.inner_steps if inner_steps is None else inner_steps
    began = time.perf_counter()
    with fleet(experiment, loaded.run_id, as_it_is) as fleet_:
        judged = evaluate(
            fleet_, learner, loaded.state, run=loaded.run_id, meta_step=loaded.outcome.best_step, seed=experiment.seed, split=split,
            tasks=tasks or settings.test_tasks, inner_steps=steps,
        )  # fmt: skip
    if beside:
        assert isinstance(judged, TrialEvaluation)
        assert isinstance(learner, TrialLearner)
        judged = dataclasses.replace(judged, beside=paired(judged, learner.tasks, beside, seed=experiment.seed))
    learner.prepare(torch.device("cpu"))
    return dataclasses.replace(loaded, experiment=experiment, evaluations=[judged], wall_seconds=time.perf_counter() - began)
