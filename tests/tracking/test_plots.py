from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib import image

from metadist.tracking import plots

pytestmark = pytest.mark.renders


def drawn(path) -> tuple[int, int]:
    """The size of the picture, which must not be blank."""
    pixels = image.imread(path)
    assert pixels[..., :3].std() > 0.01
    return pixels.shape[:2]


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("points", [0, 1, 5, 400])
@pytest.mark.parametrize("evaluations", [0, 1, 7])
def test_learning_curve_of_any_length(tmp_path, points, evaluations):
    validation = [(100 * i, 0.5 + 0.01 * i, 0.02) for i in range(evaluations)]
    values = torch.linspace(3, 0.01, points, dtype=torch.bfloat16)
    path = plots.learning_curve(tmp_path / "new/curve.png", range(points), values, validation, "eval/mse")
    drawn(path)


def test_learning_curve_with_non_finite_values(tmp_path):
    drawn(plots.learning_curve(tmp_path / "c.png", [0, 1, 2], [float("nan"), float("inf"), 1.0], [], "loss"))


@pytest.mark.parametrize("steps", [1, 2, 11])
def test_adaptation_curve(tmp_path, steps):
    mean = np.linspace(0.2, 0.9, steps)
    drawn(plots.adaptation_curve(tmp_path / "a.png", mean, torch.full((steps,), 0.01), "accuracy", "test"))


def test_titles_say_how_many_tasks_were_left_out(tmp_path, monkeypatch):
    said, note = [], "8 of 500 left out: not finite"
    monkeypatch.setattr(plots, "_titled", lambda *parts: said.append(parts) or "\n".join(parts))
    drawn(plots.adaptation_curve(tmp_path / "a.png", [0.2, 0.9], [0.1, 0.1], "accuracy", "test", note))
    drawn(plots.learning_curve(tmp_path / "c.png", [0, 1], [1.0, 0.5], [(1, 0.5, 0.1)], "accuracy", note))
    assert [last for *_, last in said] == [note, note]


@pytest.mark.parametrize("count", [1, 4])
def test_sinusoid_fits(tmp_path, count):
    x = torch.linspace(-5, 5, 50)[:, None]
    task = {"x_support": x[::5], "y_support": x[::5].sin(), "x_curve": x, "y_true": x.sin()}
    drawn(
        plots.sinusoid_fits(tmp_path / "s.png", [{**task, "predictions": {0: 0 * x, 1: x.cos(), 5: x.sin()}}] * count)
    )


@pytest.mark.lane("numerics")
@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (3, 20, 20)])
def test_episode_sheet_frames_what_is_right_and_wrong(tmp_path, shape):
    episode = {
        "support": torch.rand(6, *shape),
        "support_labels": torch.arange(3).repeat(2),
        "query": torch.rand(12, *shape),
        "query_labels": np.arange(12) % 3,
        "predicted": torch.tensor([0, 1, 2] * 3 + [1, 2, 0]),
        "classes": ["a", "b", "c"],
    }
    path = plots.episode_sheet(tmp_path / "e.png", episode)
    drawn(path)
    pixels = (image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)

    def area(colour: str) -> int:
        return (abs(pixels - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(-1) < 3).sum()

    assert area(plots.GREEN) == pytest.approx(3 * area(plots.RED), rel=0.2), "nine right, three wrong"
