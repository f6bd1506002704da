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
# Percent of a baseline of 0.72, which each component was said to add.
GAINS = {"pretraining": 16.7, "augmentation": 5.6, "balancing": 4.2, "optuna": 8.3, "all together": 20.8}


def table_of_the_idea(
    comparison: dict[str, Any], pruning: dict[str, Any], ablation: dict[str, Any], ablation_few: dict[str, Any]
) -> list[str]:
    """A row for each family; below it, a row for each component, added to nothing else."""
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
        "",
        *rows(
            "component, quoted, measured on all real maps, measured on 100 real maps per class",
            [[one, f"+{gain}%", gained(one, ablation), gained(one, ablation_few)] for one, gain in GAINS.items()],
        ),
        "",
        "Percent of the baseline's macro F1, small CNN, each component alone; in brackets the interval of the ablation "
        "above, corrected for the number of comparisons.",
    ]


def gained(component: str, ablation: dict[str, Any]) -> str:
    """What a component alone added to the baseline, in percent of it, with its interval."""
    base = next(variant["mean"] for variant in ablation["variants"] if variant["name"] == "baseline")
    alone = [effect for effect in ablation["effects"] if effect["context"] == "alone"]
    one = next(effect for effect in [*alone, ablation["together"]] if effect["component"] == component)
    middle, low, high = (f"{100 * value / base:+.1f}%" for value in (one["difference"], *one["interval"]))
    return f"{middle} [{low}, {high}]"
