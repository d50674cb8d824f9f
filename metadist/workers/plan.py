"""The plan of a run: read the device of a worker, and choose or repeat the engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from metadist.config.groups import WorkerGroup
from metadist.core.engine import Engine
from metadist.core.errors import CompilerError, ConfigError, first_line
from metadist.engine.plan import Device, Plan

Planner = Callable[[Device], Plan]
"""Chooses the engine of a run, given the device of its first worker."""


def device_facts(device: torch.device, name: str) -> Device:
    """Read the facts about ``device`` that a plan needs."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401

            reason = None
        except ImportError:
            reason = "triton is not installed"
        return Device("cuda", name, torch.cuda.get_device_properties(device).total_memory, reason, os.cpu_count() or 1)
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    reason = None if compiler else "no C++ compiler (g++ or clang++) is on its PATH"
    return Device(device.type, name, _host_memory(), reason, os.cpu_count() or 1, _cache_of_a_core())


def _host_memory() -> int:
    """Physical memory, or the container's limit."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                return min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total


def _cache_of_a_core() -> int | None:
    """The level-2 cache of the first core, in bytes."""
    for index in range(8):
        folder = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}")
        try:
            if (folder / "level").read_text().strip() == "2":
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            return None
    return None


def sharing(device: Device, groups: Sequence[WorkerGroup]) -> float:
    """Return how many workers share the memory of one device at most."""
    groups = [g for g in groups if not g.outside]  # remote workers have machines of their own
    if device.kind == "cuda":
        return max((1 / g.gpus for g in groups if isinstance(g.gpus, float) and 0 < g.gpus < 1), default=1.0)
    cpus = min((g.cpus for g in groups if g.cpus > 0), default=1.0)
    return max(1.0, min(sum(g.max for g in groups), device.cores // cpus))


def why_not_compiled(error: Exception) -> str:
    """Return the first error that the compiler itself reports, or the first line of ``error``."""
    lines = [line.strip() for line in str(error).splitlines()]
    own = next((line for line in lines if "fatal error:" in line), None) or next(
        (line for line in lines if " error: " in line), None
    )
    return (own or first_line(error))[:300]


def planned_without_compiler(planner: Planner, device: Device, error: CompilerError) -> Plan:
    """Return the plan for workers that cannot compile, where the config leaves that open.

    ConfigError where the config asks for compilation; ``error`` where the engine is given, as in a resumed run.
    """
    plan = planner(replace(device, no_compiler=error.reason))
    if plan.engine.compile:
        raise error
    return plan


def recorded_engine(recorded: Mapping[str, Any]) -> Planner:
    """Return a planner that repeats the engine in a run's manifest."""
    try:
        engine = Engine(**recorded)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"the run's manifest states an engine that this version doesn't know: {error}") from error
    return lambda device: Plan(engine, device, {"engine": "as the run began"})
