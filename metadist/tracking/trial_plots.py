"""Draw the figures of a run in a meta-environment as PNG files: returns by episode, regret, and single trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metadist.tracking.plots import BLUE, GREEN, GREY, ORANGE, RED, _array, _figure, _integers

_COLOURS = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#1e293b")


def _style(place: int, label: str) -> dict[str, Any]:
    """Return the style of a curve: the policy's own is thick, and random play is a dotted grey line."""
    if label == "random":
        return {"color": GREY, "linestyle": ":"}
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "linewidth": 1.3 if place else 2.6,
        "alpha": 0.85 if place else 1.0,
        "zorder": 2 if place else 3,
    }


def returns_by_episode(
    path: str | Path, curves: Mapping[str, tuple[Any, Any | None]], metric: str, split: str, first: int = 1
) -> Path:
    """Draw curves of mean returns; the policy's own curve is the first.

    ``curves`` maps a label to the mean returns in the episodes 1, 2, … (or with ``first=0`` after 0, 1, … gradient
    steps) and to their 95 % CI, or None.
    """
    with _figure(path, 6.4, 4.2) as figure:
        axes = figure.add_subplot()
        for place, (label, (mean, ci)) in enumerate(curves.items()):
            mean, style = _array(mean), _style(place, label)
            episodes = np.arange(first, len(mean) + first)
            axes.plot(episodes, mean, marker="o" if len(mean) <= 20 else "", markersize=4, label=label, **style)
            if ci is not None:
                axes.fill_between(
                    episodes, mean - _array(ci), mean + _array(ci), color=style["color"], alpha=0.2, linewidth=0
                )
        axes.set(
            xlabel="episode of a trial" if first else "gradient steps",
            ylabel=metric,
            title=f"Adaptation within a trial, {split} split",
        )
        axes.xaxis.set_major_locator(_integers())
        axes.legend(fontsize=8.5)
    return Path(path)


def regret(path: str | Path, curves: Mapping[str, Any], oracle: str) -> Path:
    """Draw the cumulative regret against ``oracle``; ``curves`` maps a label to the regret in the episodes 1, 2, …."""
    with _figure(path, 6.4, 4.2) as figure:
        axes = figure.add_subplot()
        for place, (label, per_episode) in enumerate(curves.items()):
            total = np.cumsum(_array(per_episode))
            axes.plot(np.arange(1, len(total) + 1), total, label=label, **_style(place, label))
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set(
            xlabel="episode of a trial", ylabel=f"regret against {oracle}, summed up", title="Regret in the same trials"
        )
        axes.xaxis.set_major_locator(_integers())
        axes.legend(fontsize=8.5)
    return Path(path)


def grid_trials(
    path: str | Path, size: int, goal: tuple[int, int], trials: Mapping[str, Sequence[Sequence[tuple[int, int]]]]
) -> Path:
    """Draw a row of grids per trial, the goal marked; ``trials`` maps a label to the cells (x, y) of every episode."""
    columns = max(len(episodes) for episodes in trials.values())
    with _figure(path, 2.3 * columns, 2.5 * len(trials) + 0.4) as figure:
        grid = figure.subplots(len(trials), columns, squeeze=False)
        for row, (label, episodes) in zip(grid, trials.items()):
            for number, (axes, cells) in enumerate(zip(row, episodes), 1):
                axes.add_patch(_square(goal, GREEN))
                x, y = np.asarray(cells, float).T
                shift = np.linspace(-0.18, 0.18, len(x))  # steps over the same cells do not overlap
                axes.plot(x + shift, y + shift, color=BLUE, marker=".", linewidth=1.2)
                axes.plot(x[0] + shift[0], y[0] + shift[0], color=ORANGE, marker="s", markersize=7)
                axes.set(
                    xlim=(-0.5, size - 0.5),
                    ylim=(-0.5, size - 0.5),
                    xticks=np.arange(size) - 0.5,
                    yticks=np.arange(size) - 0.5,
                    aspect="equal",
                )
                axes.tick_params(labelbottom=False, labelleft=False, length=0)
                axes.set_title(f"{label}: episode {number}" if number == 1 else f"episode {number}", fontsize=9)
    return Path(path)


def planar_trials(path: str | Path, goals: Sequence[tuple[float, float]], trials: Sequence[Sequence[Any]]) -> Path:
    """Draw trials side by side: the goal and the positions [steps, 2] of every episode."""
    far = 1.1 * max(np.abs(_array(p)).max() for p in [goals, *(episode for trial in trials for episode in trial)])
    with _figure(path, 3.1 * len(trials), 3.4) as figure:
        row = figure.subplots(1, len(trials), squeeze=False)[0]
        for axes, goal, episodes in zip(row, goals, trials):
            for number, positions in enumerate(episodes):
                x, y = _array(positions[:, 0]), _array(positions[:, 1])
                axes.plot(
                    x,
                    y,
                    color=_COLOURS[number % len(_COLOURS)],
                    marker=".",
                    markersize=3,
                    linewidth=1.1,
                    label=f"episode {number + 1}",
                )
            axes.plot(*goal, color=GREEN, marker="*", markersize=15, linestyle="", label="goal (hidden)")
            axes.set(xlim=(-far, far), ylim=(-far, far), aspect="equal")
        row[0].legend(fontsize=8)
    return Path(path)


def speeds_against_targets(path: str | Path, targets: Any, means: Sequence[Any]) -> Path:
    """Draw the mean speeds of every episode [tasks] over the hidden target speeds [tasks], in metres per second."""
    targets = _array(targets)
    with _figure(path, 5.2, 4.8) as figure:
        axes = figure.add_subplot()
        ends = np.array([targets.min(), targets.max()])
        axes.plot(ends, ends, color=GREY, linestyle=":", label="the hidden speed")
        for number, speeds in enumerate(means):
            axes.plot(
                targets,
                _array(speeds),
                marker="o",
                markersize=5,
                linestyle="",
                color=_COLOURS[number % len(_COLOURS)],
                label=f"episode {number + 1}",
            )
        axes.set(
            xlabel="hidden target speed, m/s",
            ylabel="mean speed over the episode, m/s",
            title="Speed against target, held-out tasks",
        )
        axes.legend(fontsize=8.5)
    return Path(path)


def _square(cell: tuple[int, int], colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((cell[0] - 0.5, cell[1] - 0.5), 1, 1, color=colour, alpha=0.35, linewidth=0)
