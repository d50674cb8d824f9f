"""Draw the figures of a run as PNG files.

Inputs are plain numbers, NumPy arrays or torch tensors. Matplotlib is imported on first use, and never through pyplot:
no global state changes and no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#d9730d", "#2a8a4a", "#c8322b", "#6b7280"
_LOG_RATIO = 30.0  # positive curves that fall by more than this factor get a logarithmic axis
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def learning_curve(
    path: str | Path,
    steps: Any,
    train_values: Any,
    validation: Sequence[tuple[int, float, float]],
    metric_name: str,
    note: str = "",
) -> Path:
    """Draw the training metric over meta-steps, and the validation: (step, mean, 95 % CI).

    ``note`` stands in the title; it says that validation tasks were left out. The points of the training metric are
    faint; their running median is bold.
    """
    with _figure(path, 7.2, 4.2) as figure:
        axes = figure.add_subplot()
        x, y = _array(steps), _array(train_values)
        if len(y):
            smooth = _running_median(y, len(y) // 50)
            axes.plot(x, y, color=BLUE, alpha=0.22, linewidth=0.9)
            few = len(y) < 50
            axes.plot(
                x,
                smooth,
                color=BLUE,
                marker="." if few else "",
                label="training meta-batch" + ("" if few else " (running median)"),
            )
        if len(validation):
            at, mean, ci = np.asarray([tuple(map(float, point)) for point in validation]).T
            axes.errorbar(
                at,
                mean,
                yerr=ci,
                color=ORANGE,
                marker="o",
                markersize=4,
                capsize=3,
                elinewidth=1.2,
                label="validation, 95 % CI",
            )
        axes.set(xlabel="meta-step", ylabel=_label(metric_name), title=_titled(f"Learning curve: {metric_name}", note))
        _scale(axes, np.concatenate([y, [v[1] for v in validation]]) if len(validation) else y)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(_integers())
        axes.xaxis.set_major_formatter(_thousands())
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return Path(path)


def adaptation_curve(path: str | Path, mean: Any, ci: Any, metric_name: str, split: str, note: str = "") -> Path:
    """Draw the metric on query sets after 0, 1, …, k inner steps, with its 95 % confidence band.

    ``note`` stands in the title; it says that tasks were left out.
    """
    mean, ci = _array(mean), _array(ci)
    steps = np.arange(len(mean))
    with _figure(path, 6.0, 4.2) as figure:
        axes = figure.add_subplot()
        axes.fill_between(steps, mean - ci, mean + ci, color=BLUE, alpha=0.2, linewidth=0, label="95 % CI")
        axes.plot(steps, mean, color=BLUE, marker="o", markersize=5, label="mean over tasks")
        falling = len(mean) > 1 and mean[-1] < mean[0]
        for step in sorted({0, 1, len(mean) - 1} & set(steps.tolist())):
            axes.annotate(
                f"{mean[step]:.3g}",
                (step, mean[step]),
                textcoords="offset points",
                xytext=(9, 8 if falling else -15),
                fontsize=9.5,
                color="#111827",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            )
        axes.set(xlabel="inner-loop steps", ylabel=_label(metric_name))
        axes.set_title(_titled(f"Adaptation to new tasks: {metric_name}, {split} split", note))
        axes.xaxis.set_major_locator(_integers())
        _scale(axes, mean - ci)
        axes.margins(x=0.08, y=0.12)
        axes.legend(loc="upper right" if falling else "lower right")
    return Path(path)


def sinusoid_fits(path: str | Path, tasks: Sequence[Mapping[str, Any]]) -> Path:
    """Draw regression tasks side by side: the true curve, the support points, and the predictions.

    A task has ``x_support``, ``y_support``, ``x_curve``, ``y_true`` and ``predictions``: {number of inner steps: y on
    ``x_curve``}.
    """
    columns = min(3, max(1, len(tasks)))
    rows = max(1, math.ceil(len(tasks) / columns))
    with _figure(path, 3.9 * columns, 3.1 * rows + 0.7) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, task in zip(grid.flat, tasks, strict=False):
            _draw_fit(axes, task)
        for axes in list(grid.flat)[len(tasks) :]:
            axes.set_visible(False)
        for index, axes in enumerate(list(grid.flat)[: len(tasks)]):
            axes.set_title(tasks[index].get("title", f"task {index}"))
            axes.set_xlabel("x")
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("y")
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
        figure.suptitle("Few-shot regression: predictions before and after adaptation")
    return Path(path)


def _draw_fit(axes: Axes, task: Mapping[str, Any]) -> None:
    """Draw the curve, the predictions and the support set of one regression task."""
    x = _array(task["x_curve"])
    order = np.argsort(x)
    axes.plot(
        x[order],
        _array(task["y_true"])[order],
        color="#111827",
        linewidth=2.4,
        alpha=0.35,
        label="true function",
    )
    predictions = sorted(task["predictions"].items())
    for place, (steps, y) in enumerate(predictions):
        before = steps == 0
        axes.plot(
            x[order],
            _array(y)[order],
            color=GREY if before else _shade(place, len(predictions)),
            linestyle="--" if before else "-",
            linewidth=1.5,
            label="before adaptation" if before else f"after {steps} inner step{'s' * (steps != 1)}",
        )
    axes.plot(
        _array(task["x_support"]),
        _array(task["y_support"]),
        linestyle="",
        marker="^",
        markersize=7,
        color=RED,
        markeredgecolor="white",
        zorder=5,
        label="support set",
    )


def episode_sheet(path: str | Path, episode: Mapping[str, Any], max_queries: int = 10) -> Path:
    """Draw a classification episode: a row per class with its support images and its query images.

    The frame of a query image is green where its prediction is right, and red where it is wrong.

    ``episode`` has ``support`` and ``query`` images ([N, C, H, W] or [N, H, W], any value range), ``support_labels``,
    ``query_labels``, ``predicted``, and optionally ``classes`` (names) and ``title``.
    """
    support, query = _images(episode["support"]), _images(episode["query"])
    support_labels, labels = _array(episode["support_labels"]), _array(episode["query_labels"])
    predicted = _array(episode["predicted"])
    classes = np.unique(np.concatenate([support_labels, labels])).astype(int)
    names = episode.get("classes") or [f"class {c}" for c in classes]
    # A dollar sign would begin a formula.
    texts = [(n if len(n) <= 24 else f"…{n[-23:]}").replace("$", r"\$") for n in names]
    name_of = dict(zip(classes.tolist(), texts, strict=False))
    n_support = min(10, max(int((support_labels == c).sum()) for c in classes))
    n_query = min(max_queries, max(int((labels == c).sum()) for c in classes))
    with _figure(path, max(4.8, 1.4 + 0.92 * (n_support + n_query)), 1.5 + 1.08 * len(classes)) as figure:
        grid = figure.subplots(
            len(classes), n_support + n_query + 1, squeeze=False, width_ratios=[1] * n_support + [0.25] + [1] * n_query
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for row, label in zip(grid, classes, strict=True):
            for axes, image in zip(row[:n_support], support[support_labels == label], strict=False):
                _show(axes, image, GREY)
            row[0].text(
                -0.12, 0.5, name_of[int(label)], transform=row[0].transAxes, ha="right", va="center", fontsize=9
            )
            mine = labels == label
            for axes, image, guess in zip(row[n_support + 1 :], query[mine], predicted[mine], strict=False):
                right = guess == label
                _show(axes, image, GREEN if right else RED)
                if not right:
                    axes.set_xlabel(f"→ {name_of.get(int(guess), guess)}", fontsize=8, color=RED, labelpad=3)
        grid[0, 0].set_title("support", loc="left", fontsize=10)
        grid[0, n_support + 1].set_title("query", loc="left", fontsize=10)
        right = int((predicted == labels).sum())
        title = episode.get("title", f"A sampled {len(classes)}-way episode")
        figure.suptitle(f"{title}\n{right} of {len(labels)} queries right", fontsize=11)
        figure.supxlabel("query frames: green, predicted right; red, wrong (→ prediction)", fontsize=8, color=GREY)
    return Path(path)


class _figure:
    """A styled figure that is saved at the end of the ``with`` block."""

    def __init__(self, path: str | Path, width: float, height: float) -> None:
        self.path, self.size = Path(path), (width, height)

    def __enter__(self) -> Figure:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.style = rc_context(_STYLE)
        self.style.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        FigureCanvasAgg(self.figure)
        return self.figure

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.figure.savefig(self.path, dpi=150)
        finally:
            self.style.__exit__(None, None, None)


def _array(values: Any) -> np.ndarray:
    """Return a list, an array, or a tensor on any device as a flat float array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray(values, dtype=float).reshape(-1)


def _images(values: Any) -> np.ndarray:
    """Return images as [N, H, W] or [N, H, W, 3] in 0…1."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    images = np.asarray(values, dtype=float)
    if images.ndim == 4:
        images = images[:, :3].transpose(0, 2, 3, 1) if images.shape[1] >= 3 else images[:, 0]
    low, high = images.min(), images.max()
    return (images - low) / (high - low or 1.0)


def _show(axes: Axes, image: np.ndarray, colour: str) -> None:
    axes.set_axis_on()
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.0 if colour == GREY else 3.0)


def _running_median(values: np.ndarray, half: int) -> np.ndarray:
    if half <= 1:
        return values
    padded = np.pad(values, half, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)


def _scale(axes: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > _LOG_RATIO:
        axes.set_yscale("log")


def _titled(title: str, note: str) -> str:
    return f"{title}\n{note}" if note else title


def _label(metric: str) -> str:
    """Return the metric with its unit."""
    name = metric.rsplit("/", 1)[-1].lower()
    if "acc" in name:
        return f"{metric} (fraction of queries)"
    if "mse" in name:
        return f"{metric} (squared units of y)"
    if "loss" in name or "entropy" in name:
        return f"{metric} (mean per example)"
    return metric


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 2.5, 5, 10])


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.0f}")


def _shade(place: int, count: int) -> tuple[float, float, float]:
    """Return a blue, darker for later predictions."""
    weight = 0.45 + 0.55 * (place + 1) / count
    return tuple(1 - weight * (1 - int(BLUE[i : i + 2], 16) / 255) for i in (1, 3, 5))  # type: ignore[return-value]
