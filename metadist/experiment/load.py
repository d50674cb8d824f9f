"""Load the best parameters of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from metadist.config.build import build_foreign
from metadist.config.experiment import Experiment
from metadist.config.schema import parse_document
from metadist.core.errors import CheckpointError, ConfigError
from metadist.experiment.attempt import edited_modules
from metadist.experiment.result import SLOTS, Result, signature_of
from metadist.storage.checkpoints import Checkpoints, load_parameters
from metadist.storage.run_directory import RunDirectory
from metadist.storage.torch_files import TORCH_FILES, load_torch_parameters
from metadist.training.progress import Outcome, Progress

log = logging.getLogger(__name__)


def initial_parameters(source: str | None, trust: Sequence[str] = ()) -> Mapping[str, Tensor] | None:
    """Return the model parameters of a safetensors or torch file, or the best ones of an earlier run.

    None without a source. ``trust``: the modules that the earlier run's config may name.
    """
    if source is None:
        return None
    if source.endswith(".safetensors"):
        return {name: tensor for name, tensor in load_parameters(source).items() if not name.startswith(SLOTS)}
    if source.endswith(TORCH_FILES):
        return load_torch_parameters(source)
    if RunDirectory(source).read("run.json") is None:
        raise ConfigError(
            f"init_from: '{source}' is neither a .safetensors file, nor a file of torch.save "
            f"({', '.join(TORCH_FILES)}), nor a run directory"
        )
    earlier = load_run(source, trust=trust)
    return earlier.experiment.learner.parameters(earlier.state)


def load_run(run_dir: str, experiment: Experiment | None = None, trust: Sequence[str] = ()) -> Result:
    """Load the best parameters of a run, ready to ``adapt`` and ``predict``.

    The run's own config describes the experiment, unless ``experiment`` is given. It may name the modules in ``trust``.
    """
    folder = RunDirectory(run_dir)
    text, about = folder.read("config.yaml"), folder.read_json("run.json")
    if text is None or about is None:
        raise ConfigError(
            f"run directory '{run_dir}' has no config.yaml and run.json; is it the folder that train printed?"
        )
    if experiment is None:
        document = parse_document(text, f"{run_dir}/config.yaml")
        experiment = build_foreign(document, f"run directory '{run_dir}'", trust)
    learner = experiment.learner
    checkpoints = Checkpoints(folder.url, higher_is_better=learner.tasks.higher_is_better)
    loaded = checkpoints.best(learner.slots) or checkpoints.latest(learner.slots)
    if loaded is None:
        raise CheckpointError(f"run directory '{run_dir}' has no checkpoint yet")
    if edited := edited_modules(experiment, loaded.manifest):
        log.warning(
            "%s was trained with other code of %s, which was edited since; its results may be others here",
            run_dir,
            ", ".join(edited),
        )
    outcome = Outcome(Progress.of(loaded), loaded.state, loaded.meta_step, 0.0)
    return Result(
        about["run_id"],
        folder.url,
        experiment,
        outcome,
        [],
        loaded.state.sha256(),
        {},
        0.0,
        recorded=signature_of(loaded.manifest),
    )
