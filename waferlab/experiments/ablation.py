"""What each component brings, alone and left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, RunError
from waferlab.evaluation.statistics import (
    DIFFERENCE_METHOD,
    INTERVAL_METHOD,
    mean_score,
    paired_differences,
    scores_by_seed,
    test_over_train,
)
from waferlab.experiments.series import TrainingSeries, Variant, head, publish
from waferlab.reports.experiment_figures import plot_ablation
from waferlab.reports.tables import variants_table

COMPONENTS = {
    "pretraining": "use_pretrained",
    "augmentation": "data_augmentation",
    "balancing": "class_balancing",
    "optuna": "enable_optuna",
}


def ablate(config: ExperimentConfig, *, seeds: Sequence[int], **means: Any) -> dict[str, Any]:
    """Switches components on one by one and off one by one; writes ablation.json and returns the record.

    All variants get the same budget: one that searches has less of it for its final training.

    Args:
        config: names one model.
        seeds: of data, split, weights and batches.
        **means: `train`, `runs` and `terminal`, see `TrainingSeries`.

    Raises:
        ConfigError: the configuration names several models.
        RunError: a training failed; a comparison needs all of them.
    """
    if len(config.model_types()) != 1:
        raise ConfigError(f"model_type={config.model_type!r}: an ablation takes one model, for example lightning_cnn.")
    (model_type,) = config.model_types()
    switched = ablation_variants()
    variants = [Variant(name, model_type, _changes(on)) for name, on in switched.items()]
    series = TrainingSeries(config, variants, seeds, **means)
    series.terminal.say(
        f"Ablation of {model_type}, {len(variants)} variants, {len(series.seeds)} seeds; {series.budget()}"
    )
    with series.open():
        records = series.train_all()
        if series.failed:
            raise RunError(
                f"An ablation needs all of its trainings. {series.failures()} The others are kept: repeat the command "
                "with --resume once the reason is mended."
            )
        record = _record(series, model_type, switched, records)
        publish(series, record, (plot_ablation,), tables=[variants_table(record)])
    return record


def _record(
    series: TrainingSeries, model_type: str, switched: Mapping[str, Sequence[str]], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    *effects, together = _effects(records)
    return {
        **head(series.config, "ablation", series, records),
        "model_type": model_type,
        "components": list(COMPONENTS),
        "verdict": _ablation_verdict(effects, together, records),
        "variants": [
            {
                "name": name,
                "components": {component: component in on for component in COMPONENTS},
                "scores": list(scores_by_seed(records, name).values()),
                "weights": sorted({r["weights"] for r in records if r["variant"] == name}),
                **mean_score([*scores_by_seed(records, name).values()], test_over_train=test_over_train(records)),
            }
            for name, on in switched.items()
        ],
        "effects": effects,
        "together": together,
        "runs": records,
        "interval_method": INTERVAL_METHOD,
        "difference_method": DIFFERENCE_METHOD,
    }


def ablation_variants() -> dict[str, tuple[str, ...]]:
    """The variants by name, each with the components that are on."""
    everything = tuple(COMPONENTS)
    return {
        "baseline": (),
        **{f"baseline + {one}": (one,) for one in everything},
        "everything": everything,
        **{f"everything but {one}": tuple(c for c in everything if c != one) for one in everything},
    }


def _changes(on: Sequence[str]) -> dict[str, bool]:
    return {option: component in on for component, option in COMPONENTS.items()}


def _effects(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With a component minus without it: on top of nothing, and on top of all the others; last, all against nothing."""
    alone = [(f"baseline + {one}", "baseline") for one in COMPONENTS]
    left_out = [("everything", f"everything but {one}") for one in COMPONENTS]
    whole = [("everything", "baseline")]
    rows = paired_differences(records, [*alone, *left_out, *whole])
    labels = [(one, context) for context in ("alone", "left out") for one in COMPONENTS] + [("all together", "alone")]
    return [
        {
            "component": component,
            "context": context,
            **{key: row[key] for key in ("difference", "interval", "level", "p", "p_corrected")},
            "verdict": _effect_verdict(row),
        }
        for (component, context), row in zip(labels, rows, strict=True)
    ]


def _effect_verdict(row: Mapping[str, Any]) -> str:
    if not row["significant"]:
        return "no effect shown"
    return "helps" if row["difference"] > 0 else "harms"


def _ablation_verdict(
    effects: Sequence[Mapping[str, Any]], whole: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> str:
    interval = "" if whole["interval"] is None else f" [{whole['interval'][0]:+.3f}, {whole['interval'][1]:+.3f}]"
    first = f"All components together change macro F1 by {whole['difference']:+.3f}{interval}: {whole['verdict']}."
    by_verdict = {
        verdict: sorted({e["component"] for e in effects if e["verdict"] == verdict and e["context"] == "alone"})
        for verdict in ("helps", "harms", "no effect shown")
    }
    said = [f"{', '.join(names)}: {verdict}" for verdict, names in by_verdict.items() if names]
    second = f"Each alone, {'; '.join(said)}."
    random_start = all(r["starting_weights"]["kind"] == "random" for r in records)
    if random_start:
        second += " Pre-training was asked for, but no pre-trained weights could be had, so its rows compare equals."
    return f"{first} {second}"
