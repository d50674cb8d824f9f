"""Time contestants in interleaved blocks, and measure rates of the machine for comparison."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from metadist.workers.fingerprint import numerics_fingerprint


def interleaved(contestants: dict[str, Callable[[], Any]], *, rounds: int, block: int) -> dict[str, list[float]]:
    """Return the seconds of every call, after one block of warm-up per contestant.

    There are ``rounds`` turns of ``block`` calls each, the contestants in random order within a turn. A contestant
    waits for its result (``torch.cuda.synchronize``) before it returns. The first call of a block is not timed: the
    caches still hold the data of another contestant, which does not happen in a training run.
    """
    order, measured = random.Random(0), {name: list[float]() for name in contestants}
    for call in contestants.values():
        for _ in range(block):
            call()
    for _ in range(rounds):
        for name in order.sample(list(contestants), len(contestants)):
            call = contestants[name]
            call()
            for _ in range(block):
                began = time.perf_counter()
                call()
                measured[name].append(time.perf_counter() - began)
    return measured


def compare(measured: dict[str, list[float]], base: str, *, block: int = 5) -> dict[str, dict[str, Any]]:
    """Return median, quartiles, and the ratio of medians to ``base`` with its 95 % interval, by contestant.

    ``block`` is the number of calls per turn, as in ``interleaved``.
    """
    contestants = {}
    for name, values in measured.items():
        low, high = _ratio_interval(values, measured[base], block)
        quartiles = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2
        contestants[name] = {
            "median": _rounded(statistics.median(values)),
            "quartiles": [_rounded(q) for q in quartiles],
            "ratio": _rounded(statistics.median(values) / statistics.median(measured[base])),
            "ratio_ci95": [_rounded(low), _rounded(high)],
            "count": len(values),
        }
    return contestants


def _ratio_interval(values: list[float], base: list[float], block: int, resamples: int = 1000) -> tuple[float, float]:
    """Bootstrap the ratio of medians. Whole turns are resampled, so that drift cancels."""
    draw, turns, ratios = random.Random(0), range(len(values) // block), []
    for _ in range(resamples):
        chosen = draw.choices(turns, k=len(turns))
        medians = [
            statistics.median([v for t in chosen for v in series[t * block : (t + 1) * block]])
            for series in (values, base)
        ]
        ratios.append(medians[0] / medians[1])
    ratios.sort()
    return ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples)]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass(frozen=True)
class GemmRate:
    """Floating-point operations per second of matrix products.

    ``best`` is the best rate, ``at`` its shape, ``occurring`` the best rate among the sizes that occur, and ``rates``
    has the rates of all shapes.
    """

    best: float
    at: str
    occurring: float
    rates: dict[str, float]


def gemm_rate(
    shapes: Iterable[tuple[int, int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    square: int = 1024,
    seconds: float = 0.2,
) -> GemmRate:
    """Time batched products (batch, m, k, n) of the sizes that occur, and a large square one, ``seconds`` of each."""
    rates = {}
    for batch, m, k, n in [*dict.fromkeys(shapes), (1, square, square, square)]:
        left, right = (
            torch.randn(batch, m, k, dtype=dtype, device=device),
            torch.randn(batch, k, n, dtype=dtype, device=device),
        )
        product = torch.empty(batch, m, n, dtype=dtype, device=device)
        if batch == 1:  # a plain product can be faster than a batch of one
            left, right, product = left[0], right[0], product[0]

        def multiply(left: Any = left, right: Any = right, product: Any = product) -> None:
            torch.matmul(left, right, out=product)

        name = f"{batch}×[{m}×{k}]·[{k}×{n}]" if batch > 1 else f"[{m}×{k}]·[{k}×{n}]"
        rates[name] = 2 * batch * m * k * n / _fastest(multiply, device, seconds)
    at = max(rates, key=lambda name: rates[name])
    return GemmRate(rates[at], at, max([*rates.values()][:-1], default=rates[at]), rates)


def memcpy_rate(size: int, *, seconds: float = 0.5) -> float:
    """Return the bytes per second of a copy of ``size`` bytes to memory in use, by PyTorch's threads."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return size / _fastest(lambda: target.copy_(source), torch.device("cpu"), seconds)


def _fastest(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the seconds of one call in the fastest of many blocks: the speed of an undisturbed machine."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call(), synchronize()
    began = time.perf_counter()
    call(), synchronize()
    # 5 ms per block: more than the noise of the clock and of kernel launches.
    calls = max(1, int(0.005 / max(time.perf_counter() - began, 1e-7)))
    best, deadline = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def machine() -> dict[str, Any]:
    """Return the facts of the machine and of the versions that a measurement depends on."""
    facts = numerics_fingerprint(torch.device("cpu"), 1, torch.float32)
    described = {
        "processor": facts["device"],
        "instruction_set": facts["instruction_set"],
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {**described, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else described
