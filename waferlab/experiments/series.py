"""Many trainings, a record each."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, RunError, ends_one_model
from waferlab.records import command_line_used, environment, write_summary
from waferlab.reports.pages import write_report
from waferlab.tracking.runs import Run
from waferlab.training.checkpoints import hold_folder

TRAINING_SHARE = 0.8  # of the time limit; the rest is for data, evaluation and pictures


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
        write_summary(folder / "record.json", record)
        for rest in ("checkpoints", "results"):  # weights of dozens of trainings would fill a disk
            shutil.rmtree(folder / rest, ignore_errors=True)
        return record

    def _share_data(self, pipeline: IntegratedMLPipeline, seed: int) -> None:
        if self._maps_and_split is None or self._maps_and_split[0] != seed:
            pipeline.prepare_data()
            self._maps_and_split = (seed, pipeline.maps, pipeline.split)
        _, pipeline.maps, pipeline.split = self._maps_and_split

    def _track(self, run: Run, variant: Variant, record: dict[str, Any]) -> None:
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


def publish(series: TrainingSeries, record: dict[str, Any], draw: Sequence[Callable[..., Path]], *, table: str) -> None:
    """Pictures, the page, and the run in MLflow; the terminal shows the table and the verdict."""
    folder = series.config.results_dir
    files = [plot(record, path=folder / f"{plot.__name__.removeprefix('plot_')}.png") for plot in draw]
    page = write_report(record, folder=folder, pictures=[file.name for file in files], path=folder / "report.html")
    series.close(table, [*files, page, folder / f"{record['mode']}.json"])
    series.say(f"\n{table}\n\n{record['verdict']}\n\nResults, pictures and report.html: {folder}")


def head(
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
