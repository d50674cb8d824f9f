"""Short trajectories that must not change: every bit on machines with known numerics, values in float64 on others.

After an intended change, or to add the present machine, run

    .venv/bin/python tests/golden/test_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import Blobs, Curves, Everything, learner, train

from metadist.algorithms import ANIL, CNP, MAML, MetaSGD, ProtoNet, Reptile
from metadist.core.engine import Engine
from metadist.core.outer import OuterLoop
from metadist.models import MLP, ConditionalNeuralProcess, Conv4
from metadist.tasks import Sinusoid
from metadist.workers.fingerprint import fingerprint_id, numerics_fingerprint

GOLDEN = Path(__file__).with_name("golden.json")
META_STEPS = 4
IMAGES, PATCHES = Blobs(input_shape=(1, 16, 16)), Blobs(input_shape=(1, 6, 6))
MOMENTUM = OuterLoop(
    optimizer="sgd", lr=0.5, momentum=0.9, schedule="linear", meta_batch_size=5, shard_size=2, meta_steps=META_STEPS
)
ADAMW = OuterLoop(
    optimizer="adamw",
    weight_decay=0.01,
    schedule="cosine",
    clip_norm=1.0,
    meta_batch_size=6,
    shard_size=4,
    meta_steps=META_STEPS,
)

#: name → algorithm, tasks, model config (or a module's class), outer loop
CONFIGS = {
    "maml-sinusoid": (MAML(inner_steps=2), Sinusoid(), MLP(), ADAMW),
    "fomaml-conv4": (
        MAML(first_order=True, inner_lr=0.1, inner_steps=3),
        IMAGES,
        Conv4(filters=8, pooling="stride"),
        ADAMW,
    ),
    "maml-conv4": (MAML(inner_lr=0.4), IMAGES, Conv4(filters=8), ADAMW),
    "maml-everything": (MAML(inner_lr=0.1, inner_steps=2, inner_batch_size=4), PATCHES, Everything, MOMENTUM),
    "anil-groups": (ANIL(inner_lr=0.1), IMAGES, Conv4(filters=8, norm="group", dropout=0.1), MOMENTUM),
    "meta_sgd": (MetaSGD(inner_lr=0.1, inner_steps=2), Curves(), MLP(hidden=(16,), activation="tanh"), ADAMW),
    "reptile-carried": (
        Reptile(inner_optimizer="adam", inner_lr=0.01, inner_betas=(0.0, 0.99), inner_steps=4, moments="carried"),
        Sinusoid(),
        MLP(hidden=(16,)),
        MOMENTUM,
    ),
    "protonet": (ProtoNet(), IMAGES, Conv4(filters=8, pooling="max"), ADAMW),
    "cnp": (CNP(), Curves(), ConditionalNeuralProcess(16, 16), ADAMW),
}


#: other engines: name → engine, and its trajectories, which equal the eager ones in float64
ENGINES = {
    "mixed": (Engine(differentiation="mixed"), ("maml-sinusoid", "maml-everything", "anil-groups", "meta_sgd")),
    "mixed-reverse": (Engine(differentiation="mixed", hessian="reverse"), ("maml-sinusoid", "maml-everything")),
    "compiled": (Engine(compile=True), ("maml-sinusoid",)),
    "compiled-mixed": (Engine(compile=True, differentiation="mixed"), ("meta_sgd",)),
}
CASES = [(name, "eager") for name in CONFIGS] + [
    (name, engine) for engine, (_, names) in ENGINES.items() for name in names
]
COMPILED, LONG = pytest.mark.lane("compile"), pytest.mark.long
MARKS = {"compiled": [COMPILED], "compiled-mixed": [COMPILED, LONG]}


def engine_of(engine):
    return ENGINES[engine][0] if engine in ENGINES else Engine()


def trajectory(name, dtype, engine="eager"):
    """Return (the last state, the loss of every meta-step)."""
    algorithm, family, config, outer = CONFIGS[name]
    build = config if isinstance(config, type) else lambda: config.build(family.input_shape, algorithm.outputs(family))
    reports = []
    subject = learner(algorithm, build, family, dtype=dtype, outer=outer)
    subject.set_engine(engine_of(engine))
    state = train(subject, META_STEPS, reports=reports)
    return state, [report["loss"] for report in reports]


def fingerprint(engine="eager"):
    return numerics_fingerprint(torch.device("cpu"), torch.get_num_threads(), torch.float32, engine_of(engine))


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(("name", "engine"), [pytest.param(*c, marks=MARKS.get(c[1], ())) for c in CASES])
def test_every_bit(name, engine):
    """Two runs give the same bits, and the recorded bits on a machine with a recorded fingerprint."""
    digest = trajectory(name, torch.float32, engine)[0].sha256()
    assert trajectory(name, torch.float32, engine)[0].sha256() == digest
    bits, facts = json.loads(GOLDEN.read_text())["bits"], fingerprint(engine)
    # Entries of version 0.1 do not state the compiler.
    unstated = fingerprint_id({name: value for name, value in facts.items() if name != "compiler"})
    known = bits.get(facts["id"]) or bits.get(unstated)
    if known is not None and name in known["sha256"]:
        assert digest == known["sha256"][name], (
            f"other bits than on {known['facts']}; for an intended change: {__doc__}"
        )


@pytest.mark.lane("numerics")
@pytest.mark.parametrize(
    ("name", "engine"), [pytest.param(*c, marks=[COMPILED, LONG]) if "compiled" in c[1] else c for c in CASES]
)
def test_the_same_values_on_any_machine(name, engine):
    state, losses = trajectory(name, torch.float64, engine)
    golden = json.loads(GOLDEN.read_text())["values"][name]
    assert losses == pytest.approx(golden["loss"], rel=1e-9)
    assert state.slots.keys() == golden["slots"].keys()
    for slot, (norm, first, last) in golden["slots"].items():
        vector = state.slots[slot].double()
        assert [float(vector.norm()), float(vector[0]), float(vector[-1])] == pytest.approx(
            [norm, first, last], rel=1e-9, abs=1e-9
        )


def regenerate():
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"bits": {}}
    for engine in ("eager", *ENGINES):
        facts = fingerprint(engine)
        bits = {name: trajectory(name, torch.float32, engine)[0].sha256() for name, by in CASES if by == engine}
        golden["bits"][facts.pop("id")] = {"facts": facts, "sha256": bits}
    golden["values"] = {}
    for name in CONFIGS:
        state, losses = trajectory(name, torch.float64)
        vectors = {slot: v.double() for slot, v in state.slots.items()}
        slots = {slot: [float(v.norm()), float(v[0]), float(v[-1])] for slot, v in vectors.items()}
        golden["values"][name] = {"loss": losses, "slots": slots}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    regenerate()
