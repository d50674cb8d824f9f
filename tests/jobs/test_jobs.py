"""A job's files, name, environment and errors. Whole jobs: tests/cli/test_jobs_on_a_cluster.py."""

from __future__ import annotations

import os
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from metadist.core.errors import ConfigError, MetadistError, WorkerError
from metadist.jobs import ray_jobs
from metadist.jobs import submit as jobs
from metadist.jobs.ray_jobs import Job, RayJobs

#: how Ray ends the message of a failed job
QUOTED = (
    "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\n"
    "Running entrypoint\n"
)


def job(run_id, attempt, status="FAILED", exit_code=1, message=""):
    return Job(
        f"{run_id}-{attempt}",
        status,
        message,
        {jobs.RUN_ID: run_id, jobs.RUN_DIR: f"s3://b/{run_id}", jobs.ATTEMPT: str(attempt)},
        1.0,
        2.0,
        exit_code,
        {},
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with a run in it."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_without_own_modules_ships_alone():
    config = {"tasks": {"name": "sinusoid"}, "loss": "torch.nn.functional:l1_loss", "model": {"name": "mlp"}}
    with jobs.working_directory(config) as folder:
        assert [p.name for p in folder.rglob("*")] == ["config.yaml"]
    assert not folder.exists()


def test_initial_parameters_are_shipped_and_a_folder_is_not(home):
    (home / "model.safetensors").write_bytes(b"parameters")
    with jobs.working_directory({"init_from": "model.safetensors"}) as folder:
        assert (folder / "init.safetensors").read_bytes() == b"parameters"
        assert yaml.safe_load((folder / "config.yaml").read_text()) == {"init_from": "init.safetensors"}
    with jobs.working_directory({"init_from": "s3://b/a"}) as folder:
        assert yaml.safe_load((folder / "config.yaml").read_text()) == {"init_from": "s3://b/a"}
    for source, says in (
        ("runs/a", "is a folder of this machine; give the run's URL"),
        ("none.safetensors", "can't be read"),
    ):
        with pytest.raises(ConfigError, match=says), jobs.working_directory({"init_from": source}):
            pass


def test_more_than_ray_takes_is_refused(home, monkeypatch):
    monkeypatch.setattr(jobs, "WORKING_DIRECTORY_LIMIT", 1 << 20)
    (home / "model.safetensors").write_bytes(os.urandom(2 << 20))
    with (
        pytest.raises(ConfigError, match=r"have 2 MiB, Ray accepts 1 MiB; the largest: init.safetensors 2 MiB"),
        jobs.working_directory({"init_from": "model.safetensors"}),
    ):
        pass


def test_rays_limit_is_what_ray_says():
    assert ray_jobs.WORKING_DIRECTORY_LIMIT >= 100 << 20


@pytest.mark.parametrize(
    ("asked", "run"),
    [
        ({"run_id": "a"}, ("a", "s3://b/a")),
        ({"run_dir": "s3://b/a/"}, ("a", "s3://b/a")),
        ({"run_id": "a", "run_dir": "s3://b/moved"}, ("a", "s3://b/moved")),
        ({"run_id": "new", "run_dir": "/shared/new"}, ("new", "/shared/new")),
    ],
)
def test_which_run(asked, run):
    assert jobs._which_run(jobs.Request(**asked), "lines", [job("a", 1)]) == run


def test_a_run_is_known_by_its_folder(tmp_path):
    (tmp_path / "run.json").write_text('{"run_id": "earlier"}')
    assert jobs._which_run(jobs.Request(run_dir=str(tmp_path)), "lines", []) == ("earlier", str(tmp_path))
    with pytest.raises(ConfigError, match="--run-id b: the run in .* is earlier"):
        jobs._which_run(jobs.Request(run_dir=str(tmp_path), run_id="b"), "lines", [])


def test_a_new_run_needs_a_place_that_lasts(monkeypatch):
    monkeypatch.setenv("METADIST_RUNS", "s3://b/runs")
    run_id, run_dir = jobs._which_run(jobs.Request(), "lines", [job("a", 1)])
    assert run_id.startswith("lines-") and run_dir == f"s3://b/runs/{run_id}"
    monkeypatch.setenv("METADIST_RUNS", "runs")
    with pytest.raises(ConfigError, match="is relative, and a job has no lasting working directory; give --run-dir"):
        jobs._which_run(jobs.Request(), "lines", [])
    with pytest.raises(ConfigError, match="--run-id 'a b' must be"):
        jobs._which_run(jobs.Request(run_id="a b"), "lines", [])


def test_the_drivers_command_survives_a_shell():
    assert shlex.split(jobs.entrypoint("a", "/shared/my runs/$(a)")) == [
        "metadist",
        "train",
        "config.yaml",
        "--run-dir",
        "/shared/my runs/$(a)",
        "--run-id",
        "a",
        "--resume",
    ]


def test_the_environment_of_a_driver(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("METADIST_DATA", "data"),
        ("MLFLOW_TRACKING_URI", "http://m:5000"),
        ("AWS_SECRET_ACCESS_KEY", "not without being asked"),
    ):
        monkeypatch.setenv(name, value)
    given = jobs._environment(jobs.Request(environment={"A": "b"}), "s3://b/runs/a")
    assert given == {
        "METADIST_RUNS": "s3://b/runs",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "METADIST_DATA": str(tmp_path / "data"),
        "MLFLOW_TRACKING_URI": "http://m:5000",
        "A": "b",
    }
    assert jobs._environment(jobs.Request(data="s3://b/d"), "/r/a")["METADIST_DATA"] == "s3://b/d"


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (job("a", 1, exit_code=127), "the cluster's nodes have no metadist; install it"),
        (
            job("a", 1, exit_code=-9),
            "its driver was killed (exit code -9); metadist submit … --run-id a resumes the run",
        ),
        (
            job("a", 1, exit_code=2, message=QUOTED + "error: no data\nbye\n"),
            "a-1 failed: Job entrypoint command failed with exit code 2: error: no data; metadist submit",
        ),
        (
            job("a", 1, exit_code=1, message=QUOTED + "  ValueError: x\n"),
            "failed with exit code 2: ValueError: x; metadist submit … --run-id a",
        ),
        (job("a", 1, "STOPPED", None), "job a-1 stopped: no reason given"),
        (
            job("a", 1, exit_code=2, message=QUOTED + "error: tasks.name: 'a:B': No module named 'beside.deep'; …\n"),
            "--run-id a resumes the run; add --module beside, or install beside on the nodes",
        ),
    ],
)
def test_why_a_job_failed(ended, says):
    assert says in str(jobs.why_it_failed(ended))


@pytest.fixture
def server(request):
    """A server that answers every request with one status and one text."""
    status, text = request.param

    class Same(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_): ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Same)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.mark.lane("services")
@pytest.mark.parametrize(
    ("server", "error", "says"),
    [
        (
            (401, "Unauthorized: Missing authentication token"),
            ConfigError,
            "it needs a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        ),
        (
            (403, "Forbidden: Invalid authentication token"),
            ConfigError,
            "it does not accept this token; set RAY_AUTH_MODE=token",
        ),
        ((404, "no such page"), WorkerError, "Version check returned 404"),
        ((200, "<html>something else</html>"), WorkerError, "can't reach the Ray cluster at http://127.0.0.1"),
        ((500, "oh"), WorkerError, "500"),
    ],
    indirect=["server"],
)
def test_what_answers_is_no_cluster_of_ours(server, error, says):
    with pytest.raises(error) as raised:
        RayJobs(server)
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("head:8265", "expected the URL of the cluster's dashboard"),
        ("ray://head:10001", "expected the URL of the cluster's dashboard"),
        ("http://head:port", "--address http://head:port:"),
        ("http://127.0.0.1:1", "is it running, and is its dashboard's port open"),
    ],
)
def test_addresses_that_cannot_be(address, says):
    with pytest.raises(MetadistError, match=says):
        RayJobs(address)


def test_a_token_file_that_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"token can't be read"):
        RayJobs("http://127.0.0.1:1")
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match=r"is empty; expected the cluster's token"):
        RayJobs("http://127.0.0.1:1")
