"""Settings of a run that its executors share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunSettings:
    """The run's id and the settings that every executor needs.

    ``device`` is the config's ``engine.device``; ``patience`` the seconds to wait for the first workers; ``wire`` how
    contributions travel (``engine.wire``). ``note`` shows a message to the user. ``code``: the hashes of the user's
    modules, which every worker must have; ``modules``: the modules that the config names.
    """

    run: str
    device: str = "auto"
    seed: int = 0
    wire: str = "exact"
    patience: float = 60.0
    note: Callable[[str], None] = lambda message: None
    modules: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
