"""Episodes whose training images are changed at random."""

from __future__ import annotations

from dataclasses import dataclass

from metadist.core.errors import ConfigError, one_of
from metadist.tasks.augmentation import Augmentation, Flip
from metadist.tasks.episodes import Episodes


@dataclass(frozen=True, kw_only=True)
class AugmentedEpisodes(Episodes):
    """In training, and there alone, ``crop``, ``flip``, ``rotation`` and ``colour`` change images at random.

    ``augmentation.Augmentation`` defines them.
    """

    crop: float = 0.0
    flip: Flip = "none"
    rotation: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("tasks.flip", self.flip, ("none", "horizontal", "vertical", "both"))
        for key, value, below in (("crop", self.crop, 1), ("colour", self.colour, 1), ("rotation", self.rotation, 180)):
            if not 0 <= value <= below or (key == "crop" and value == 1):
                raise ConfigError(f"tasks.{key} = {value}: must be from 0 to {below}{' (degrees)' * (below == 180)}")

    def augmentation_in(self, split: str) -> Augmentation | None:
        chosen = Augmentation(self.crop, self.flip, self.rotation, self.colour)
        return chosen if split == "train" and chosen else None
