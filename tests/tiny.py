"""A run that takes a second, as a config document, and the command line in a process of its own."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from metadist.config.build import build
from metadist.config.document import override
from metadist.config.experiment import Experiment
from metadist.experiment.request import RunRequest
from metadist.experiment.result import Result
from metadist.experiment.train import train as train_experiment
from metadist.learners import FewShotLearner, supervised
from metadist.training.observers import Observer

_DOCUMENT = {
    "name": "tiny",
    "seed": 3,
    "tasks": {"name": "sinusoid", "k_shot": 4, "query_shots": 4},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml", "inner_lr": 0.01, "inner_steps": 1},
    "outer": {"lr": 0.01, "meta_batch_size": 10, "shard_size": 2, "meta_steps": 6},
    "evaluate": {"every": 3, "tasks": 6, "test_tasks": 8, "inner_steps": 2},
    "workers": [{"min": 0, "max": 0}],
    "engine": {"worker_patience": 400},
    "checkpoint": {"every": 2},
    "tracking": {"uri": "none", "log_every": 1},
}


def document(*overrides: str) -> dict[str, Any]:
    return override(copy.deepcopy(_DOCUMENT), overrides)


def experiment(*overrides: str) -> Experiment:
    return build(document(*overrides))


def train(experiment: Experiment, *, display: Observer | None = None, **request: Any) -> Result:
    """Train with a request whose fields are keywords."""
    return train_experiment(experiment, RunRequest(**request), display)


def learner(*overrides: str) -> FewShotLearner:
    return supervised(experiment(*overrides).learner)


def write(folder: Path, *overrides: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(document(*overrides)))
    return path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """No settings of the machine's, and runs below ``folder``."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("METADIST_", "MLFLOW_", "RAY_"))}
    return {**mine, "METADIST_RUNS": str(folder / "runs"), "METADIST_CACHE": str(folder / "cache"), **more}


def start(*arguments: object, folder: Path, **more: str) -> subprocess.Popen[str]:
    """``metadist`` with these arguments in ``folder``, as the leader of a process group."""
    command = [sys.executable, "-m", "metadist", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder, **more),
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_signals,
    )


def _hear_signals() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*arguments: object, folder: Path, timeout: float = 400, **more: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, folder=folder, **more)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{arguments} took more than {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def last_json(stdout: str) -> dict[str, Any]:
    """The last line, as strict JSON."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(stdout.rstrip("\n").splitlines()[-1], parse_constant=refuse)
