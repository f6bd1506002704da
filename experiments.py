"""Many trainings, one answer: architectures compared over seeds, and what each component of the pipeline brings.

    config = ExperimentConfig(experiment_name="comparison", time_limit=1000, enable_optuna=False)
    record = compare_architectures(IntegratedMLPipeline(config), seeds=(0, 1, 2))

A seed changes the split, the initial weights and the batches, so the spread over seeds holds all three. All variants of
a seed share its split, so differences are taken pair by pair. Each finished training leaves a small record; with
`resume=True` it is taken over, and a training that was cut off goes on from its last epoch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import evaluation
import reporting
from checkpoints import hold_folder
from errors import ConfigError, RunError
from integrated_pipeline import (
    ExperimentConfig,
    IntegratedMLPipeline,
    command_line_used,
    ends_one_model,
    environment,
)
from tracking import TrackedRun

COMPONENTS = {
    "pretraining": "use_pretrained",
    "augmentation": "data_augmentation",
    "balancing": "class_balancing",
    "optuna": "enable_optuna",
}
TRAINING_SHARE = 0.8  # of the time limit; the rest is for data, evaluation and pictures
INTERVAL_METHOD = (
    "95% t interval of one mean over seeds, the variance corrected for training parts that overlap (Nadeau & Bengio "
    "2003)"
)
DIFFERENCE_METHOD = (
    "paired over seeds, t interval with the variance corrected for overlapping training parts (Nadeau & Bengio 2003); "
    "p values and intervals corrected for the number of comparisons (Holm 1979), so that an interval leaves out 0 "
    "where its corrected p is below 0.05"
)
SIGNIFICANCE = 0.05  # of a corrected p value; an interval that is not corrected has the level 1 - SIGNIFICANCE


# --------------------------------------------------------------------------------------------------- the trainings


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: in tables, and of its folder.
        model_type: a registered model.
        changes: fields of `ExperimentConfig` that differ.
    """

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)


class TrainingSeries:
    """Trains every variant with every seed and keeps a record of each.

    Args:
        pipeline: whose configuration all have in common, whose terminal is used, and below whose MLflow experiment each
            training becomes a run. A `time_limit` is for the whole series; each training gets an equal share of
            `TRAINING_SHARE` of it, search included. Without one, all train for `max_epochs`.
        variants: what to compare.
        seeds: of data, split, weights and batches.

    Raises:
        ConfigError: the time limit leaves less than a second for each training.
    """

    def __init__(self, pipeline: IntegratedMLPipeline, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
        config = self.config = pipeline.config
        self.variants, self.seeds = list(variants), list(dict.fromkeys(seeds))
        self._console, self._tracking = pipeline.console, pipeline.open_tracking()
        total = len(self.variants) * len(self.seeds)
        self.seconds_each = None if config.time_limit is None else TRAINING_SHARE * config.time_limit / total
        if self.seconds_each is not None and self.seconds_each < 1:
            raise ConfigError(
                f"time_limit={config.time_limit:g} leaves {self.seconds_each:.2g} s for each of {total} trainings. "
                f"Give {total / TRAINING_SHARE:.0f} s or more, or fewer seeds or models."
            )
        self.failed: list[dict[str, Any]] = []  # variant, seed and reason of trainings that gave no record
        self._maps_and_split: tuple[int, Any, Any] | None = None  # of the seed at work

    def budget(self) -> str:
        """What each training is given, in words."""
        if self.seconds_each is None:
            return f"equal epochs: at most {self.config.max_epochs} for each training, with early stopping"
        return f"equal time: {self.seconds_each:.0f} s for each training, any search included"

    def run(self) -> list[dict[str, Any]]:
        """All records, seed by seed, so that a series that is cut short has whole seeds."""
        try:
            with hold_folder(self.config.results_dir):
                records = self._run()
        except KeyboardInterrupt:
            self._tracking.close("KILLED", reason="interrupted")
            raise
        except BaseException as error:
            self._tracking.close("FAILED", reason=f"{type(error).__name__}: {error}")
            raise
        return records

    def _run(self) -> list[dict[str, Any]]:
        records, started, trained = [], time.monotonic(), 0
        jobs = [(variant, seed) for seed in self.seeds for variant in self.variants]
        self.parent = self._tracking.start(self.config.experiment_name, key=self._fingerprint(self.config))
        self._tracking.tags(self.parent, budget=self.budget())
        for number, (variant, seed) in enumerate(jobs, 1):
            record = self._finished(variant, seed)
            again = record is not None
            if record is None:
                try:
                    record = self._train(variant, seed)
                except (RuntimeError, MemoryError) as error:
                    if not ends_one_model(error):
                        raise
                    self._leave_out(variant, seed, error)
                    continue
                trained += 1
            records.append(record)
            left = (len(jobs) - number) * (time.monotonic() - started) / max(1, trained)
            self.say(
                f"  {number}/{len(jobs)}  {variant.name}, seed {seed}: macro F1 {record['macro_f1']:.3f}"
                + (", finished before" if again else f", {record['epochs']} epochs, about {left / 60:.0f} min left")
            )
        if not records:
            raise RunError(f"None of {len(jobs)} trainings came to its end. {self.failures()}")
        return records

    def _leave_out(self, variant: Variant, seed: int, error: BaseException) -> None:
        self.failed.append({"variant": variant.name, "seed": seed, "reason": f"{type(error).__name__}: {error}"})
        self.say(f"  {variant.name}, seed {seed}, is left out: {error}")

    def failures(self) -> str:
        """A sentence for each training that failed; empty if all came to their end."""
        return " ".join(f"{f['variant']}, seed {f['seed']}, failed ({f['reason']})." for f in self.failed)

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, soft_wrap=True, markup=False, emoji=False)

    def close(self, note: str, files: Sequence[Path]) -> None:
        """Ends the series' run in MLflow with a table on its page and the pictures as artifacts."""
        self._tracking.note(self.parent, note)
        self._tracking.files(self.parent, files)
        self._tracking.close()

    def _variant_config(self, variant: Variant, seed: int) -> ExperimentConfig:
        # Where time ends the training, no number of epochs and no patience shall.
        timed = {} if self.seconds_each is None else {"max_epochs": 100_000, "early_stopping_patience": 100_000}
        return replace(
            self.config,
            model_type=variant.model_type,
            seed=seed,
            time_limit=self.seconds_each,
            enable_mlflow=False,
            quiet=True,
            output_dir=self._folder(variant, seed),
            pretrained_dir=self.config.generated_weights_dir,
            **timed,
            **variant.changes,
        )

    def _folder(self, variant: Variant, seed: int) -> Path:
        return self.config.results_dir / "runs" / f"{variant.name.replace(' ', '_')}_seed{seed}"

    def _fingerprint(self, config: ExperimentConfig) -> str:
        text = f"{config.training_fingerprint()} {config.model_type} {config.data} {config.tune_decision}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _finished(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        file = self._folder(variant, seed) / "record.json"
        if not self.config.resume or not file.exists():
            return None
        record = json.loads(file.read_text())
        same = record["fingerprint"] == self._fingerprint(self._variant_config(variant, seed))
        return record if same else None

    def _train(self, variant: Variant, seed: int) -> dict[str, Any]:
        config, folder = self._variant_config(variant, seed), self._folder(variant, seed)
        if not config.resume:
            shutil.rmtree(folder, ignore_errors=True)
        pipeline = IntegratedMLPipeline(config)
        self._share_data(pipeline, seed)
        run = self._tracking.start(f"{variant.name}, seed {seed}", parent=self.parent)
        try:
            trained = pipeline.search_and_train(variant.model_type)
            (result,), _ = pipeline.evaluate([trained])
        except BaseException as error:
            self._tracking.end(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason=repr(error))
            raise
        record = _short_record(variant, seed, result) | {
            "split": pipeline.split.fingerprint,
            "maps": {part: len(indices) for part, indices in pipeline.split.parts().items()},
            "data": {"maps": len(pipeline.maps), "lots": pipeline.maps.n_lots, "notes": pipeline.maps.notes},
            "fingerprint": self._fingerprint(config),
        }
        self._track(run, variant, record)
        evaluation.write_summary(folder / "record.json", record)
        for rest in ("checkpoints", "results"):  # weights of dozens of trainings would fill a disk
            shutil.rmtree(folder / rest, ignore_errors=True)
        return record

    def _share_data(self, pipeline: IntegratedMLPipeline, seed: int) -> None:
        if self._maps_and_split is None or self._maps_and_split[0] != seed:
            pipeline.prepare_data()
            self._maps_and_split = (seed, pipeline.maps, pipeline.split)
        _, pipeline.maps, pipeline.split = self._maps_and_split

    def _track(self, run: TrackedRun, variant: Variant, record: dict[str, Any]) -> None:
        self._tracking.params(run, model_type=variant.model_type, seed=record["seed"], **variant.changes)
        scores = ("macro_f1", "accuracy", "validation_macro_f1", "train_seconds", "latency_ms", "n_parameters")
        self._tracking.metrics(run, {key: record[key] for key in scores})
        self._tracking.tags(run, weights=record["weights"], split=record["split"])
        self._tracking.end(run)


def _short_record(variant: Variant, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    """What tables, tests and pictures need of one training."""
    test, search = result["test"], result.get("search")
    return {
        "variant": variant.name,
        "model_type": variant.model_type,
        "seed": seed,
        "macro_f1": test["macro_f1"],
        "macro_f1_interval": (test["intervals"] or {}).get("macro_f1"),
        "accuracy": test["accuracy"],
        "per_class_f1": {name: row["f1"] for name, row in test["per_class"].items()},
        "validation_macro_f1": result["validation"]["macro_f1"],
        "train_seconds": result.get("total_seconds", result["train_seconds"]),  # any search included
        "epochs": result["epochs"],
        "trials": len(search["trials"]) if search else 0,
        "n_parameters": result["n_parameters"],
        "latency_ms": result["latency_ms"],
        "weights": result["weights"],
        "precision": result["precision"],
        "parameters": result["parameters"],
        "decision": result.get("decision"),
    }


# -------------------------------------------------------------------------------------------------------- statistics


def mean_interval(
    values: Sequence[float], *, test_over_train: float, level: float = 1 - SIGNIFICANCE
) -> dict[str, Any]:
    """Mean, standard deviation, interval of the mean and the two-sided p value against 0.

    Seeds share most of their training maps, so their scores are not independent: the variance of the mean is taken as
    (1/n + test/train) times the variance over seeds (Nadeau & Bengio 2003, "Inference for the generalization error",
    Machine Learning 52). Without that, intervals come out too narrow.

    Args:
        values: one a seed.
        test_over_train: number of test maps over number of training maps.
        level: of the interval, between 0 and 1.

    Returns:
        mean, std, interval, p; all but the mean None for a single value.
    """
    from scipy import stats

    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return {"mean": mean, "std": None, "interval": None, "p": None}
    deviation = statistics.stdev(values)
    error = deviation * (1 / n + test_over_train) ** 0.5
    half = float(stats.t.isf((1 - level) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return {"mean": mean, "std": deviation, "interval": [mean - half, mean + half], "p": p}


def holm_factors(p_values: Sequence[float | None]) -> list[float | None]:
    """What each p value is multiplied by to correct for their number (Holm 1979, Scand. J. Statist. 6).

    The smallest of m is multiplied by m, the next by m - 1, and so on, or by more where the corrected value would be
    lower than that of a smaller p value. None stays None.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    factors: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, (len(known) - rank) * p)
        factors[i] = highest / p if p > 0 else float(len(known) - rank)
    return factors


def _scores(records: Sequence[Mapping[str, Any]], variant: str) -> dict[int, float]:
    return {r["seed"]: r["macro_f1"] for r in records if r["variant"] == variant}


def _test_over_train(records: Sequence[Mapping[str, Any]]) -> float:
    return statistics.mean(r["maps"]["test"] / r["maps"]["train"] for r in records)


def paired_differences(records: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each pair of variants, the first minus the second over seeds, corrected for the number of pairs.

    P values by Holm's method, and the intervals as the p values: a p value that is multiplied by f has an interval of
    the level 1 - 0.05 / f. So an interval leaves out 0 exactly where the corrected p value is below 0.05.

    Returns:
        For each pair: a, b, difference (the mean), interval and its level, p, p_corrected, significant. With one seed
        in common interval, level and p values are None.
    """
    ratio = _test_over_train(records)
    differences = [_paired(_scores(records, a), _scores(records, b)) for a, b in pairs]
    tests = [mean_interval(values, test_over_train=ratio)["p"] for values in differences]
    rows = []
    for (a, b), values, p, factor in zip(pairs, differences, tests, holm_factors(tests), strict=True):
        level = 1 - SIGNIFICANCE / (factor or 1)
        found = mean_interval(values, test_over_train=ratio, level=level)
        corrected = None if factor is None else min(1.0, factor * p)
        rows.append(
            {
                "a": a,
                "b": b,
                "difference": found["mean"],
                "interval": found["interval"],
                "level": None if factor is None else level,
                "p": p,
                "p_corrected": corrected,
                "significant": corrected is not None and corrected < SIGNIFICANCE,
            }
        )
    return rows


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """The differences over the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


# -------------------------------------------------------------------------------------------------------- comparison


def compare_architectures(pipeline: IntegratedMLPipeline, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Every architecture of the configuration with every seed; writes comparison.json and returns the record."""
    config = pipeline.config
    variants = [Variant(name, name) for name in config.model_types()]
    series = TrainingSeries(pipeline, variants, seeds)
    series.say(f"Comparison of {len(variants)} architectures, {len(series.seeds)} seeds; {series.budget()}")
    records = series.run()
    seeds_of = {name: set(_scores(records, name)) for name in config.model_types()}
    models = [_model_row(records, name) for name, seeds in seeds_of.items() if seeds]
    pairs = [(a, b) for a, b in itertools.combinations(seeds_of, 2) if seeds_of[a] & seeds_of[b]]
    differences = paired_differences(records, pairs)
    record = {
        **_head(config, "comparison", series, records),
        "verdict": f"{_comparison_verdict(models, differences)} {series.failures()}".strip(),
        "runs": records,
        "models": models,
        "interval_method": INTERVAL_METHOD,
        "differences": differences,
        "difference_method": DIFFERENCE_METHOD,
    }
    evaluation.write_summary(config.results_dir / "comparison.json", record)
    draw = (reporting.plot_critical_difference, reporting.plot_seed_comparison, reporting.plot_trade_offs)
    _publish(series, record, draw, table=reporting.comparison_markdown(record))
    return record


def _publish(
    series: TrainingSeries, record: dict[str, Any], draw: Sequence[Callable[..., Path]], *, table: str
) -> None:
    """Pictures, the page, and the run in MLflow; the terminal shows the table and the verdict."""
    folder = series.config.results_dir
    files = [plot(record, path=folder / f"{plot.__name__.removeprefix('plot_')}.png") for plot in draw]
    page = reporting.write_report(
        record, folder=folder, pictures=[file.name for file in files], path=folder / "report.html"
    )
    series.close(table, [*files, page, folder / f"{record['mode']}.json"])
    series.say(f"\n{table}\n\n{record['verdict']}\n\nResults, pictures and report.html: {folder}")


def _head(
    config: ExperimentConfig, mode: str, series: TrainingSeries, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "mode": mode,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_line_used(),
        "budget": series.budget(),
        "config": {k: v for k, v in asdict(config).items() if k not in ("output_dir", "resume", "quiet")},
        "environment": environment(),
        "data": {"source": Path(str(config.data)).name, **records[0]["data"]},
        "seeds": series.seeds,
        "failed_runs": series.failed,
    }


def _model_row(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    some = [r for r in records if r["variant"] == name]
    found = mean_interval([r["macro_f1"] for r in some], test_over_train=_test_over_train(records))
    typical = {key: statistics.median(r[key] for r in some) for key in ("train_seconds", "latency_ms", "epochs")}
    return {
        "model_type": name,
        "n": len(some),
        **{key: found[key] for key in ("mean", "std", "interval")},
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
    if not close:
        return f"{text} Its lead over every other architecture is larger than chance explains."
    return f"{text} Over {', '.join(close)} its lead may be chance at {best['n']} seeds."


def _with_interval(row: Mapping[str, Any]) -> str:
    interval = row["interval"]
    return f"{row['mean']:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


# ---------------------------------------------------------------------------------------------------------- ablation


def ablate(pipeline: IntegratedMLPipeline, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Switches components on one by one and off one by one; writes ablation.json and returns the record.

    All variants get the same budget: one that searches has less of it for its final training.
    """
    config = pipeline.config
    if len(config.model_types()) != 1:
        raise ConfigError(f"model_type={config.model_type!r}: an ablation takes one model, for example lightning_cnn.")
    (model_type,) = config.model_types()
    switched = ablation_variants()
    variants = [Variant(name, model_type, _changes(on)) for name, on in switched.items()]
    series = TrainingSeries(pipeline, variants, seeds)
    series.say(f"Ablation of {model_type}, {len(variants)} variants, {len(series.seeds)} seeds; {series.budget()}")
    records = series.run()
    if series.failed:
        raise RunError(
            f"An ablation needs all of its trainings. {series.failures()} The others are kept: repeat the command with "
            "--resume once the reason is mended."
        )
    *effects, together = _effects(records)
    record = {
        **_head(config, "ablation", series, records),
        "model_type": model_type,
        "components": list(COMPONENTS),
        "verdict": _ablation_verdict(effects, together, records),
        "variants": [
            {
                "name": name,
                "components": {component: component in on for component in COMPONENTS},
                "scores": list(_scores(records, name).values()),
                "weights": sorted({r["weights"] for r in records if r["variant"] == name}),
                **_without_p(_scores(records, name), records),
            }
            for name, on in switched.items()
        ],
        "effects": effects,
        "together": together,
        "runs": records,
        "interval_method": INTERVAL_METHOD,
        "difference_method": DIFFERENCE_METHOD,
    }
    evaluation.write_summary(config.results_dir / "ablation.json", record)
    _publish(series, record, (reporting.plot_ablation,), table=reporting.ablation_markdown(record))
    return record


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


def _without_p(scores: Mapping[int, float], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = mean_interval(list(scores.values()), test_over_train=_test_over_train(records))
    return {key: found[key] for key in ("mean", "std", "interval")}


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
    random_start = all(r["weights"].startswith("random") for r in records)
    if random_start:
        second += " Pre-training was asked for, but no pre-trained weights could be had, so its rows compare equals."
    return f"{first} {second}"
