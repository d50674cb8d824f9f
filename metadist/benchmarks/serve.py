"""Load the adaptation service with callers who each send another support set: batched against one at a time, over gRPC.

Two servers in two processes hold the same model; only one of them has load at any time. A caller sends its next request
after the answer to the last one. Before the measurement, both servers must give the answers that this process computes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from metadist.config.build import build
from metadist.config.schema import Document
from metadist.core.errors import ConfigError
from metadist.core.random import seeded
from metadist.core.task import Examples
from metadist.learners import FewShotLearner, supervised

SETS = 256
CONTESTANTS = {"one at a time": 1, "batched": 64}


@dataclass(frozen=True)
class ServeOptions:
    """The options of ``bench serve``.

    ``clients`` are the numbers of simultaneous callers, a case each. Each contestant has ``turns`` turns of
    ``seconds`` in a case. ``requests`` is the number of adaptations in the measurement of the server's memory; 0
    leaves it out.
    """

    document: Document
    clients: Sequence[int]
    turns: int
    seconds: float
    threads: int
    device: str
    requests: int


def run(**given: Any) -> dict[str, Any]:
    """Measure a case per number of callers; the arguments are the fields of ``ServeOptions``."""
    options = ServeOptions(**given)
    learner = _learner(options.document)
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(_server(options.document, most, options.threads, options.device))
            for name, most in CONTESTANTS.items()
        }
        sets = _support_sets(learner)
        for name, server in servers.items():
            _prove(server, learner, sets, name)
        cases = {
            f"{count} client{'s' if count > 1 else ''}": _case(servers, sets, count, options.turns, options.seconds)
            for count in options.clients
        }
        if options.requests:
            title = f"memory of the server over {options.requests} adaptations, 8 clients"
            cases[title] = _memory(servers["batched"], sets, options.requests)
    rows = len(sets[0][0])
    settings = {
        "config": options.document.get("name"),
        "support_rows": rows,
        "turns": options.turns,
        "seconds": options.seconds,
        "threads": options.threads,
        "device": options.device,
    }
    return {"settings": settings, "cases": cases}


def _learner(document: Document) -> FewShotLearner:
    learner = supervised(build(document).learner)
    if learner.tasks.input_shape is None:
        raise ConfigError(
            "bench serve: expected a config of supervised tasks whose inputs have one shape, such as omniglot_maml_5w1s"
        )
    return learner


def _support_sets(learner: FewShotLearner) -> list[tuple[Tensor, Tensor]]:
    """Return different random support sets of the tasks' size; their content does not change the time of a request."""
    family, generator = learner.tasks, seeded(0, "bench serve")
    rows = (family.sizes("test") or (10, 0))[0]
    assert family.input_shape is not None
    x = torch.rand(SETS, rows, *family.input_shape, generator=generator)
    if family.kind == "classification":
        return [(inputs, torch.arange(rows) % family.ways("test")) for inputs in x]
    return [(inputs, torch.rand(rows, family.outputs, generator=generator)) for inputs in x]


# Servers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    address: str
    process: psutil.Process


@contextlib.contextmanager
def _server(document: Document, largest: int, threads: int, device: str) -> Iterator[_Server]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(document, largest, threads, device, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(120):
            raise ConfigError(
                "bench serve: a server did not start within two minutes; the machine is too busy to measure on"
            )
        yield _Server(here.recv(), psutil.Process(process.pid))
    except EOFError:
        raise ConfigError("bench serve: a server ended while it started; its messages are above") from None
    finally:
        with contextlib.suppress(OSError):
            here.send("stop")
        process.join(20)
        if process.is_alive():
            process.kill()


def _serve(document: Document, largest: int, threads: int, device: str, pipe: Any) -> None:
    from metadist.rpc.endpoint import Endpoint
    from metadist.serving import load as serving
    from metadist.serving.model import ServedModel
    from metadist.serving.service import AdaptationService

    torch.set_num_threads(threads)
    learner = _learner(document)
    serving.move_to_device(learner, device)
    model = ServedModel("model", learner, learner.initial(0))
    model.warm_up()
    with serving.serve(AdaptationService([model], budget=16 << 20, largest=largest), Endpoint()) as running:
        pipe.send(running.address)
        with contextlib.suppress(EOFError):
            pipe.recv()


def _prove(server: _Server, learner: FewShotLearner, sets: Sequence[tuple[Tensor, Tensor]], name: str) -> None:
    from metadist.serving.client import Client

    state = learner.initial(0)
    answers: list[Any] = [None] * 16

    def ask(index: int) -> None:
        with Client(server.address) as client:
            x, y = sets[index]
            answers[index] = client.adapt_predict(x, y, x)

    callers = [threading.Thread(target=ask, args=(i,)) for i in range(len(answers))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for (x, y), answer in zip(sets, answers):
        phi = learner.adapt(state, Examples(x.to(learner.model.dtype), y))
        reference = learner.predict(state, phi, x.to(learner.model.dtype), Examples(x, y))
        if answer is None or not torch.allclose(answer, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max())):
            raise ConfigError(
                f"bench serve: the server '{name}' does not give the answers of this process; nothing is measured"
            )


# Loads ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Load:
    """Callers of one server, which call until a time or a number of requests is reached."""

    server: _Server
    sets: Sequence[tuple[Tensor, Tensor]]
    latencies: list[float] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    def run(self, count: int, seconds: float | None = None, requests: int | None = None) -> float:
        """Return the adaptations per second of ``count`` callers, after ``seconds`` or a number of ``requests``."""
        stop, ready = threading.Event(), threading.Barrier(count + 1)
        callers = [
            threading.Thread(target=self._call, args=(i, count, stop, ready, requests), daemon=True)
            for i in range(count)
        ]
        before = len(self.latencies)
        for caller in callers:
            caller.start()
        ready.wait(60)
        began = time.perf_counter()
        if seconds is not None:
            time.sleep(seconds)
            stop.set()
        for caller in callers:
            caller.join()
        elapsed = time.perf_counter() - began
        if self.failures:
            raise self.failures[0]
        return (len(self.latencies) - before) / elapsed

    def _call(
        self, number: int, count: int, stop: threading.Event, ready: threading.Barrier, requests: int | None
    ) -> None:
        from metadist.serving.client import Client

        try:
            with Client(self.server.address) as client:
                client.models()
                mine, sent = self.sets[number::count] or self.sets, 0
                ready.wait(60)
                while not stop.is_set() and (requests is None or sent * count < requests):
                    x, y = mine[sent % len(mine)]
                    began = time.perf_counter()
                    client.adapt(x, y)
                    self.latencies.append(time.perf_counter() - began)
                    sent += 1
        except Exception as error:
            self.failures.append(error)
            ready.abort()


def _case(
    servers: dict[str, _Server], sets: Sequence[tuple[Tensor, Tensor]], count: int, turns: int, seconds: float
) -> dict[str, Any]:
    order, rates = random.Random(0), {n: list[float]() for n in servers}
    loads = {n: _Load(s, sets) for n, s in servers.items()}
    for load in loads.values():
        load.run(count, min(seconds, 1.0))
        load.latencies.clear()
    for _ in range(turns):
        for name in order.sample(list(loads), len(loads)):
            rates[name].append(loads[name].run(count, seconds))
    base = rates["one at a time"]
    rows = {}
    for name, load in loads.items():
        cuts = statistics.quantiles(load.latencies, n=100) if len(load.latencies) > 1 else load.latencies * 99
        ratios = sorted(mine / theirs for mine, theirs in zip(rates[name], base))
        rows[name] = {
            "p50_ms": round(cuts[49] * 1e3, 2),
            "p99_ms": round(cuts[98] * 1e3, 2),
            "adaptations/s": round(statistics.median(rates[name]), 1),
            "ratio": round(statistics.median(ratios), 2),
            "lowest … highest turn": [round(ratios[0], 2), round(ratios[-1], 2)],
            "count": len(load.latencies),
        }
    return {"unit": "per adaptation", "contestants": rows}


def _memory(server: _Server, sets: Sequence[tuple[Tensor, Tensor]], requests: int) -> dict[str, Any]:
    load, rows = _Load(server, sets), {}
    for tenth in range(11):
        rows[f"after {requests * tenth // 10}"] = {"MiB": round(server.process.memory_info().rss / 2**20, 1)}
        if tenth < 10:
            load.run(8, requests=requests // 10)
    values = [row["MiB"] for row in rows.values()]
    return {
        "unit": "MiB resident",
        "contestants": rows,
        "growth_of_the_last_nine_tenths": round(values[-1] - values[1], 1),
    }
