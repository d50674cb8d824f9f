"""The numerics fingerprint: the facts that must be equal for two workers to compute the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from metadist.core.engine import RELEASE, Engine

#: variables by which mathematical libraries choose other kernels or another precision
LIBRARY_SETTINGS = (
    "BLIS_ARCH_TYPE",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "DISABLE_ADDMM_CUDA_LT",
    "DNNL_CPU_ISA_HINTS",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)
#: settings of PyTorch's compiler that change arithmetic, without their common beginning TORCHINDUCTOR_
COMPILER_SETTINGS = (
    "BATCH_INVARIANT",
    "COORDINATE_DESCENT_TUNING",
    "CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG",
    "CPP_ENABLE_UNSAFE_MATH_OPT_FLAG",
    "CPP_GEMM_CACHE_BLOCKING",
    "CPP_GEMM_MAX_K_SLICES",
    "CPP_GEMM_THREAD_FACTORS",
    "CPP_MARCH",
    "CPP_USE_DECOMPOSE_TANH",
    "EMULATE_DIVISION_ROUNDING",
    "EMULATE_PRECISION_CASTS",
    "FREEZING",
    "LAYOUT_OPTIMIZATION",
    "MAX_AUTOTUNE",
    "MAX_AUTOTUNE_GEMM",
    "MAX_AUTOTUNE_POINTWISE",
    "PERSISTENT_REDUCTIONS",
    "SPLIT_REDUCTIONS",
    "USE_FAST_MATH",
    "VEC_ISA_OK",
)
#: the setting that every worker on a GPU makes itself
DETERMINISTIC_CUBLAS = ":4096:8"


def numerics_fingerprint(
    device: torch.device, threads: int, dtype: torch.dtype, engine: Engine = Engine(), release: int = RELEASE
) -> dict[str, Any]:
    """Return the facts that must be equal for two workers to compute the same bits, and their hash under ``id``.

    ``release`` is that of the algorithm (``Algorithm.release``). A fact that version 0.1 did not state is left out
    where it has the value that it had then.
    """
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "compile": engine.compile,
        "differentiation": f"{engine.differentiation}, {engine.hessian}"
        if engine.differentiation in ("mixed", "implicit")
        else engine.differentiation,
        "precision": engine.precision,
    }
    if engine.chunk is not None:  # libraries may choose other kernels for other batches
        facts["chunk"] = engine.chunk
    if settings := library_settings(device.type, engine.compile):
        facts["settings"] = settings
    if engine.compile:
        facts["compiler"] = _compiler(device.type)
    if release > 1:
        facts["release"] = release
    return {**facts, "id": fingerprint_id(facts)}


def fingerprint_id(facts: Mapping[str, Any]) -> str:
    """Return a hash of all facts but the ``id``."""
    return hashlib.sha256(
        json.dumps({k: v for k, v in facts.items() if k != "id"}, sort_keys=True).encode()
    ).hexdigest()[:16]


def library_settings(device_type: str, compiled: bool) -> str:
    """Return the settings of this process that change the bits of mathematical libraries, as text; empty for none."""
    names = [*LIBRARY_SETTINGS, *(f"TORCHINDUCTOR_{name}" for name in COMPILER_SETTINGS if compiled)]
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if found.get("CUBLAS_WORKSPACE_CONFIG") == DETERMINISTIC_CUBLAS:
        del found["CUBLAS_WORKSPACE_CONFIG"]
    # On a GPU workers set the precision themselves, as engine.precision says.
    if device_type == "cpu" and (precision := torch.get_float32_matmul_precision()) != "highest":
        found["float32_matmul_precision"] = precision
    if not torch.backends.mkldnn.enabled:
        found["mkldnn"] = "off"
    # The processor's own treatment of numbers below 1e-308, which torch.set_flush_denormal changes.
    if not float(torch.tensor(5e-324, dtype=torch.float64) * 1.0):
        found["flush_denormal"] = "on"
    if (dtype := torch.get_default_dtype()) != torch.float32:
        found["default_dtype"] = str(dtype).removeprefix("torch.")
    return ", ".join(f"{name}={value[:80]}" for name, value in sorted(found.items()))


@lru_cache(maxsize=2)
def _compiler(device_type: str) -> str:
    """Return the name and version of the compiler that makes the kernels of ``engine.compile``."""
    if device_type == "cuda":
        try:
            import triton
        except ImportError:
            return "none"
        return f"triton {triton.__version__}"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        command = [get_cpp_compiler(), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})
        return done.stdout.partition("\n")[0].strip()[:120] or "unknown"
    except Exception:  # PyTorch's own type for a missing compiler is not public
        return "none"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            facts = dict(line.split(":", 1) for line in lines.read().partition("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or "cpu"
    known = {name.strip(): value.strip() for name, value in facts.items()}
    # Virtual machines give generations of processors one name.
    numbers = "/".join(known.get(name, "?") for name in ("cpu family", "model", "stepping"))
    return f"{known.get('model name', platform.machine())} {numbers}"
