"""Show the progress of a run while it trains: a bar on a terminal, one line in a notebook, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from metadist.config.experiment import Experiment
from metadist.core.text import printable
from metadist.core.text import show as print  # no call can forget to escape control characters
from metadist.experiment.console import PlainConsole
from metadist.learners.evaluation import Evaluation
from metadist.training.observers import Observer

#: seconds between two updates of a notebook's line
NOTEBOOK_SECONDS = 0.5


class PlainLines(Observer):
    """Print a line to stderr every few seconds, for logs."""

    def __init__(self, meta_steps: int | None = None, every: float = 10.0) -> None:
        self._meta_steps, self._every, self._last = meta_steps, every, time.monotonic()
        self._first: tuple[int, float] | None = None

    def step(self, meta_step: int, report: Mapping[str, float], tasks_per_second: float) -> None:
        now = time.monotonic()
        self._first = self._first or (meta_step, now)
        if now - self._last >= self._every and self._meta_steps is not None:
            self._last = now
            done, since = meta_step - self._first[0], now - self._first[1]
            left = f", {_minutes((self._meta_steps - meta_step) * since / done)} left" if done else ""
            self.progress(
                f"meta-step {meta_step}/{self._meta_steps}  {_report(report)}  {tasks_per_second:.0f} tasks/s{left}"
            )

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        self.note(f"meta-step {meta_step}  validation {_score(evaluation)}")

    def testing(self, tasks: int) -> None:
        self.note(_test(tasks))

    def progress(self, line: str) -> None:
        """Show a line that a later one may replace."""
        self.note(line)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


class Notebook(PlainLines):
    """Show one line below the cell of a notebook, and replace it. Notes are printed."""

    def __init__(self, meta_steps: int, display: Any) -> None:
        super().__init__(meta_steps, NOTEBOOK_SECONDS)
        self._handle = display(_text("starting…"), raw=True, display_id=True)
        self._line = self._validation = ""

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        self._validation = f"  validation {_score(evaluation)}"
        self.progress(self._line or f"meta-step {meta_step}/{self._meta_steps}")

    def testing(self, tasks: int) -> None:
        self.progress(_test(tasks))

    def progress(self, line: str) -> None:
        self._line = line
        self._handle.update(_text(line + self._validation), raw=True)


class Rows(Progress):
    """A progress bar with a second row for ``details``, which a narrow terminal cuts off."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.details:
            yield Text(self.details, style="green", no_wrap=True, overflow="ellipsis")


class Bar(Observer):
    """Show a progress bar on a terminal."""

    def __init__(self, progress: Rows, meta_steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("meta-training", total=meta_steps, rate="")
        self._report = self._validation = ""

    def step(self, meta_step: int, report: Mapping[str, float], tasks_per_second: float) -> None:
        self._report = _report(report)
        self._show(completed=meta_step, rate=f"{tasks_per_second:.0f} tasks/s")

    def evaluated(self, meta_step: int, evaluation: Evaluation) -> None:
        self._validation = f"validation {_score(evaluation)}"
        self._show()

    def testing(self, tasks: int) -> None:
        self._show(description=_test(tasks), rate="")

    def note(self, message: str) -> None:
        self._progress.console.print(message, markup=False, emoji=False, highlight=False)

    def _show(self, **fields: Any) -> None:
        self._progress.details = "  ".join(part for part in (self._report, self._validation) if part)
        self._progress.update(self._task, **fields)


def plain() -> Observer:
    """Return a display that prints only notes and validation scores."""
    return PlainLines()


@contextmanager
def live(experiment: Experiment) -> Iterator[Observer]:
    """Yield the display of a run: a line in a notebook, a bar where stderr is a terminal, lines elsewhere."""
    meta_steps = experiment.learner.outer.meta_steps
    console = PlainConsole(stderr=True)
    if display := _notebook():
        yield Notebook(meta_steps, display)
    elif not console.is_terminal:
        yield PlainLines(meta_steps)
    else:
        with bar(console) as progress:
            yield Bar(progress, meta_steps)


def bar(console: PlainConsole) -> Rows:
    """Return the bar of a terminal. A narrow terminal has a shorter bar, and no rate below 66 columns."""
    first, rate = (TextColumn(t, table_column=_fixed()) for t in ("{task.description}", "{task.fields[rate]}"))
    wide = [rate] if console.width >= 66 else []
    count, left = MofNCompleteColumn(table_column=_fixed()), TimeRemainingColumn(table_column=_fixed())
    width = max(4, min(40, console.width - 56 if wide else console.width - 36))
    return Rows(first, BarColumn(width), count, *wide, left, console=console, transient=False)


def _fixed() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


def _notebook() -> Any:
    """Return IPython's ``display`` where this process is the kernel of a notebook; None elsewhere."""
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python else None
    return sys.modules["IPython.display"].display if python and hasattr(shell, "kernel") else None


def _text(line: str) -> dict[str, str]:
    return {"text/plain": printable(line)}


def _test(tasks: int) -> str:
    return f"test on {tasks} tasks"


def _report(report: Mapping[str, float]) -> str:
    shown = (
        ("return", "kl", "entropy", "explained_variance")
        if "return" in report
        else [k for k in report if k not in ("gradient_norm", "lr")]
    )
    return "  ".join(f"{k} {report[k]:.4f}" for k in shown if k in report)


def _score(evaluation: Evaluation) -> str:
    note = f" ({evaluation.left_out_note})" if evaluation.left_out else ""
    return f"{evaluation.metric} {evaluation.score:.4f} ± {evaluation.score_ci95:.4f}{note}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
