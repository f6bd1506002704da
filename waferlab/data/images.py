"""From die maps to the images that networks see: resized, encoded, augmented, turned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from waferlab.data.maps import WaferMaps

LEVEL_SCALE = 127  # resized maps keep grey values between the levels: 0 no die, 127 pass, 254 fail
DIE_NOISE = 0.01  # share of pixels whose pass and fail are swapped during augmentation


def resize_maps(maps: WaferMaps, image_size: int) -> torch.Tensor:
    """Resizes all maps into one uint8 tensor [N, 1, image_size, image_size], values 0 no die .. 127 pass .. 254 fail.

    Maps of one size are resized together, as many at a time as stay in the processor's cache.
    """
    out = torch.empty(len(maps), 1, image_size, image_size, dtype=torch.uint8)
    sizes, size_of = np.unique(maps.shapes, axis=0, return_inverse=True)
    by_size = np.split(np.argsort(size_of, kind="stable"), np.cumsum(np.bincount(size_of))[:-1])
    for (rows, columns), members in zip(sizes, by_size, strict=True):
        chunk = max(1, 2**17 // (rows * columns))
        for start in range(0, len(members), chunk):
            some = members[start : start + chunk]
            out[some] = resize_dies(torch.from_numpy(np.stack([maps[i] for i in some])), image_size)
    return out


def resize_dies(dies: torch.Tensor, image_size: int) -> torch.Tensor:
    """uint8 [N, h, w] with values 0 to 2 to uint8 [N, 1, image_size, image_size] with values 0 to 254.

    What `torch.nn.functional.interpolate` does with mode="bilinear" and antialias=True, so that a thin scratch on a
    large map fades into grey rather than vanish between the sampled dies. It is written as one matrix for the rows and
    one for the columns, so that it can be exported for maps of any size, and in whole numbers, which float64 holds
    exactly up to the one division: a grey value halfway between two levels is rounded up wherever this runs.
    """
    rows, columns = (_resize_weights(side, image_size, like=dies) for side in dies.shape[-2:])
    whole = rows.sum(1)[:, None] * columns.sum(1)
    levels = (rows @ dies.unsqueeze(1).double() @ columns.T) * LEVEL_SCALE / whole
    return (levels + 0.5).floor().to(torch.uint8)


def _resize_weights(n_in: int, n_out: int, *, like: torch.Tensor) -> torch.Tensor:
    """Whole numbers in float64 [n_out, n_in], in proportion to the share of each die (column) in each pixel (row).

    A triangle around the pixel's centre, as wide as the pixel and never narrower than a die; lengths are in units of
    1 / (2 n_in n_out) of the map's side.
    """
    device, float64 = like.device, torch.float64
    die_width = torch.scalar_tensor(n_out, dtype=float64, device=device)
    pixel_width = torch.scalar_tensor(n_in, dtype=float64, device=device)
    pixels = (2 * torch.arange(n_out, dtype=float64, device=device) + 1) * pixel_width
    dies = (2 * torch.arange(n_in, dtype=float64, device=device) + 1) * die_width
    return (2 * torch.maximum(pixel_width, die_width) - (pixels[:, None] - dies).abs()).clamp(min=0)


def encode(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1, S, S] with values 0..254 to float32 in -1 (no die) .. 0 (pass) .. 1 (fail)."""
    return images.float().div_(LEVEL_SCALE).sub_(1.0)


def augment(images: torch.Tensor) -> torch.Tensor:
    """One of the eight symmetries of the square for each map, and light die noise; encoded float [N, 1, S, S]."""
    n = len(images)
    flips = torch.rand(3, n, 1, 1, 1, device=images.device) < 0.5
    images = torch.where(flips[0], images.flip(-1), images)
    images = torch.where(flips[1], images.flip(-2), images)
    images = torch.where(flips[2], images.transpose(-1, -2), images)
    swapped = (torch.rand_like(images) < DIE_NOISE) & (images >= 0)  # never where there is no die
    return torch.where(swapped, 1.0 - images, images)


def symmetries(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The eight views of a batch [N, 1, S, S]: four quarter turns, each also mirrored."""
    for turned in (images.rot90(k, (-2, -1)) for k in range(4)):
        yield turned
        yield turned.flip(-1)
