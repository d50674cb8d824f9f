"""Commands to trainings in this process: each takes effect at a chosen meta-step."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
from tiny import train

from metadist.control.commands import Command
from metadist.control.steering import RunControl
from metadist.core.errors import MetadistError

OFF = "control.enabled=false"
BOUNDARY = RunControl.boundary


class Commander:
    """Sends commands to a running training. ``orders``: meta-step → the commands that take effect at its boundary."""

    def __init__(self, monkeypatch, orders=(), stop_at=None):
        self.orders, self.stop_at, self.steering = dict(orders), stop_at, None
        self.refusals, self.sizes = [], []

        def boundary(steering, meta_step, workers, save):
            self.steering = steering
            for command in self.orders.pop(meta_step, ()):
                try:
                    steering.submit(command, 0.0)
                except MetadistError as error:
                    self.refusals.append(str(error))
            result = BOUNDARY(steering, meta_step, workers, save)
            self.sizes.append(result[0].outer.meta_batch_size)
            return (result[0], "interrupted") if meta_step == self.stop_at else result

        monkeypatch.setattr(RunControl, "boundary", boundary)


def run(where, *overrides, resume=False, **more):
    return train(tiny.experiment(OFF, *overrides), run_dir=str(where), resume=resume, plots=False, **more)


def size(value):
    return Command("set_meta_batch_size", value)


def lines(where):
    return [json.loads(line) for line in (Path(where) / "commands.jsonl").read_text().splitlines()]
