"""The figures that the idea of this project quoted, beside those that were measured here; for `readme_tables.py`.

The idea gave ranges for nine classes and 1,350 maps, without data, seeds or a machine that could be asked again. The
rows of ours are those of the comparison on as many generated maps.
"""

from __future__ import annotations

from typing import Any

from measure import rows

# accuracy, F1, millions of weights
QUOTED = {
    "lightning_cnn": ("0.72 to 0.78", "0.70 to 0.76", 2.4),
    "torchvision_resnet": ("0.82 to 0.87", "0.80 to 0.85", 11.7),
    "torchvision_efficientnet": ("0.84 to 0.89", "0.82 to 0.87", 5.3),
    "yolo_inspired": ("0.78 to 0.83", "0.76 to 0.81", 3.2),
}


def table_of_the_idea(comparison: dict[str, Any], pruning: dict[str, Any]) -> list[str]:
    """A row for each family; below it, what was said of single components."""
    ours = {model["model_type"]: model for model in comparison["models"]}
    cells = []
    for name, (accuracy, f1, weights) in QUOTED.items():
        model = ours[name]
        low, high = model["interval"]
        ours_f1 = f"{model['mean']:.3f} [{low:.3f}, {high:.3f}]"
        sizes = [f"{weights:g}", f"{model['n_parameters'] / 1e6:.1f}"]
        cells.append([name, accuracy, f"{model['accuracy_mean']:.3f}", f1, ours_f1, *sizes])
    faster = pruning["against_none"]["halving"]["times_faster"]["median"]
    return [
        *rows(
            "model, accuracy as quoted, measured, F1 as quoted, measured, millions of weights as quoted, measured",
            cells,
        ),
        "",
        f"Ours: {comparison['budget']}; mean of {len(comparison['seeds'])} seeds. Pruning was quoted as 3 times "
        f"faster; measured: {faster:.2f} times.",
    ]
