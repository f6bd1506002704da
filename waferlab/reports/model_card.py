"""The card of a model: what it is for and not for, how good it is, and where it fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from waferlab.reports.pages import to_html
from waferlab.reports.tables import Record
from waferlab.reports.templating import best_model, classes_absent, fill_in
from waferlab.tracking.whole_files import write_atomically

FEW_MAPS = 30  # a class with fewer in the test part: one map more or less moves its recall by over 3 points
PICTURES = ("confusion_matrix.png", "risk_coverage.png", "sample_predictions.png")


def write_model_card(summary: Record, *, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes MODEL_CARD.md and model_card.html for the best model of a pipeline's run.

    The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv 1810.03993).

    Args:
        summary: of the pipeline (`experiment_summary.json`).
        folder: where the cards go; those of `PICTURES` that are there are shown.

    Returns:
        The Markdown and the HTML file.
    """
    folder, model = Path(folder), best_model(summary)
    pictures = [Path(name) for name in PICTURES if (folder / name).is_file()]
    card = fill_in("model_card", summary=summary, model=model, pictures=pictures, **_limits(model["test"]))
    markdown = write_atomically(folder / "MODEL_CARD.md", card.encode(errors="backslashreplace"))
    return markdown, write_atomically(
        folder / "model_card.html", to_html(card, folder=folder).encode(errors="backslashreplace")
    )


def _limits(test: Record) -> dict[str, Any]:
    """What the test part cannot tell of the classes, and which of them go wrong."""
    known = {name: row for name, row in test["per_class"].items() if row["support"]}
    weakest = sorted(known.items(), key=lambda item: item[1]["f1"])[:3]
    return {
        "known": known,
        "absent": classes_absent(test),
        "few_maps": FEW_MAPS,
        "few": [f"{name} ({row['support']})" for name, row in known.items() if row["support"] < FEW_MAPS],
        "alone": [name for name, row in known.items() if row["f1_interval"] is None],
        "weakest": [f"{name} (F1 {row['f1']:.3f})" for name, row in weakest],
        "confusions": _confusions(test),
    }


def _confusions(test: Record) -> list[str]:
    """The three most frequent errors."""
    names, counts = list(test["per_class"]), np.array(test["confusion_matrix"])
    np.fill_diagonal(counts, 0)
    cells = np.argsort(-counts, axis=None, kind="stable")[:3]
    worst = [divmod(int(cell), len(names)) for cell in cells if counts.flat[cell]]
    return [f"{names[true]} taken for {names[named]} ({counts[true, named]})" for true, named in worst]
