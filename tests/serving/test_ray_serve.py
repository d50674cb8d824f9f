"""The adaptation service on Ray Serve: replicas, their shared cache, and the token."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from ports import free_port
from tiny import train

from metadist.core.errors import ConfigError
from metadist.serving.ray import bounds


def test_bounds():
    assert bounds("2") == (2, 2) and bounds("1-4") == (1, 4)
    for wrong in ("0", "4-2", "-3", "x", "1-", ""):
        with pytest.raises(ConfigError, match="--replicas"):
            bounds(wrong)


@pytest.mark.lane("ray")
@pytest.mark.long
@pytest.mark.parametrize("replicas", ["2", "1-2"])
def test_replicas_answer_as_this_process_does(tmp_path, replicas):
    result = train(tiny.experiment("outer.meta_steps=4"), run_dir=str(tmp_path / "run"), plots=False)
    token = tmp_path / "token"
    token.write_text("t" * 40)
    token.chmod(0o600)
    port = free_port()
    server = tiny.start(
        "serve",
        "run",
        "--ray-serve",
        "--replicas",
        replicas,
        "--replica-cpus",
        0.5,
        "--http-port",
        port,
        "--token-file",
        "token",
        folder=tmp_path,
        OMP_NUM_THREADS="1",
    )
    try:
        while "Ray Serve" not in (line := server.stderr.readline()):
            assert line, server.communicate()

        def ask(path, body=None, given="t" * 40):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", data, {"Authorization": f"Bearer {given}"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())

        assert ask("/v1/models")["models"][0]["params_sha256"] == result.state.sha256()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask("/v1/models", given="wrong")
        generator = torch.Generator().manual_seed(0)
        tasks = [(torch.rand(5, 1, generator=generator), torch.rand(5, 1, generator=generator)) for _ in range(24)]
        expected = [result.predict(result.adapt(x, y), x) for x, y in tasks]

        def through_a_handle(task):
            x, y = task
            handle = ask("/v1/adapt", {"x": x.tolist(), "y": y.tolist()})["handle"]
            return handle, [
                torch.tensor(ask("/v1/predict", {"handle": handle, "x": x.tolist()})["prediction"]) for _ in range(3)
            ]

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(through_a_handle, tasks))
        for (_, answers), reference in zip(results, expected):
            assert all(torch.allclose(answer, reference, rtol=1e-4, atol=1e-5) for answer in answers)
        assert ask("/v1/models")["statistics"]["handles"] == 24  # the count of both replicas
        handle = results[0][0]
        assert ask("/v1/forget", {"handle": handle})["existed"]
        for _ in range(6):  # on both replicas
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask("/v1/predict", {"handle": handle, "x": [[0.0]]})
        if replicas == "2":
            adapted = {ask("/v1/models")["statistics"]["adaptations"] for _ in range(20)}
            assert len(adapted) == 2 and sum(adapted) == 24
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=120)
    assert server.returncode == 0 and "Traceback" not in err, err
