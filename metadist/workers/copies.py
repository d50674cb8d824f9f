"""Compare a worker's copies of data and code with the driver's."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from metadist.config.modules import OURSELVES, code_hashes, own_hash
from metadist.learners.base import Learner


def code_here(modules: Sequence[str]) -> dict[str, str]:
    """Return the hashes of the code that this process imports: ``modules`` with their imports, and metadist itself."""
    return {**code_hashes(modules), OURSELVES: own_hash()}


def refusal_of_copies(learner: Learner, code: Mapping[str, str], host: str, about: Mapping[str, Any]) -> str | None:
    """Return why a worker can't take part: other data or other code than the driver's; None where both are equal.

    ``code`` are the hashes at the begin of this attempt of the run (``Experiment.code``), ``about`` the facts that the
    worker on ``host`` reports. The name of the worker goes before the text.
    """
    mine, theirs = learner.data_sha256, about.get("data_sha256")
    if mine != theirs:
        here, there = (f"sha256 {_short(h)}" if h else "none" for h in (mine, theirs))
        return f"has other data ({there}) than the driver ({here}); set METADIST_DATA to the same data"
    found = about.get("modules")
    found = found if isinstance(found, dict) else {}
    # Classes of __main__ are sent by value.
    expected = {**{n: h for n, h in code.items() if not n.startswith("__main__:")}, OURSELVES: own_hash()}
    name = next((n for n in sorted(expected) if found.get(n) != expected[n]), None)
    if name is None:
        return None
    there = _short(found[name]) if name in found else "none"
    remedy = (
        "install the driver's version on every machine"
        if name == OURSELVES
        else "copy the driver's file there, or submit the run as a job, which ships the user's modules"
    )
    return (
        f"has another copy of module '{name}' on {host} (sha256 {there}) than the driver on {platform.node()} (sha256 "
        f"{_short(expected[name])}); {remedy}"
    )


def _short(digest: object) -> str:
    return "".join(c for c in str(digest)[:12] if c.isprintable()) + "…"
