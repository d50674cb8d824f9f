"""A driver whose particles have states is killed at a random moment: its resumption ends with the same parameters."""

from __future__ import annotations

import random
import signal
import time

import particles
import pytest
import tiny
import yaml
from drivers import newest, wait_for

pytestmark = pytest.mark.lane("services")

OFTEN = ["outer.meta_steps=30", "checkpoint={every: 4, states_every: 3}", "evaluate.every=1000", "outer.shard_size=5"]


@pytest.mark.long
def test_a_killed_driver_is_resumed_from_the_states_of_its_checkpoint(tmp_path):
    expected = tiny.train(particles.experiment(*OFTEN), run_dir=str(tmp_path / "whole"), plots=False, test=False)
    config, run, chance = tmp_path / "particles.yaml", tmp_path / "run", random.Random(0)
    config.write_text(yaml.safe_dump(particles.document(*OFTEN)))
    arguments = ["train", config, "--run-dir", run, "--resume", "--json"]
    process = tiny.start(*arguments, folder=tmp_path)
    wait_for(process, lambda: newest(run))
    time.sleep(chance.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < newest(run) < 30
    done = tiny.run(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed at meta-step" in done.stderr
    assert tiny.last_json(done.stdout)["params_sha256"] == expected.params_sha256
