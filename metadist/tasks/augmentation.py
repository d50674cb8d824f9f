"""Change training images at random: crops, flips, rotations and colours, as a pure function of the task's key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from metadist.core.random import uniform

Flip = Literal["none", "horizontal", "vertical", "both"]
#: random words of one image: angle, size and place (2) of the crop, flips (2), brightness, contrast, saturation
WORDS = 9
#: the angles that are drawn from, from -rotation to +rotation
_ANGLES = 4096


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each image of an episode; equal numbers of an image's words give equal bits.

    ``crop``: cut out a square whose side is 1 - crop to 1 of the image's, anywhere, and enlarge it. ``flip``: mirror
    along these axes, each with probability ½. ``rotation``: turn by up to so many degrees. Pixels are interpolated
    bilinearly; beyond the edge lies the edge's pixel. ``colour``: multiply brightness, contrast (about ½) and, with
    three channels, saturation by a factor in [1 - colour, 1 + colour].

    Every operation acts on single elements, because the order of a sum could depend on the shape of the shard.
    """

    crop: float = 0.0
    flip: Flip = "none"
    rotation: float = 0.0
    colour: float = 0.0

    def __bool__(self) -> bool:
        return self != Augmentation()

    @cached_property
    def _turns(self) -> Tensor:
        """Return cosine and sine of each angle, float64 [angles, 2]; Python's, which no vector's length changes."""
        angles = [math.radians(self.rotation * (2 * i / (_ANGLES - 1) - 1)) for i in range(_ANGLES)]
        return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)

    def __call__(self, images: Tensor, words: Tensor) -> Tensor:
        """Return changed copies of ``images``, float32 in [0, 1] [N, C, H, W], with the words int64 [N, WORDS]."""
        if self.crop or self.rotation or self.flip != "none":
            images = self._moved(images, words[:, :6])
        return self._coloured(images, words[:, 6:]) if self.colour else images

    def _moved(self, images: Tensor, words: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        zoom = uniform(words[:, 1], 1.0 - self.crop, 1.0).double()
        shift = (uniform(words[:, 2:4]).double() - 0.5) * (1.0 - zoom).unsqueeze(1)
        mirrored = 1.0 - 2.0 * (words[:, 4:6] >> 31).double()  # -1 or 1
        flips = torch.tensor([self.flip in ("vertical", "both"), self.flip in ("horizontal", "both")])
        sign = torch.where(flips.to(words.device), mirrored, torch.ones_like(mirrored)) * zoom.unsqueeze(1)
        cosine, sine = self._turns.to(words.device)[(words[:, 0] * _ANGLES) >> 32].unbind(1)
        if not self.rotation:
            cosine, sine = torch.ones_like(cosine), torch.zeros_like(sine)

        def column(t: Tensor) -> Tensor:
            return t.view(-1, 1, 1)

        # The pixel (y, x) of the result comes from the rotated, mirrored and shifted place in the image.
        y = torch.arange(height, dtype=torch.float64, device=words.device).view(1, -1, 1) - (height - 1) / 2
        x = torch.arange(width, dtype=torch.float64, device=words.device).view(1, 1, -1) - (width - 1) / 2
        y, x = y * column(sign[:, 0]), x * column(sign[:, 1])
        down = y * column(cosine) - x * column(sine) + (height - 1) / 2 + column(shift[:, 0]) * height
        right = y * column(sine) + x * column(cosine) + (width - 1) / 2 + column(shift[:, 1]) * width
        return _interpolated(images, down.clamp(0, height - 1), right.clamp(0, width - 1))

    def _coloured(self, images: Tensor, words: Tensor) -> Tensor:
        brightness, contrast, saturation = uniform(words, 1.0 - self.colour, 1.0 + self.colour).unbind(1)

        def each(t: Tensor) -> Tensor:
            return t.view(-1, 1, 1, 1)

        images = images * each(brightness)
        images = (images - 0.5) * each(contrast) + 0.5
        if images.shape[1] == 3:
            red, green, blue = images.unbind(1)
            grey = (red * 0.299 + green * 0.587 + blue * 0.114).unsqueeze(1)
            images = (images - grey) * each(saturation) + grey
        return images.clamp(0.0, 1.0)


def _interpolated(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return the images at the places (y, x), float64 [N, H, W] inside of the image, bilinearly."""
    height, width = images.shape[-2:]
    top, left = y.floor(), x.floor()
    down, right = (y - top).float().unsqueeze(1), (x - left).float().unsqueeze(1)
    top, left = top.long(), left.long()
    bottom, far = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    flat = images.flatten(-2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = (row * width + column).flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
        return flat.gather(2, index).view_as(images)

    above = at(top, left) * (1 - right) + at(top, far) * right
    below = at(bottom, left) * (1 - right) + at(bottom, far) * right
    return above * (1 - down) + below * down
