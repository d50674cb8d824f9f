"""A working directory with modules of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def own_modules(folder: Path, files: Mapping[str, str], patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write ``files`` to ``folder``, work and import there, and forget the imported modules at the end."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    yield folder
    tops = {Path(name).parts[0].removesuffix(".py") for name in files}
    for name in [n for n in sys.modules if n.partition(".")[0] in tops]:
        del sys.modules[name]
