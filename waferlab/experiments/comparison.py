"""Architectures compared over seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from waferlab.config import ExperimentConfig
from waferlab.evaluation.statistics import (
    DIFFERENCE_METHOD,
    INTERVAL_METHOD,
    mean_score,
    paired_differences,
    scores_by_seed,
    test_over_train,
)
from waferlab.experiments.series import TrainingSeries, Variant, head, publish
from waferlab.reports.experiment_figures import plot_critical_difference, plot_seed_comparison, plot_trade_offs
from waferlab.reports.tables import differences_table, models_table, not_ranked

SAME_START = (
    "Compare with use_pretrained=false, or with weights of generated maps for each (run_experiment.py --mode pretrain "
    "--models all)."
)


def compare_architectures(config: ExperimentConfig, *, seeds: Sequence[int], **means: Any) -> dict[str, Any]:
    """Every architecture of the configuration with every seed; writes comparison.json and returns the record.

    Args:
        config: its `model_type` says what is compared.
        seeds: of data, split, weights and batches.
        **means: `train`, `runs` and `terminal`, see `TrainingSeries`.
    """
    variants = [Variant(name, name) for name in config.model_types()]
    series = TrainingSeries(config, variants, seeds, **means)
    series.terminal.say(f"Comparison of {len(variants)} architectures, {len(series.seeds)} seeds; {series.budget()}")
    with series.open():
        record = _record(series, series.train_all())
        draw = (plot_seed_comparison, plot_trade_offs)
        draw = draw if record["not_ranked"] else (plot_critical_difference, *draw)
        tables = [models_table(record), *([differences_table(record)] if record["differences"] else [])]
        publish(series, record, draw, tables=tables)
    return record


def _record(series: TrainingSeries, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config = series.config
    seeds_of = {name: set(scores_by_seed(records, name)) for name in config.model_types()}
    models = [_model_row(records, name) for name, seeds in seeds_of.items() if seeds]
    pairs = [(a, b) for a, b in itertools.combinations(seeds_of, 2) if seeds_of[a] & seeds_of[b]]
    trained = [(run["starting_weights"]["kind"], 1.0, run["trials"]) for run in records]  # in equal seconds or epochs
    apart = not_ranked(trained) if len(models) > 1 else None
    differences = [] if apart else paired_differences(records, pairs)
    verdict = f"{apart} {SAME_START}" if apart else _comparison_verdict(models, differences)
    return {
        **head(config, "comparison", series, records),
        "verdict": f"{verdict} {series.failures()}".strip(),
        "not_ranked": apart,
        "runs": records,
        "models": models,
        "interval_method": INTERVAL_METHOD,
        "differences": differences,
        "difference_method": DIFFERENCE_METHOD,
    }


def _model_row(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    some = [r for r in records if r["variant"] == name]
    typical = {key: statistics.median(r[key] for r in some) for key in ("train_seconds", "latency_ms", "epochs")}
    return {
        "model_type": name,
        "n": len(some),
        **mean_score([r["macro_f1"] for r in some], test_over_train=test_over_train(records)),
        "accuracy_mean": statistics.mean(r["accuracy"] for r in some),
        "n_parameters": some[0]["n_parameters"],
        **typical,
    }


def _comparison_verdict(models: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> str:
    best = max(models, key=lambda m: m["mean"])
    text = f"{best['model_type']} has the highest mean macro F1, {_with_interval(best)}."
    if len(models) == 1:
        return f"{text} Nothing was compared with it."
    if best["n"] < 2:
        return f"{text} With one seed nothing can be said of how sure that is."
    name = best["model_type"]
    close = [
        d["b"] if d["a"] == name else d["a"] for d in differences if name in (d["a"], d["b"]) and not d["significant"]
    ]
    compared = {name}.union(*((d["a"], d["b"]) for d in differences if name in (d["a"], d["b"])))
    if missing := [m["model_type"] for m in models if m["model_type"] not in compared]:
        text = f"{text} It has no seed in common with {', '.join(missing)}, so nothing is said of these."
    if not close:
        others = "every other architecture" if not missing else "the others"
        return text if compared == {name} else f"{text} Its lead over {others} is larger than chance explains."
    return f"{text} Over {', '.join(close)} its lead may be chance at {best['n']} seeds."


def _with_interval(row: Mapping[str, Any]) -> str:
    interval = row["interval"]
    return f"{row['mean']:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
