"""The page of a batch: the verdict, what it rests on, pictures, what to do."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from waferlab.monitoring.reference import Reference, Sample
from waferlab.reports.monitor_figures import plot_class_mix, plot_distributions
from waferlab.reports.pages import to_html
from waferlab.reports.templating import fill_in
from waferlab.tracking.whole_files import write_atomically

MOST_COLUMNS = 3  # of the answers that are drawn


def write_batch_page(record: Mapping[str, Any], reference: Reference, batch: Sample, *, path: Path) -> Path:
    """Writes one HTML file that needs nothing else.

    Args:
        record: of `batch.batch_record`.
        reference: that the batch was compared with.
        batch: its maps.
        path: the file to write, whole or not at all.
    """
    with tempfile.TemporaryDirectory(prefix="wafer-page-") as folder:
        pictures = _draw(record, reference, batch, folder=Path(folder))
        html = to_html(fill_in("monitor", record=record, pictures=pictures), folder=folder)
    return write_atomically(path, html.encode(errors="backslashreplace"))


def _draw(record: Mapping[str, Any], reference: Reference, batch: Sample, *, folder: Path) -> dict[str, Path]:
    """File names by what they show, in the folder."""
    plot_class_mix(record["mix"], path=folder / "class_mix.png")
    sides = (reference.sample, batch)
    densities = {"Failing dies of a map (%)": tuple((100 * side.density, side.weights) for side in sides)}
    plot_distributions(densities, path=folder / "density.png", title="Fail density")
    drawn = {"class_mix": Path("class_mix.png"), "density": Path("density.png")}
    alarming = sorted((one for one in record["columns"] if one["alarms"]), key=lambda one: -one["effect"])
    if record["signals"][0]["alarms"]:
        names = list(reference.class_names)
        pairs = {
            f"Probability of {one['name']}": tuple(
                (side.probabilities[:, names.index(one["name"])], side.weights) for side in sides
            )
            for one in alarming[:MOST_COLUMNS]
        }
        plot_distributions(pairs, path=folder / "answers.png", title="Answers that differ most", top=np.float32(1))
        drawn["answers"] = Path("answers.png")
    return drawn
