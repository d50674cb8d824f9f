"""The commands of deploy/README.md: this test runs those of render, and checks the options of all others."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main
from typer.testing import CliRunner

from metadist.cli.app import app


def commands(root):
    text = "".join((root / path).read_text() for path in ("deploy/README.md", "cluster/README.md"))
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
        yield line.partition("  #")[0].partition("✗")[0].strip(), "✗" in line


def test_render_commands(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = [words for line, _ in commands(root) if (words := shlex.split(line))[:2] == ["metadist", "render"]]
    assert {words[2] for words in wanted} == {"aws", "slurm", "kubernetes"}
    for words in wanted:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
        for file in done.stdout.split():
            if file.endswith((".yaml", ".sh")) and "/" in file:
                assert (tmp_path / file).exists(), file
    for line, _ in commands(root):  # these commands wrote the files that later commands name
        for file in re.findall(r"\b(?:cloud|batch|k8s)/[\w.]+", line):
            assert (tmp_path / file).exists(), line


def test_every_option_exists(root):
    known = {
        name: {o for p in command.params for o in p.opts}
        for name, command in typer.main.get_command(app).commands.items()
    }
    for line, _ in commands(root):
        words = shlex.split(line)
        if words[0] == "metadist":
            assert {w.partition("=")[0] for w in words if w.startswith("--")} <= known[words[1]], line


def test_what_was_not_executed_is_marked(root):
    """No test has docker, a cloud, Slurm or Kubernetes."""
    for line, marked in commands(root):
        words = [w for w in line.split() if "=" not in w]
        elsewhere = words and (
            words[0] in ("docker", "kubectl", "helm", "sbatch", "scancel")
            or words[:2] in (["ray", "up"], ["ray", "down"], ["ray", "dashboard"])
        )
        assert marked or not elsewhere, line


@pytest.mark.parametrize("path", ["deploy/README.md", "cluster/README.md", "deploy/helm/metadist/README.md"])
def test_links(root, path):
    for target in re.findall(r"\]\(([^)#]+)\)", (root / path).read_text()):
        assert target.startswith("http") or (root / path).parent.joinpath(target).exists(), target
