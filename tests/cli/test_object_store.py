"""Runs in S3, by the real client against a server that speaks its protocol."""

from __future__ import annotations

import os
import signal
import time

import fsspec
import pytest
import tiny
from moto.server import ThreadedMotoServer
from tiny import train

from metadist.experiment.load import load_run

pytestmark = pytest.mark.lane("services")


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("bucket", exist_ok=True)
    yield "s3://bucket"
    server.stop()


def test_a_driver_dies_and_another_goes_on(bucket, tmp_path):
    """SIGKILL after the first checkpoint; whoever resumes has no file of the first, and ends with an unbroken run's
    parameters.
    """
    settings = ("outer.meta_steps=40", "evaluate.every=40", "checkpoint.every=2")
    whole = train(tiny.experiment(*settings), run_dir=str(tmp_path / "whole"), plots=False)
    config, run = tiny.write(tmp_path, *settings), f"{bucket}/runs/a"
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    first = tiny.start("train", config, "--run-dir", run, folder=tmp_path)
    end = time.monotonic() + 100
    while not store.glob("bucket/runs/a/checkpoints/*/manifest.json"):
        assert first.poll() is None and time.monotonic() < end, first.communicate()
        store.invalidate_cache()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    second = tiny.run(
        "train", config, "--run-dir", run, "--resume", "--json", folder=elsewhere, METADIST_CACHE=str(elsewhere)
    )
    assert second.returncode == 0, second.stderr
    assert "resumed at meta-step" in second.stderr
    assert tiny.last_json(second.stdout)["params_sha256"] == whole.params_sha256
    assert load_run(run).params_sha256 == whole.params_sha256


@pytest.mark.long
def test_a_mistyped_bucket_is_not_made(bucket, tmp_path):
    ended = tiny.run("train", tiny.write(tmp_path), "--run-dir", "s3://buckte/runs/a", folder=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert (
        "run_dir 's3://buckte/runs/a': config.yaml can't be written: The specified bucket does not exist"
        in ended.stderr
    )
    assert fsspec.filesystem("s3", skip_instance_cache=True).ls("") == ["bucket"]


@pytest.mark.long
def test_a_store_that_is_not_there_is_one_line(tmp_path, monkeypatch, bucket):
    ended = tiny.run(
        "train",
        tiny.write(tmp_path),
        "--run-dir",
        f"{bucket}/a",
        folder=tmp_path,
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "run.json can't be read: EndpointConnectionError" in ended.stderr
