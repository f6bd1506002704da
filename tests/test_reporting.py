"""The promises of reporting.py: pages say what records say, need nothing but themselves, and show on a phone."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import CLASSES, LONG_NAME, assert_is_a_picture, make_predictions

import evaluation
import reporting

NAMES = (
    "lightning_cnn",
    "torchvision_resnet",
    "torchvision_efficientnet",
    "yolo_inspired",
    "vision_transformer",
    LONG_NAME,
)
HEAD = {
    "created": "2026-05-04T10:11:12+0000",
    "command": "python run_experiment.py --mode comparison --data 'my <b>maps</b>.npz'",
    "verdict": "One is ahead by 0.023. Two are not told apart.",
    "budget": "equal time: 50 s of training for each model and seed",
    "config": {"experiment_name": "wafers", "time_limit": 600, "learning_rate": None, "objectives": ["macro_f1"]},
    "environment": {"python": "3.11.7", "gpu": None, "cpu_cores": 4},
    "data": {"source": "my <b>maps</b>.npz", "maps": 1350, "lots": 117, "notes": ["3 maps | without a die left out"]},
    "interval_method": "95% t interval over 3 seeds (split, weights and batches change with the seed)",
    "difference_method": "mean paired difference over seeds with its 95% t interval, p by paired t test, Holm-corrected",
}


def make_comparison(n_models: int, *, n_seeds: int = 3) -> dict:
    """Macro F1 falls from model to model, by less than the seeds vary where two are not told apart."""
    rng = np.random.default_rng(n_models)
    models, runs = [], []
    for index, name in enumerate(NAMES[:n_models]):
        scores = 0.86 - 0.02 * index**1.3 + 0.01 * rng.normal(size=n_seeds)
        cost = {"train_seconds": 50.25 + index, "n_parameters": 309_561 * 6 ** (index % 3), "latency_ms": 1.234 + index}
        half = 0.0153 if n_seeds > 1 else None
        models.append(
            {
                "model_type": name, "n": n_seeds, "mean": scores.mean(), "std": scores.std() if half else None,
                "interval": [scores.mean() - half, scores.mean() + half] if half else None,
                "accuracy_mean": 0.911 - 0.01 * index, "epochs": 7.5, **cost,
            }
        )  # fmt: skip
        runs += [
            {
                "model_type": name, "seed": seed, "macro_f1": score, "macro_f1_interval": [score - 0.05, score + 0.04],
                "accuracy": score + 0.031, "validation_macro_f1": score + 0.017, "epochs": 7 + seed,
                "weights": "random (not asked for)", **cost,
            }
            for seed, score in enumerate(scores)
        ]  # fmt: skip
    differences = []
    if n_seeds > 1:
        for one, other in itertools.combinations(models, 2):
            gap = one["mean"] - other["mean"]
            differences.append(
                {
                    "a": one["model_type"], "b": other["model_type"], "difference": gap,
                    "interval": [gap - 0.021, gap + 0.021], "p": 0.0004 if abs(gap) > 0.04 else 0.123,
                    "p_corrected": 0.0012 if abs(gap) > 0.04 else 0.246, "significant": bool(abs(gap) > 0.04),
                }
            )  # fmt: skip
    seeds = list(range(n_seeds))
    return {
        "mode": "comparison", **HEAD, "seeds": seeds, "models": models, "runs": runs, "differences": differences
    }  # fmt: skip


def make_ablation(*, n_seeds: int = 3, components=("pretraining", "augmentation", "balancing", "optuna")) -> dict:
    """Augmentation helps, balancing harms, nothing is shown of the others."""
    gains = {"pretraining": 0.004, "augmentation": 0.0513, "balancing": -0.0317, "optuna": 0.0082}
    rng = np.random.default_rng(0)

    def variant(name: str, used: set[str]) -> dict:
        mean = 0.72 + sum(gains[component] for component in used)
        interval = [mean - 0.012, mean + 0.012] if n_seeds > 1 else None
        scores = (mean + 0.008 * (np.arange(n_seeds) - (n_seeds - 1) / 2)).tolist()
        flags = {component: component in used for component in components}
        return {
            "name": name, "components": flags, "scores": scores, "mean": mean, "interval": interval,
            "std": 0.008 if n_seeds > 1 else None,
        }  # fmt: skip

    everything = set(components)
    variants = [variant("baseline", set())]
    variants += [variant(f"baseline + {component}", {component}) for component in components]
    variants += [variant("everything", everything)]
    variants += [variant(f"everything but {component}", everything - {component}) for component in components]
    effects = []
    for component, context in itertools.product(components, ("alone", "left out")):
        gap = gains[component] + 0.001 * rng.normal()
        shown = abs(gap) > 0.02 and n_seeds > 1
        effects.append(
            {
                "component": component, "context": context, "difference": gap,
                "interval": [gap - 0.0155, gap + 0.0155] if n_seeds > 1 else None,
                "p": (0.0021 if shown else 0.312) if n_seeds > 1 else None,
                "p_corrected": (0.0168 if shown else 1.0) if n_seeds > 1 else None,
                "verdict": ("helps" if gap > 0 else "harms") if shown else "no effect shown",
            }
        )  # fmt: skip
    return {
        "mode": "ablation", **HEAD, "model_type": "lightning_cnn", "components": list(components),
        "seeds": list(range(n_seeds)), "variants": variants, "effects": effects,
    }  # fmt: skip
