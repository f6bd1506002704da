"""Wafer maps that are kept as images: a pixel a die, its brightness what became of the die."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from waferlab.data.maps import CLASS_NAMES, MAX_MAP_SIDE
from waferlab.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"}
IMAGE_FORMATS = ("PNG", "BMP", "JPEG", "TIFF")  # of Pillow, which would try all that it knows, whatever the suffix
IMAGE_LEVELS = ("auto", "three", "binary")
IMAGES_LOOKED_AT = 256  # to find out how a folder is to be read
GREYS = ("1", "L", "LA", "P", "RGB", "RGBA")  # kinds of Pillow that may hold grey levels of 8 bits
COLOURED = 16  # between the channels of a pixel: JPEG brings small differences into what was grey


def images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def class_of_folder(name: str) -> str | None:
    """The class that a folder's name means, as "edge_ring" does Edge-Ring; None if it means none."""
    meant = name.lower().replace("_", "-").replace(" ", "-")
    return next((one for one in CLASS_NAMES if one.lower() == meant), None)


def choose_levels(files: Sequence[Path], levels: str) -> str:
    """How images are read: `levels` itself, or for "auto" what some of the images, spread over all, look like.

    Returns:
        "three" if mid-greys are more than 5% of an image, else "binary".
    """
    if levels != "auto":
        return levels
    places = np.unique(np.linspace(0, len(files) - 1, min(len(files), IMAGES_LOOKED_AT)).astype(np.int64))
    greys = (_read_grey(files[place]) for place in places)
    return "three" if any(((grey > 63) & (grey < 192)).mean() > 0.05 for grey in greys) else "binary"


def levels_in_words(levels: str) -> str:
    """For people, what "three" and "binary" make of the pixels."""
    how = {
        "three": "three grey levels: below 64 no die, 64-191 pass, 192 and above fail",
        "binary": "two levels: 128 and above fail, the rest pass, no die outside the inscribed ellipse",
    }[levels]
    return f"{how} (image_levels={levels!r})"


def read_image(path: Path, levels: str) -> np.ndarray:
    """The map, uint8 [rows, columns], that an image shows; `levels` is "three" or "binary".

    Raises:
        DataError: it is no image, larger than a map may be, coloured, or of other levels than these.
    """
    return _three_levels(_read_grey(path)) if levels == "three" else _two_levels(_read_grey(path))


def _read_grey(path: Path) -> np.ndarray:
    import PIL.Image

    try:
        with PIL.Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_MAP_SIDE:
                raise DataError(
                    f"{path}: {image.size[0]}x{image.size[1]} pixels. At most {MAX_MAP_SIDE}: a pixel a die."
                )
            return _grey_levels(path, image)
    except DataError:
        raise
    except Exception as error:  # each of Pillow's readers has kinds of its own for a damaged file
        raise DataError(f"{path}: not a readable image ({error}). Remove it or save it as .png.") from error


def _grey_levels(path: Path, image: Image) -> np.ndarray:
    """uint8 [rows, columns]; what would be read as something that it does not show is refused."""
    save = "Save it in grey, 8 bits a pixel: 0 no die, 128 pass, 255 fail."
    if image.mode not in GREYS:
        raise DataError(f"{path}: its pixels are of the kind {image.mode}. {save}")
    if image.mode in ("P", "RGB", "RGBA"):
        channels = np.asarray(image.convert("RGB"))
        if np.ptp(channels, axis=2).max() > COLOURED:
            raise DataError(f"{path}: is in colours, and which of them means a failing die is not known. {save}")
    grey = np.asarray(image.convert("L"))
    if (brightest := int(grey.max())) in (1, 2):
        raise DataError(
            f"{path}: its brightest pixel is {brightest} of 255, as of die values that were kept as they are. {save}"
        )
    return grey


def _three_levels(grey: np.ndarray) -> np.ndarray:
    dies = (grey >= 64).view(np.uint8)
    dies += grey >= 192
    return dies


def _two_levels(grey: np.ndarray) -> np.ndarray:
    rows, columns = grey.shape
    y, x = np.ogrid[:rows, :columns]
    dies = np.ones_like(grey)
    dies[((x + 0.5) / columns * 2 - 1) ** 2 > 1 - ((y + 0.5) / rows * 2 - 1) ** 2] = 0
    dies[grey >= 128] = 2
    return dies
