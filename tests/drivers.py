"""Drivers in processes of their own: wait for them, and read their checkpoints and their MLflow store."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path


def query(folder: Path, sql: str) -> list[tuple]:
    [database] = (folder / "runs").glob("*.db")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(sql).fetchall()


def newest(run: Path) -> int:
    steps = [int(p.parent.name[5:]) for p in (run / "checkpoints").glob("step-*/manifest.json")]
    return max(steps, default=0)


def wait_for(process, condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
