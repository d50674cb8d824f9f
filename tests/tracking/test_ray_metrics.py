"""What Prometheus gets of a run, and the dashboard that draws it."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tiny import train

from metadist.config.build import build
from metadist.config.document import override, read_document
from metadist.tracking.ray_metrics import exported

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/metadist.json"


@pytest.mark.parametrize(
    ("name", "metric", "labels"),
    [
        ("engine/tasks_per_second", "metadist_engine_tasks_per_second", {}),
        ("engine/seconds_per_step/compute/gradient", "metadist_engine_seconds_per_step", {"phase": "compute/gradient"}),
        ("system/learner-0/cpu_percent", "metadist_sys_cpu_percent", {"worker": "learner-0"}),
        ("eval/test/accuracy/step_1", "metadist_eval", {"split": "test", "name": "accuracy/step_1"}),
        ("meta/loss", "metadist_meta", {"name": "loss"}),
    ],
)
def test_names_that_differ_in_a_place_become_one_with_a_label(name, metric, labels):
    assert exported(name) == (metric, labels)


def drawn() -> set[str]:
    """The names of a run's measurements that the dashboard asks for, as Ray exports them."""
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    return {name for expression in expressions for name in re.findall(r"ray_metadist_\w+", expression)}


@pytest.mark.long
def test_every_panel_of_the_dashboard_has_what_it_draws(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("METADIST_RUNS", str(tmp_path))
    small = [
        "outer.meta_steps=20",
        "evaluate.every=10",
        "evaluate.tasks=20",
        "evaluate.test_tasks=20",
        "tracking.log_every=1",
        "tracking.uri=none",
    ]
    document = override(read_document("sinusoid_maml"), [*small, "workers=[{role: learner, min: 1, max: 1}]"])
    result = train(build(document), run_dir=str(tmp_path / "a"), plots=False)
    port, text, deadline = cluster.nodes()[0]["MetricsExportPort"], "", time.monotonic() + 150
    wanted = drawn() - {"ray_metadist_sys_gpu_memory_bytes"}  # no GPU here
    step = re.compile(rf'^ray_metadist_meta_step\{{[^}}]*run="{result.run_id}"[^}}]*\}} (.*)$', re.MULTILINE)

    def whole():
        """Values come seconds apart: a name may be there long before its last value is."""
        return all(f"{name}{{" in text for name in wanted) and step.findall(text) == ["20.0"]

    while time.monotonic() < deadline and not whole():
        time.sleep(1)
        with contextlib.suppress(OSError):  # the agent that answers there may still be starting
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    assert {name for name in wanted if f"{name}{{" not in text} == set()
    assert step.findall(text) == ["20.0"]
