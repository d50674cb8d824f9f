from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib import image

from metadist.tracking import trial_plots as plots

pytestmark = pytest.mark.renders


def drawn(path) -> None:
    assert image.imread(path)[..., :3].std() > 0.01


@pytest.mark.parametrize("episodes", [1, 2, 12])
def test_speeds_of_every_episode_stand_over_their_targets(tmp_path, episodes):
    targets = torch.linspace(0, 3, 20)
    means = [targets * (0.5 + 0.05 * n) for n in range(episodes)]
    drawn(plots.speeds_against_targets(tmp_path / "new/speeds.png", targets, means))


@pytest.mark.parametrize("first", [0, 1])
def test_returns_with_and_without_intervals(tmp_path, first):
    curves = {"ours": ([1.0, 2.0, 2.5], [0.1, 0.1, 0.1]), "random": ([1.0, 1.0, 1.0], None)}
    drawn(plots.returns_by_episode(tmp_path / "returns.png", curves, "return", "test", first=first))


def test_trials_in_a_grid_and_on_a_plane(tmp_path):
    drawn(
        plots.grid_trials(
            tmp_path / "grid.png",
            5,
            (2, 3),
            {"before": [[(0, 0), (1, 0)]], "after": [[(0, 0), (0, 1)], [(0, 0), (1, 1)]]},
        )
    )
    walks = [torch.randn(9, 2), torch.randn(4, 2)]
    drawn(plots.planar_trials(tmp_path / "plane.png", [(0.1, 0.2), (0.3, -0.4)], [walks, walks]))
