"""``submit``, ``jobs`` and ``render``: every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import json

import pytest

RENDER = ("sinusoid_maml", "--run-dir", "s3://b/a")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("submit", "sinusoid_maml"), "--address is missing; expected the URL of the cluster's dashboard"),
        (("submit", "sinusoid_mam", "--address", "http://127.0.0.1:1"), "did you mean 'sinusoid_maml'?"),
        (("submit", "sinusoid_maml", "--env", "A B=c"), "--env A B=c: expected NAME=VALUE"),
        (("submit", "sinusoid_maml", "--env", "NOWHERE_SET"), "--env NOWHERE_SET: the variable is not set here"),
        (
            ("submit", "sinusoid_maml", "--address", "http://127.0.0.1:1"),
            "can't reach the Ray cluster at http://127.0.0.1:1",
        ),
        (
            ("submit", "sinusoid_maml", "--address", "http://127.0.0.1:1", "--module", "a b"),
            "can't reach the Ray cluster",
        ),
        (("jobs",), "--address is missing"),
        (("jobs", "--address", "head:8265"), "--address head:8265: expected the URL"),
        (("jobs", "--address", "head:8265", "status"), "--address head:8265: expected the URL"),
        (("jobs", "logs", "-f", "a", "--address", "http://127.0.0.1:1"), "is it running"),
        (("jobs", "stop", "a", "--address", "http://127.0.0.1:1"), "is it running"),
        (
            ("render", "kubernets", *RENDER),
            "'kubernets' is not one of kubernetes, slurm, aws, gcp; did you mean 'kubernetes'?",
        ),
        (("render", "aws", "sinusoid_maml"), "--run-dir is missing"),
        (("render", "kubernetes", *RENDER), "--image is missing"),
        (
            ("render", "kubernetes", "sinusoid_maml", "--run-dir", "/shared/a", "--image", "r/m:1"),
            "no pod has a lasting disk",
        ),
        (
            ("render", "aws", *RENDER, "--node", "learner=g5.xlarge"),
            "--node learner=g5.xlarge: expected ROLE=[TYPE:]CPUS[:GPUS]",
        ),
        (("render", "aws", *RENDER, "--node", "learners=4"), "with a role of learner, environment"),
        (("render", "slurm", *RENDER, "--node", "environment=4"), "the nodes of a Slurm job are equal"),
        (("render", "aws", *RENDER, "--workers", "0"), "a cluster needs workers"),
        (("render", "aws", *RENDER, "--output", "/dev/null/x"), "--output /dev/null/x"),
    ],
)
def test_mistakes(cli, monkeypatch, arguments, says):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    result = cli(*arguments)
    assert result.exit_code == 2, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ") and says in result.stderr, (
        result.stderr
    )
    assert result.stdout == ""


def test_render_says_what_it_wrote_and_what_comes_next(cli, tmp_path):
    result = cli("render", "slurm", "sinusoid_maml", "--run-dir", "/shared/a", "--run-id", "a", "--json")
    assert result.exit_code == 0, result.stderr
    *files, last = result.stdout.splitlines()
    assert files == ["rendered/a/job.sh", "rendered/a/config.yaml"] and all((tmp_path / f).is_file() for f in files)
    assert json.loads(last) == {"run_id": "a", "files": files, "next": ["sbatch rendered/a/job.sh"]}
    assert "sbatch rendered/a/job.sh" in result.stderr
