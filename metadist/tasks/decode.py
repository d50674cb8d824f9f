"""Decode encoded pictures to square images of 8 bits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from metadist.core.errors import DataError

#: Pillow's names of the formats that are read, whatever a file is called: others start programs (EPS: Ghostscript)
FORMATS = (
    *("PNG", "JPEG", "JPEG2000", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI"),
    *("ICO", "PSD", "DDS"),
)
#: the tag of a TIFF file that holds the number of bits of a sample
_BITS_PER_SAMPLE = 258


def opened(data: bytes) -> Any:
    """Open encoded bytes as an image of Pillow, which raises where the format is none of ``FORMATS``."""
    from PIL import Image

    Image.init()  # registers the formats of this version of Pillow
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


@dataclass(frozen=True)
class Decode:
    """Decode encoded bytes to a square image u8 [channels, size, size].

    The image is turned as its EXIF says, transparent pixels become white, and the longer side is cropped about the
    centre (LANCZOS filter). ``invert`` makes dark ink on light paper bright on dark.

    ``white`` is the value of a white pixel in grey images of more than 8 bits or of floating-point numbers: 65535 for
    16 bits, 4095 for 12 bits in files of 16 bits, 1 for numbers in [0, 1]; brighter pixels become white. Without it,
    16 bits are taken for 16 bits, and an image that is black then, or whose numbers have another range, is refused.
    """

    size: int
    channels: int
    invert: bool
    white: float | None = None

    def __call__(self, where: str, read: Callable[[], bytes]) -> np.ndarray:
        try:
            return self.pixels(opened(read()))
        except _Scale as error:
            raise DataError(f"{where}: {error}") from error
        except DataError:
            raise
        except Exception as error:  # Pillow raises a dozen types, SyntaxError and struct.error among them
            raise DataError(f"{where} is not a readable image ({error}); replace or remove it") from error

    def pixels(self, image: Any) -> np.ndarray:
        """Return the pixels of an image of Pillow. Raises DataError for values whose scale is unknown."""
        from PIL import Image, ImageOps

        deep_colour = image.mode in ("RGB", "RGBA", "LA") and _is_deep(image)
        bits = _bits(image)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray(self._from_integers(np.asarray(image), bits))
        elif image.mode == "F":
            image = self._from_floats(image)
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        if deep_colour and np.asarray(image).max() < 16:  # Pillow keeps the high byte of 16-bit colours
            raise _Scale(
                "16-bit colours that are black as 16 bits; are they 12-bit numbers? Convert the file to 8 bits"
            )
        if self.invert:
            image = ImageOps.invert(image)  # before the filter: its rounding is not symmetric
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def _from_integers(self, values: np.ndarray, bits: int) -> np.ndarray:
        """Return ⌊256 v / (white + 1)⌋: for 16 bits, the high byte."""
        low, high = int(values.min()), int(values.max())
        white = self.white
        if white is None:
            if low < 0 or high > 65535:
                raise _Scale(f"its values are {low} to {high}, not 0 to 65535; set tasks.white to the value of white")
            if high < 4096 and 8 < bits < 16:
                white = 2.0**bits - 1
            elif 0 < high < 4096:
                raise _Scale(
                    f"a 16-bit image whose largest value is {high}: black as 16 bits; set tasks.white to the value of "
                    "white: 4095 for 12 bits, 65535 for 16"
                )
            else:
                white = 65535.0
        clipped = np.clip(values.astype(np.float64), 0.0, white)  # exact: float64 holds 32 bits
        return np.asarray(np.floor(clipped * 256.0 / (white + 1.0)), np.uint8)

    def _from_floats(self, image: Any) -> Any:
        from PIL import Image

        values = np.asarray(image, np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(values).all():
            raise _Scale("it holds NaN or Inf; replace or remove it")
        if self.white is not None:
            return Image.fromarray(np.rint(np.clip(values / self.white, 0.0, 1.0) * 255.0).astype(np.uint8))
        if (low, high) != (0.0, 0.0) and (low < 0.0 or not 1.0 < high <= 255.0):
            raise _Scale(
                f"floating-point values in {low:g} … {high:g}; set tasks.white to the value of white, for example 1"
            )
        return image

    def all(self, images: Iterable[tuple[str, Callable[[], bytes]]], count: int) -> np.ndarray:
        """Decode ``count`` images of (name, function that reads the bytes) to u8 [count, channels, size, size]."""
        pixels = np.empty((count, self.channels, self.size, self.size), np.uint8)
        with ThreadPoolExecutor(8) as pool:
            for i, decoded in enumerate(pool.map(lambda image: self(*image), images)):
                pixels[i] = decoded
        return pixels

    def source(self, what: str) -> str:
        """Return a text that identifies ``what`` as decoded by this version of Pillow, for ``images.cached``."""
        import PIL

        return f"{what} {self} pillow {PIL.__version__}"


class _Scale(DataError):
    """The values of a picture have an unknown scale."""


def _bits(image: Any) -> int:
    """Return the bits of a sample as the file states them: a TIFF file can hold 12 bits; otherwise 16."""
    found = dict(getattr(image, "tag_v2", {})).get(_BITS_PER_SAMPLE, 16)
    return int(found[0] if isinstance(found, tuple) else found)


def _is_deep(image: Any) -> bool:
    """Return whether the file holds 16 bits for each colour, of which Pillow keeps eight."""
    raw = [entry[3] for entry in getattr(image, "tile", ()) if len(entry) > 3]
    return any(";16" in str(mode[0] if isinstance(mode, tuple) else mode) for mode in raw)
