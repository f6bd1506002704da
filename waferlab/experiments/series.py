"""Many trainings, a record each.

A seed changes the split, the initial weights and the batches, so the spread over seeds holds all three. All variants of
a seed share its split, so differences are taken pair by pair. Each finished training leaves a small record; with
`resume=True` it is taken over, and a training that was cut off goes on from its last epoch.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from waferlab.config import PLACE_AND_MANNER, ExperimentConfig
from waferlab.data.maps import WaferMaps
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import Split, split_maps
from waferlab.errors import ConfigError, RunError, ends_one_model
from waferlab.records import ModelResult, environment, write_summary
from waferlab.reports.pages import write_report
from waferlab.reports.tables import Table, table_markdown
from waferlab.terminal import Terminal
from waferlab.tracking.addresses import command_line_used
from waferlab.tracking.runs import NoRuns, Run, RunTree
from waferlab.training.checkpoints import hold_folders, read_json

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
        config: what all trainings have in common. A `time_limit` is for the whole series; each training gets an equal
            share of `TRAINING_SHARE` of it, search included. Without one, all train for `max_epochs`.
        variants: what to compare.
        seeds: of data, split, weights and batches.
        train: trains and scores the only model of a configuration on maps that are split.
        runs: the tree in which each training becomes a run.
        terminal: where to print.

    Raises:
        ConfigError: the time limit leaves less than a second for each training.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        *,
        train: Callable[[ExperimentConfig, WaferMaps, Split], ModelResult],
        runs: RunTree | NoRuns,
        terminal: Terminal,
    ) -> None:
        self.config, self.terminal, self.runs, self._train_and_score = config, terminal, runs, train
        self.variants, self.seeds = list(variants), list(dict.fromkeys(seeds))
        if config.storage is not None:
            raise ConfigError("storage=... is for one search: each training here has one of its own. Leave it out.")
        total = len(self.variants) * len(self.seeds)
        self.seconds_each = None if config.time_limit is None else TRAINING_SHARE * config.time_limit / total
        if self.seconds_each is not None and self.seconds_each < 1:
            raise ConfigError(
                f"time_limit={config.time_limit:g} leaves {self.seconds_each:.2g} s for each of {total} trainings. "
                f"Give {total / TRAINING_SHARE:.0f} s or more, or fewer seeds or models."
            )
        for variant, seed in itertools.product(self.variants, self.seeds):
            self._variant_config(variant, seed)  # what cannot be used shows before anything is trained
        self._data: dict[int, tuple[WaferMaps, Split]] = {}
        self.failed: list[dict[str, Any]] = []  # variant, seed and reason of trainings that gave no record

    def budget(self) -> str:
        """What each training is given, in words."""
        if self.seconds_each is None:
            return f"equal epochs: at most {self.config.max_epochs} for each training, with early stopping"
        return f"equal time: {self.seconds_each:.0f} s for each training, any search included"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Holds the folder and opens the series' run; however the block ends, the tree is closed accordingly."""
        with hold_folders(self.config.results_dir), self.runs.closing():
            if not self.config.resume:  # else a later --resume would take them for its own
                shutil.rmtree(self.config.results_dir / "runs", ignore_errors=True)
            self.config.write_yaml(self.config.results_dir / "config.yaml")
            self.run_above = self.runs.start(self.config.experiment_name, key=self._fingerprint(self.config))
            self.runs.tags(self.run_above, budget=self.budget())
            yield

    def train_all(self) -> list[dict[str, Any]]:
        """All records, seed by seed, so that a series that is cut short has whole seeds.

        Raises:
            RunError: no training came to its end.
            DamagedFileError: the record of one that had come to its end is damaged.
        """
        records, started, trained = [], time.monotonic(), 0
        jobs = [(variant, seed) for seed in self.seeds for variant in self.variants]
        for number, (variant, seed) in enumerate(jobs, 1):
            record = self._finished(variant, seed)
            again = record is not None
            if record is None:
                try:
                    record = self._train(variant, seed)
                except (RuntimeError, MemoryError, ImportError) as error:
                    if not ends_one_model(error):
                        raise
                    self._leave_out(variant, seed, error)
                    continue
                trained += 1
            records.append(record)
            left = (len(jobs) - number) * (time.monotonic() - started) / max(1, trained)
            self.terminal.say(
                f"  {number}/{len(jobs)}  {variant.name}, seed {seed}: macro F1 {record['macro_f1']:.3f}"
                + (", finished before" if again else f", {record['epochs']} epochs, about {left / 60:.0f} min left")
            )
        if not records:
            raise RunError(f"None of {len(jobs)} trainings came to its end. {self.failures()}")
        return records

    def _leave_out(self, variant: Variant, seed: int, error: BaseException) -> None:
        self.failed.append({"variant": variant.name, "seed": seed, "reason": f"{type(error).__name__}: {error}"})
        self.terminal.say(f"  {variant.name}, seed {seed}, is left out: {error}")

    def failures(self) -> str:
        """A sentence for each training that failed; empty if all came to their end."""
        return " ".join(f"{f['variant']}, seed {f['seed']}, failed ({f['reason']})." for f in self.failed)

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
        record = read_json(file)
        same = record.get("fingerprint") == self._fingerprint(self._variant_config(variant, seed))
        return record if same and record.get("split") == self._data_of(seed)[1].fingerprint else None

    def _train(self, variant: Variant, seed: int) -> dict[str, Any]:
        config, folder = self._variant_config(variant, seed), self._folder(variant, seed)
        if not config.resume:
            shutil.rmtree(folder, ignore_errors=True)
        maps, split = self._data_of(seed)
        key = hashlib.sha256(f"{variant.name} {self._fingerprint(config)} {split.fingerprint}".encode()).hexdigest()
        run = self.runs.start(f"{variant.name}, seed {seed}", parent=self.run_above, key=key[:16])
        try:
            result = self._train_and_score(config, maps, split)
        except BaseException as error:
            self.runs.end(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason=repr(error))
            raise
        record = _short_record(variant, seed, result) | {
            "split": split.fingerprint,
            "maps": {part: len(indices) for part, indices in split.parts().items()},
            "data": {"maps": len(maps), "lots": maps.n_lots, "notes": maps.notes},
            "fingerprint": self._fingerprint(config),
        }
        self._track(run, variant, record)
        write_summary(folder / "record.json", record)
        for rest in ("checkpoints", "results"):  # weights of dozens of trainings would fill a disk
            shutil.rmtree(folder / rest, ignore_errors=True)
        return record

    def _data_of(self, seed: int) -> tuple[WaferMaps, Split]:
        """Maps and split of a seed, which all of its variants share; those of the last seed are kept."""
        if seed not in self._data:
            maps = load_wafer_maps(**self.config.data_options(), seed=seed, say=self.terminal.say)
            self._data = {seed: (maps, split_maps(maps, how=self.config.split, seed=seed))}
        return self._data[seed]

    def _track(self, run: Run, variant: Variant, record: dict[str, Any]) -> None:
        self.runs.params(run, model_type=variant.model_type, seed=record["seed"], **variant.changes)
        scores = ("macro_f1", "accuracy", "validation_macro_f1", "train_seconds", "latency_ms", "n_parameters")
        self.runs.metrics(run, {key: record[key] for key in scores})
        self.runs.tags(run, weights=record["weights"], split=record["split"])
        self.runs.end(run)


def _short_record(variant: Variant, seed: int, result: ModelResult) -> dict[str, Any]:
    """What tables, tests and pictures need of one training."""
    test = result.test
    return {
        "variant": variant.name,
        "model_type": variant.model_type,
        "seed": seed,
        "macro_f1": test["macro_f1"],
        "macro_f1_interval": (test["intervals"] or {}).get("macro_f1"),
        "accuracy": test["accuracy"],
        "per_class_f1": {name: row["f1"] for name, row in test["per_class"].items()},
        "validation_macro_f1": result.validation["macro_f1"],
        "train_seconds": result.total_seconds or result.train_seconds,  # any search included
        "epochs": result.epochs,
        "trials": result.search.begun() if result.search else 0,
        "n_parameters": result.n_parameters,
        "latency_ms": result.latency_ms,
        "weights": str(result.weights),
        "starting_weights": asdict(result.weights),
        "precision": result.precision,
        "parameters": result.parameters,
        "decision": result.decision,
    }


def publish(
    series: TrainingSeries, record: dict[str, Any], draw: Sequence[Callable[..., Path]], *, tables: Sequence[Table]
) -> None:
    """Writes the record, pictures and the page, and tells terminal and MLflow of them.

    Args:
        series: that gave the record.
        record: with its `mode`, which names the file.
        draw: functions that draw it.
        tables: for the terminal and the run's page.
    """
    folder, mode = series.config.results_dir, record["mode"]
    write_summary(folder / f"{mode}.json", record)
    files = [plot(record, path=folder / f"{plot.__name__.removeprefix('plot_')}.png") for plot in draw]
    page = write_report(record, folder=folder, pictures=[file.name for file in files], path=folder / "report.html")
    series.runs.note(series.run_above, "\n\n".join(map(table_markdown, tables)))
    series.runs.files(series.run_above, [*files, page, folder / f"{mode}.json"])
    aloud = series.terminal.aloud()
    for table in tables:
        aloud.print_table(table)
    aloud.say(f"\n{record['verdict']}\n\nResults, pictures and report.html: {folder}")


def head(
    config: ExperimentConfig, mode: str, series: TrainingSeries, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What all records of experiments begin with."""
    return {
        "mode": mode,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_line_used(),
        "budget": series.budget(),
        "config": {k: v for k, v in config.as_plain().items() if k not in PLACE_AND_MANNER},
        "environment": environment(),
        "data": {"source": Path(str(config.data)).name, **records[0]["data"]},
        "seeds": series.seeds,
        "failed_runs": series.failed,
    }
