"""Wafers, drawn round and die by die."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch

from waferlab.reports.style import FAIL_COLOUR, PASS_COLOUR, WAFER_COLOUR


def wafer_sheet(width: float, height: float, *, title: str, y: float) -> tuple[Figure, Axes]:
    """An empty sheet for many wafers, with a title and what the colours of dies mean.

    It is one pair of axes, measured in inches, y downwards: two dozen of them would take much longer to draw.

    Args:
        width: inches.
        height: inches.
        title: of the figure.
        y: of the title's middle.
    """
    figure = Figure((width, height))
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    sheet.set_axis_off()
    sheet.text(0.25, y, title, fontsize=16, fontweight="bold", va="center")
    dies = [Patch(color=PASS_COLOUR, label="die passed"), Patch(color=FAIL_COLOUR, label="die failed")]
    place = {"loc": "center right", "bbox_to_anchor": (width - 0.1, y), "bbox_transform": sheet.transData}
    sheet.legend(handles=dies, ncols=2, **place)
    return figure, sheet


def draw_wafer(
    sheet: Axes, wafer_map: np.ndarray, *, x: float, y: float, radius: float, colours: np.ndarray | None = None
) -> None:
    """A round wafer with its dies as cells: dies are rarely square, so rows and columns are stretched to the circle.

    Args:
        sheet: axes in inches, y downwards.
        wafer_map: uint8 [rows, columns], 0 no die / 1 pass / 2 fail.
        x: of the middle.
        y: of the middle.
        radius: of the dies' circle.
        colours: uint8 [rows, columns, 4], RGBA of each die; None for those of passed and failed dies.
    """
    sheet.add_patch(Circle((x, y), radius * 1.04, facecolor="none", edgecolor=WAFER_COLOUR, linewidth=0.9))
    extent = (x - radius, x + radius, y + radius, y - radius)
    image = wafer_image(die_colours(wafer_map) if colours is None else colours)
    sheet.imshow(image, extent=extent, aspect="auto", interpolation="antialiased", zorder=2)


def die_colours(wafer_map: np.ndarray, passed: str = PASS_COLOUR, failed: str = FAIL_COLOUR) -> np.ndarray:
    """RGBA of each die, uint8 [rows, columns, 4], transparent where there is none."""
    colours = np.zeros((3, 4), dtype=np.uint8)
    for value, colour in ((1, passed), (2, failed)):
        colours[value] = [*bytes.fromhex(colour[1:]), 255]
    return colours[wafer_map]


def wafer_image(dies: np.ndarray, *, pixels: int = 400) -> np.ndarray:
    """Dies uint8 [rows, columns, 4] as a picture [pixels, pixels, 4], with streets between dies of some size."""
    rows, columns = (np.flatnonzero(dies[..., 3].any(axis=axis)) for axis in (1, 0))
    if len(rows):  # some sources pad their maps; the circle is that of the dies
        dies = dies[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = (((np.arange(pixels) + 0.5) * size / pixels) for size in dies.shape[:2])
    image = dies[np.ix_(y.astype(np.int64), x.astype(np.int64))]
    if max(dies.shape) <= 64:  # streets between smaller dies would be thinner than a pixel of the figure
        image[np.abs(y % 1 - 0.5) > 0.43] = 0
        image[:, np.abs(x % 1 - 0.5) > 0.43] = 0
    return image
