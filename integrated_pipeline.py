"""The whole chain, told from top to bottom.

    results = IntegratedMLPipeline(ExperimentConfig(enable_optuna=False, enable_mlflow=False)).run_complete_pipeline()

reads or generates wafer maps, splits them by lot, trains every chosen model with Lightning, opens the test part once,
draws the pictures and writes the summary. Read it in this order: the configuration; the models adapted from
torchvision and ultralytics; the registry that names them; the pipeline.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import TrialState
from rich.console import Console

from simple_model import LightningCNN
from waferlab.config import OBJECTIVES, ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.maps import CLASS_NAMES, NUM_CLASSES, WaferMaps
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import Split, split_by_lot
from waferlab.deployment import promotion
from waferlab.deployment.onnx_export import export_onnx
from waferlab.errors import (
    ConfigError,
    DamagedFileError,
    RunError,
    SearchFailedError,
    TrainingDivergedError,
    TrialFailedError,
    WeightsUnavailableError,
    ends_one_model,
    out_of_memory,
)
from waferlab.evaluation.decision import VIEWS, Decision, choose_decision
from waferlab.evaluation.inference import decision_of, decision_record, measure_latency, probabilities_by_views
from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.models.classifier import WaferClassifier, macro_f1
from waferlab.models.registry import MODEL_REGISTRY, SHARED_SEARCH_SPACE, ModelSpec, own_search_space, register_model
from waferlab.models.starting_weights import load_generated_weights
from waferlab.models.torchvision_models import TorchvisionLightningModel
from waferlab.models.yolo import YOLOLightningAdapter
from waferlab.records import code_tags, command_line_used, environment, plain_hparams, write_summary
from waferlab.reports.model_card import write_model_card
from waferlab.reports.pages import write_report
from waferlab.reports.run_figures import (
    plot_confusion_matrix,
    plot_model_comparison,
    plot_sample_predictions,
    plot_study,
    plot_training_history,
)
from waferlab.reports.tables import write_per_class_table
from waferlab.search.study import TPE_STARTS_AFTER, mend_journal, open_database, proposed_by, run_again
from waferlab.search.trials import (
    completed,
    counted_trials,
    study_seconds,
    suggest_parameters,
    trial_line,
    trial_record,
)
from waferlab.terminal import Stopwatch, comparison_markdown, comparison_rows, comparison_table, pipeline_verdict
from waferlab.tracking.processes import still_runs, this_process
from waferlab.tracking.runs import NoRuns, Run, RunTree
from waferlab.tracking.wandb_runs import WandbTree
from waferlab.training.callbacks import History, KeepInterrupt, TimeBudget
from waferlab.training.checkpoints import (
    CheckpointFiles,
    TrainingFolder,
    checkpoint_digest,
    hold_folder,
    read_checkpoint,
)
from waferlab.training.precision import native_precision
from waferlab.training.progress import ProgressBar

# A run prints its own lines only.
for _name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
warnings.filterwarnings("ignore", category=pl.utilities.warnings.PossibleUserWarning)
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
FINE_TUNING_SHARE = 0.1  # of a model's own learning rate, when it starts from weights made on generated maps
SEARCH_MUST_GAIN = 0.01  # validation macro F1; so much lies between two trainings that differ in their seed alone


def _torchvision(architecture: str) -> Callable[..., WaferClassifier]:
    return lambda **parameters: TorchvisionLightningModel(architecture=architecture, **parameters)


FREEZE = {"freeze_backbone": (False, True)}
register_model(
    "lightning_cnn",
    ModelSpec(
        LightningCNN,
        search_space={"base_channels": (16, 32, 48, 64), "optimizer": ("adamw", "adam", "sgd")},
        defaults={"learning_rate": 4e-3, "dropout": 0.1},
        in_all=True,
    ),
)
register_model(
    "torchvision_resnet",
    ModelSpec(
        _torchvision("resnet18"),
        search_space=FREEZE,
        defaults={"learning_rate": 1e-3, "dropout": 0.2},
        loads_pretrained=True,
        in_all=True,
    ),
)
register_model(
    "torchvision_efficientnet",
    ModelSpec(
        _torchvision("efficientnet_b0"),
        search_space=FREEZE,
        defaults={"learning_rate": 3e-3, "dropout": 0.2},
        loads_pretrained=True,
        bf16_pays=False,
        in_all=True,
    ),
)
register_model(
    "yolo_inspired",
    ModelSpec(
        YOLOLightningAdapter,
        search_space={"model_size": YOLOLightningAdapter.SIZES},
        defaults={"learning_rate": 2e-3, "dropout": 0.2},
        loads_pretrained=True,
        in_all=True,
    ),
)
register_model(
    "torchvision_resnet50",
    ModelSpec(
        _torchvision("resnet50"),
        search_space=FREEZE,
        defaults={"learning_rate": 1e-3, "dropout": 0.2},
        loads_pretrained=True,
    ),
)
# Adding an architecture is this one call.
register_model(
    "vision_transformer",
    ModelSpec(_torchvision("vit_b_16"), defaults={"learning_rate": 1e-3, "dropout": 0.2}, takes_image_size=True),
)


class IntegratedMLPipeline:
    """Trains, compares and reports the models that a configuration names.

    Args:
        config: what to do.
        console: where to print; the standard output by default.

    Example:
        >>> config = ExperimentConfig(model_type="lightning_cnn", enable_optuna=False, enable_mlflow=False)
        >>> summary = IntegratedMLPipeline(config).run_complete_pipeline()
    """

    def __init__(self, config: ExperimentConfig, *, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(highlight=False, quiet=config.quiet)
        self.seconds: dict[str, float] = {}
        self.maps: WaferMaps | None = None
        self.split: Split | None = None
        self._search_deadline: float | None = None
        self._trial_seconds = float("inf")
        self._studies: dict[str, optuna.Study] = {}
        self._starts: dict[str, tuple[str, float]] = {}
        self.tracking: RunTree | NoRuns = NoRuns()
        self._parent_run = Run("")
        self._model_runs: dict[str, Run] = {}
        self._data: WaferMapDataModule | None = None
        self._failed: dict[str, Exception] = {}
        self._problems: list[str] = []

    def run_complete_pipeline(self) -> dict[str, Any]:
        """Runs the chain and returns the summary that is also written to experiment_summary.json.

        Raises:
            ConfigError: a setting cannot be used here.
            DataError: the data cannot be used.
            FolderInUseError: another run works in the same folder.
            TrainingDivergedError: the loss of the only model is no longer a number.
            RunError: no model could be trained, or a file of the run that is gone on with is damaged.
            KeyboardInterrupt: interrupted; finished epochs and models are kept for `resume=True`.
        """
        self._check_this_can_run()
        with hold_folder(self.config.results_dir), hold_folder(self.config.checkpoints_dir):
            return self._run_tracked()

    def _run_tracked(self) -> dict[str, Any]:
        self._print_configuration()
        self._failed, self._problems, self.seconds = {}, [], {}
        with self._timed("data"):
            self.prepare_data()
        with self.open_tracking().closing():
            self._start_parent_run()
            return self._run()

    def _run(self) -> dict[str, Any]:
        """Trains, scores and writes down what came out, before anything is tried that may fail for another reason."""
        trained = self._train_all()
        with self._timed("evaluation"):
            results, predictions = self.evaluate(trained)
        best = max(range(len(results)), key=lambda i: results[i]["validation"]["macro_f1"])
        summary = self._summarise(results, results[best]["model_type"])
        self._write(summary, registered=None, not_registered_because="the registration did not come to its end")
        with self._timed("pictures"), self._or_a_line("pictures could not be drawn"):
            self._draw(results, predictions[best], best)
        with self._or_a_line("the report could not be written"):
            self._report(summary)
        with self._timed("registration"), self._or_a_line("the model could not be registered"):
            summary |= self.register_best(results[best], predictions[best]).in_summary()
        if summary["registered"]:
            with self._or_a_line("the report could not be written"):
                self._report(summary)
        self._write(summary)
        self._track_outcome(summary)
        self._print_outcome(results, summary)
        return summary

    def _write(self, summary: dict[str, Any], **more: Any) -> None:
        summary |= {**more, "problems": self._problems}
        write_summary(self.config.results_dir / "experiment_summary.json", summary)

    @contextmanager
    def _or_a_line(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in the block becomes a line in the terminal and the summary: the results are safe."""
        try:
            yield
        except Exception as error:
            self._problems.append(f"{what} ({type(error).__name__}: {error})")
            self._say(f"warning: {self._problems[-1]}", style="yellow")

    def _train_all(self) -> list[dict[str, Any]]:
        """Searches and trains all models; one that fails becomes a row with its reason, unless all of them do."""
        names, trained, found = self.config.model_types(), [], {}
        if self.config.favours_the_best():
            for name in names:
                with self._or_a_row(name):
                    self._say(f"\n{name}, search", style="bold")
                    found[name] = self.start_and_search(name)
        for name in [name for name in names if name not in self._failed]:
            with self._or_a_row(name):
                self._say(f"\n{name}", style="bold")
                if found:
                    seconds = self._seconds_by_merit(name, found)
                    trained.append(self.train_with_the_best(name, found[name], seconds=seconds))
                else:
                    trained.append(self.search_and_train(name))
        if not trained:
            reasons = "; ".join(f"{name}: {error}" for name, error in self._failed.items())
            only = next(iter(self._failed.values()))
            raise only if len(names) == 1 else RunError(f"No model could be trained. {reasons}")
        return trained

    @contextmanager
    def _or_a_row(self, model_type: str) -> Iterator[None]:
        """A model that diverges, finds nothing or has no memory ends alone; the others go on."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not ends_one_model(error):
                raise
            self._failed[model_type] = error
            self._say(f"  {model_type} is left out: {error}", style="yellow")
            if model_type in self._model_runs:
                self.tracking.end(self._model_runs[model_type], "FAILED", reason=str(error))

    # --- before training

    def _check_this_can_run(self) -> None:
        for folder in (self.config.results_dir, self.config.checkpoints_dir):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".writable").touch()
                (folder / ".writable").unlink()
            except OSError as error:
                raise ConfigError(f"output_dir={str(self.config.output_dir)!r} cannot be written ({error}).") from error

    def prepare_data(self) -> None:
        """Loads the maps and splits them; `create_model` and `train_final_model` need it."""
        config = self.config
        self.maps = load_wafer_maps(
            config.data,
            samples_per_class=config.samples_per_class,
            max_samples_per_class=config.max_samples_per_class,
            image_levels=config.image_levels,
            seed=config.seed,
        )
        self.split = split_by_lot(self.maps, seed=config.seed)
        self._data = None
        self._say(f"Dataset ready: {len(self.maps)} samples, {np.count_nonzero(self.maps.class_counts)} classes")
        sizes = " / ".join(f"{len(part):,} {name}" for name, part in self.split.parts().items())
        lots = self.maps.n_lots
        self._say(f"  {sizes}, no lot of {lots:,} in two parts, split {self.split.fingerprint}")
        for note in (*self.maps.notes, *self.split.notes):
            self._say(f"  {note}")

    def data_module(self, batch_size: int | None = None) -> WaferMapDataModule:
        """The maps, split and in batches; they are resized once for all trials, models and the evaluation."""
        config = self.config
        if self._data is None:
            self._data = WaferMapDataModule(
                self.maps,
                self.split,
                image_size=config.image_size,
                batch_size=config.batch_size,
                augmentation=config.data_augmentation,
                balancing=config.balance_by if config.class_balancing else "none",
                seed=config.seed,
            )
        return self._data.with_batch_size(batch_size or config.batch_size)

    # --- models

    def precision(self, model_type: str) -> str | int:
        """What Lightning computes this model's training in."""
        if self.config.precision != "auto":
            return self.config.precision
        return native_precision(self.config.accelerator) if MODEL_REGISTRY[model_type].bf16_pays else "32-true"

    def create_model(
        self,
        model_type: str,
        trial_params: dict[str, Any] | None = None,
        *,
        class_weights: list[float] | None = None,
        pretrained: bool | None = None,
    ) -> WaferClassifier:
        """Builds a registered model.

        Args:
            model_type: a name of `MODEL_REGISTRY`.
            trial_params: parameters that replace the defaults; `batch_size` is for the data and ignored here.
            class_weights: nine loss weights, or None.
            pretrained: None follows `use_pretrained`; False when a checkpoint is about to replace all weights anyway.

        Raises:
            ConfigError: an unknown name or parameter.
        """
        if model_type not in MODEL_REGISTRY:
            raise ConfigError(f"model_type={model_type!r} is unknown. Allowed: {', '.join(MODEL_REGISTRY)}.")
        spec = MODEL_REGISTRY[model_type]
        allowed = self._own_parameters(model_type)
        unknown = sorted(set(trial_params or {}) - allowed)
        if unknown:
            raise ConfigError(f"{model_type} has no parameter {unknown[0]!r}. Allowed: {', '.join(sorted(allowed))}.")
        parameters = dict(spec.defaults)
        if self.config.learning_rate is not None:
            parameters["learning_rate"] = self.config.learning_rate
        if spec.takes_image_size:
            parameters["image_size"] = self.config.image_size
        parameters |= {k: v for k, v in (trial_params or {}).items() if k != "batch_size"}
        pretrained = self.config.use_pretrained if pretrained is None else pretrained
        if spec.loads_pretrained:
            parameters["pretrained"] = pretrained and self.config.pretrained_source != "wafer"
            parameters["pretrained_wait"] = self.config.pretrained_wait
        model = spec.build(class_weights=class_weights, **parameters)
        if pretrained:
            self._start_from_generated(model, model_type)
        chosen = self.config.learning_rate is not None or "learning_rate" in (trial_params or {})
        if model.weights_source.startswith("generated") and not chosen:
            model.set_learning_rate(FINE_TUNING_SHARE * model.learning_rate)
        return model

    def _start_from_generated(self, model: WaferClassifier, model_type: str) -> None:
        """Loads weights made on generated maps, unless published ones are in or were asked for."""
        source, no_imagenet = self.config.pretrained_source, model.weights_source
        if not no_imagenet.startswith("random"):
            return
        if source == "imagenet":
            if not MODEL_REGISTRY[model_type].loads_pretrained:
                model.weights_source = "random (none are published for this network)"
            return
        try:
            model.weights_source = load_generated_weights(
                self.config.generated_weights_dir,
                model.network,
                model_type=model_type,
                image_size=self.config.image_size,
            )
        except WeightsUnavailableError as error:
            tried_both = source == "auto" and MODEL_REGISTRY[model_type].loads_pretrained
            before = f"{no_imagenet[len('random (') : -1]}; " if tried_both else ""
            model.weights_source = f"random ({before}{error})"

    def train_final_model(
        self, model_type: str, params: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> dict[str, Any]:
        """Trains one model and keeps its best epoch by validation macro F1.

        Args:
            model_type: a name of `MODEL_REGISTRY`.
            params: parameters that replace the defaults, such as the best of a search.
            seconds: time limit; None takes the model's share of the configuration's, if it has one.

        Returns:
            A plain record: model_type, parameters, weights, n_parameters, epochs, best_epoch, train_seconds, history,
            checkpoint. The checkpoint holds the best epoch.
        """
        if self.split is None:
            self.prepare_data()
        folder = TrainingFolder(self.config.checkpoints_dir / model_type, self._fingerprint(), params)
        record = folder.finished() if self.config.resume else None
        if record is not None:
            self._say(f"  finished before, taken from {folder.folder}")
            return record
        pl.seed_everything(self.config.seed, verbose=False)
        params = params or {}
        data = self.data_module(params.get("batch_size"))
        resume_from = folder.resume_point() if self.config.resume else None
        if resume_from is None:
            folder.start_afresh()
        model = self.create_model(
            model_type, params, class_weights=data.class_weights, pretrained=None if resume_from is None else False
        )
        weights = self._weights_source(model, folder, resumed=resume_from is not None)
        history = self._fit_final(model_type, model, data, folder.folder, resume_from, seconds)
        record = self._training_record(model_type, model, data, history, weights=weights, checkpoint=folder.best)
        folder.finish(record)
        return record

    def _training_record(
        self,
        model_type: str,
        model: WaferClassifier,
        data: WaferMapDataModule,
        history: History,
        *,
        weights: str,
        checkpoint: Path,
    ) -> dict[str, Any]:
        """All that is to be known of a training; it describes the weights in its checkpoint and goes where they go."""
        best = max(history.epochs, key=lambda epoch: epoch["val_macro_f1"])
        return {
            "model_type": model_type,
            "parameters": {"batch_size": data.batch_size} | plain_hparams(model.hparams),
            "weights": weights,
            "precision": str(self.precision(model_type)),
            "n_parameters": sum(p.numel() for p in model.network.parameters()),
            "epochs": len(history.epochs),
            "best_epoch": best["epoch"],
            "train_seconds": history.seconds(),
            "history": history.series(),
            "checkpoint": str(checkpoint.relative_to(self.config.checkpoints_dir / model_type)),
            "checkpoint_sha256": checkpoint_digest(checkpoint),
        }

    def _fit_final(
        self,
        model_type: str,
        model: WaferClassifier,
        data: WaferMapDataModule,
        folder: Path,
        resume_from: Path | None,
        seconds: float | None,
    ) -> History:
        on_terminal = self.console.is_terminal and not self.config.quiet
        history = History(say=None if on_terminal else self._say)
        callbacks: list[pl.Callback] = [
            history,
            EarlyStopping("val_macro_f1", mode="max", patience=self.config.early_stopping_patience),
            self._best_weights(folder, "best"),
            # A second one, unmonitored, because `save_last` follows the best epoch rather than the last.
            ModelCheckpoint(folder, filename="resume", enable_version_counter=False),
        ]
        if seconds is None and self.config.time_limit is not None:
            seconds = self.config.time_limit / len(self.config.model_types())
        if seconds is not None:
            callbacks.insert(0, TimeBudget(seconds))
        if on_terminal:
            callbacks.insert(0, ProgressBar(self.console, model_type))
        run, epochs = self._model_runs.get(model_type), self.config.max_epochs
        self.fit(model_type, model, data, callbacks, run=run, max_epochs=epochs, resume_from=resume_from)
        return history

    def fit(
        self,
        model_type: str,
        model: WaferClassifier,
        data: WaferMapDataModule,
        callbacks: list[pl.Callback],
        *,
        max_epochs: int,
        run: Run | None = None,
        resume_from: Path | None = None,
    ) -> None:
        """What all trainings have in common: Lightning's Trainer as the configuration wants it."""
        config, interrupt = self.config, KeepInterrupt()
        logger = self.tracking.logger(run) if run is not None else False
        if logger:
            callbacks = [*callbacks, LearningRateMonitor(logging_interval="epoch")]
        trainer = pl.Trainer(
            max_epochs=max_epochs, accelerator=config.accelerator,
            devices=1 if config.devices == "auto" else config.devices,
            precision=self.precision(model_type), accumulate_grad_batches=config.accumulate_grad_batches,
            callbacks=[interrupt, *callbacks], logger=logger, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, default_root_dir=config.checkpoints_dir, plugins=[CheckpointFiles()],
        )  # fmt: skip
        try:
            trainer.fit(model, datamodule=data, ckpt_path=resume_from, weights_only=True)
        except SystemExit:  # Lightning turns Ctrl-C into an exit of status 1; whoever called decides what to do
            raise KeyboardInterrupt from None
        finally:
            interrupt.give_back()

    @staticmethod
    def _best_weights(folder: Path, filename: str) -> ModelCheckpoint:
        return ModelCheckpoint(
            folder, filename=filename, monitor="val_macro_f1", mode="max", save_weights_only=True,
            enable_version_counter=False,
        )  # fmt: skip

    def _fingerprint(self) -> str:
        if self.split is None:
            self.prepare_data()
        text = f"{self.config.training_fingerprint()} {self.split.fingerprint} {self._equal_share()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _weights_source(self, model: WaferClassifier, folder: TrainingFolder, *, resumed: bool) -> str:
        """What the training really started from; remembered beside the checkpoint, since a resumed run cannot tell."""
        if resumed:
            started = folder.started()
            model.set_learning_rate(started["learning_rate"])
            return started["weights"]
        source = model.weights_source
        folder.remember_start(weights=source, learning_rate=model.learning_rate)
        if not source.startswith("random"):
            self._say(f"  starts from {source}")
        elif self.config.use_pretrained:
            self._say(f"  no pre-trained weights: {source[len('random (') : -1]}; goes on without")
        return source

    # --- tracking

    def open_tracking(self) -> RunTree | NoRuns:
        """Connects to the tracker, if it is wanted."""
        config = self.config
        if config.enable_mlflow and self.tracking.closed:
            self.tracking = (WandbTree if config.tracker == "wandb" else RunTree)(
                config.experiment_name,
                uri=config.tracking_uri,
                folder=Path(config.output_dir),
                # The file itself: it warns from another thread, whoever redirects `sys.stderr` meanwhile.
                warn=Console(file=sys.stderr, markup=False, emoji=False, highlight=False, soft_wrap=True).print,
                resume=config.resume,
                tags=code_tags(),
            )
        return self.tracking

    def _start_parent_run(self) -> None:
        config = self.config
        if not config.enable_mlflow:
            return
        run = self._parent_run = self.tracking.start(config.experiment_name, key=self._fingerprint())
        # Not what, but how or where: it may change when a run goes on, and a parameter cannot.
        how = ("resume", "quiet", "output_dir", "pretrained_dir", "pretrained_wait", "enable_mlflow", "tracker",
               "tracking_uri", "storage")  # fmt: skip
        self.tracking.params(run, **{k: v for k, v in asdict(config).items() if k not in how})
        self.tracking.tags(run, **{f"environment.{k}": str(v) for k, v in environment().items()})
        counts = dict(zip(CLASS_NAMES, self.maps.class_counts.tolist(), strict=True))
        parts = {part: len(indices) for part, indices in self.split.parts().items()}
        self.tracking.dataset(
            run,
            name=Path(self.maps.source).name,
            digest=self.split.fingerprint,
            source=str(self.maps.source),
            profile=json.dumps({"maps": len(self.maps), "split": parts, "classes": counts}),
        )
        self.tracking.watch_system(run)

    def _track_outcome(self, summary: dict[str, Any]) -> None:
        """Final scores and pictures: those of each model to its run, the comparison to the pipeline's."""
        folder = self.config.results_dir
        for result in summary["models"]:
            run, test = self._model_runs[result["model_type"]], result["test"]
            scores = {f"test_{name}": test[name] for name in ("accuracy", "macro_f1", "balanced_accuracy")}
            seconds = {"train_seconds": result["train_seconds"], "latency_ms": result["latency_ms"]}
            self.tracking.params(run, **result["parameters"], seed=self.config.seed)
            self.tracking.metrics(run, scores | seconds | {"n_parameters": result["n_parameters"]})
            self.tracking.tags(run, weights=result["weights"], weights_from=result.get("weights_from", "training"))
            self.tracking.files(
                run,
                [
                    folder / f"per_class_{result['model_type']}.csv",
                    *folder.glob(f"optuna_{result['model_type']}_*.png"),
                ],
            )
            self.tracking.end(run)
        best = next(r for r in summary["models"] if r["model_type"] == summary["best_model"])
        self.tracking.metrics(self._parent_run, {"best_test_macro_f1": best["test"]["macro_f1"]})
        self.tracking.tags(self._parent_run, best_model=summary["best_model"], seed=str(self.config.seed))
        written = ("experiment_summary.json", "report.html", "MODEL_CARD.md", "model_card.html")
        self.tracking.files(self._parent_run, [*sorted(folder.glob("*.png")), *(folder / name for name in written)])
        self.tracking.note(self._parent_run, comparison_markdown(comparison_rows(summary["models"])))

    def register_best(
        self, result: dict[str, Any], predictions: Predictions
    ) -> promotion.Promotion | promotion.NotRegistered:
        """Exports the best model and registers it, as champion or challenger; see `promotion.promote`.

        Args:
            result: the model's record, as `evaluate` gives it.
            predictions: of its checkpoint on the test part.
        """
        model_type, reason = result["model_type"], self._why_not_registered()
        if reason is not None:
            return promotion.NotRegistered(reason)

        def export() -> Path:
            return export_onnx(
                self.load_model(result),
                self.config.checkpoints_dir / model_type / "model.onnx",
                image_size=self.config.image_size,
                decision=decision_of(result),
                model_type=model_type,
                split=self.split.fingerprint,
            )

        outcome = promotion.promote(
            export,
            checkpoint=predictions,
            maps=self.maps,
            split=self.split,
            model_type=model_type,
            name=self.config.registry_name,
            tracking=self.tracking,
            run=self._model_runs[model_type],
            run_key=self._fingerprint(),
        )
        self._say(str(outcome))
        return outcome

    def _why_not_registered(self) -> str | None:
        config = self.config
        if not config.enable_mlflow:
            return "nothing is tracked (enable_mlflow=False)"
        if config.tracker == "wandb":
            return "offline runs of Weights & Biases have no registry (tracker='wandb')"
        if config.registry_name is None:
            return "no registry is named (registry_name=None)"
        return "MLflow could not be used; a warning said why" if self.tracking.broken else None

    # --- search

    def search_and_train(self, model_type: str) -> dict[str, Any]:
        """Searches, trains with the best parameters, and keeps whichever is better on validation: that or a trial."""
        share = self._equal_share()
        if self.config.enable_optuna:
            found = self.start_and_search(model_type)
            left = None if share is None else max(1.0, share - found["seconds"])
            return self.train_with_the_best(model_type, found, seconds=left)
        self._start_model_run(model_type)
        with self._timed("training"):
            return self.train_final_model(model_type, seconds=share)

    def _equal_share(self) -> float | None:
        limit = self.config.time_limit
        return None if limit is None else limit / len(self.config.model_types())

    def _seconds_by_merit(self, model_type: str, found: dict[str, dict[str, Any]]) -> float:
        """What is left after all searches: `favourite_share` of it for the model that did best, the rest in parts."""
        left = max(float(len(found)), self.config.time_limit - sum(search["seconds"] for search in found.values()))
        favourite = max(found, key=lambda name: found[name]["best"]["macro_f1"])
        if model_type == favourite:
            return left * self.config.favourite_share
        return left * (1 - self.config.favourite_share) / (len(found) - 1)

    def _start_model_run(self, model_type: str) -> None:
        self._model_runs[model_type] = self.tracking.start(
            f"{model_type}_optimized" if self.config.enable_optuna else model_type,
            parent=self._parent_run,
            key=f"{self._fingerprint()}/{model_type}",
        )

    def start_and_search(self, model_type: str) -> dict[str, Any]:
        """Opens the model's run in the tracker and searches with its share of the time; see `search`."""
        self._start_model_run(model_type)
        share = self._equal_share()
        with self._timed("search"):
            return self.search(model_type, seconds=None if share is None else share * self.config.search_share)

    def train_with_the_best(
        self, model_type: str, found: dict[str, Any], *, seconds: float | None = None
    ) -> dict[str, Any]:
        """The final training with the best parameters found, or the best trial where that is better on validation."""
        with self._timed("training"):
            record = self.train_final_model(model_type, self._worth_training(model_type, found), seconds=seconds)
        return self._better_of(record, found)

    def _worth_training(self, model_type: str, found: dict[str, Any]) -> dict[str, Any]:
        """The best parameters, unless the default ones are as good within the noise: those served many trainings."""
        best, defaults = found["best"], self._default_trial(model_type)
        for trial in found["trials"]:
            if trial["parameters"] == defaults != best["parameters"] and trial["state"] == "complete":
                lead = best["values"][0] - trial["values"][0]
                if lead < SEARCH_MUST_GAIN:
                    self._say(
                        f"  trial {best['number']} leads the defaults by {lead:.4f} only: the defaults are trained"
                    )
                    return defaults
        return best["parameters"]

    def search(self, model_type: str, *, seconds: float | None = None) -> dict[str, Any]:
        """Looks for good parameters with Optuna.

        The first trial has the default parameters, so that a search never ends below them. An interrupted search goes
        on with `resume=True`; the trial that was cut off runs again with its parameters.

        Args:
            model_type: a name of `MODEL_REGISTRY`.
            seconds: time limit; a trial that is running then ends early, its learning rate annealed.

        Returns:
            A plain record: sampler, pruner, seconds, trials, pareto_front, best (number, macro_f1, parameters,
            checkpoint).

        Raises:
            SearchFailedError: not one trial came to its end.
        """
        if self.split is None:
            self.prepare_data()
        study = self._studies[model_type] = self._open_study(model_type)
        wanted = self.config.num_optuna_trials
        started, before = time.monotonic(), study_seconds(study)
        self._search_deadline = None if seconds is None else started + max(0.0, seconds - before)
        # Pruned trials leave time to the others, so each may use twice its even share.
        self._trial_seconds = float("inf") if seconds is None else 2 * seconds / wanted

        def enough() -> bool:
            done = counted_trials(study)
            typical = study_seconds(study) / max(1, len(done))
            return len(done) >= wanted or self._search_time_left() < max(0.5 * typical, 1e-9)

        def report_and_stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            self._forget_beaten_trials(study, model_type)
            self._say(trial_line(study, trial, wanted=wanted, deadline=self._search_deadline))
            if enough():
                study.stop()

        if not enough():
            try:
                study.optimize(
                    lambda trial: self.optuna_objective(trial, model_type),
                    callbacks=[report_and_stop],
                    catch=(TrialFailedError,),
                    gc_after_trial=True,
                )
            except OSError as error:  # Ctrl-C while the journal's lock is given back: its file is then deleted twice
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from error
                raise
        return self._search_record(study, model_type)

    def optuna_objective(self, trial: optuna.Trial, model_type: str) -> float | tuple[float, ...]:
        """Trains one trial and returns its best validation macro F1, or a value for each of several objectives.

        Raises:
            optuna.TrialPruned: stopped as unpromising by the pruner, through Lightning's callback.
            TrialFailedError: the loss was no number or the memory did not suffice; the study goes on.
        """
        pretrained = self._starts_pretrained(model_type)
        params = suggest_parameters(trial, model_type, batch_size=self.config.batch_size, pretrained=pretrained)
        trial.set_user_attr("process", this_process())
        trial.set_user_attr("proposed_by", proposed_by(trial))
        run = self.tracking.start(f"trial {trial.number}", parent=self._model_runs.get(model_type))
        self.tracking.params(run, **params)
        try:
            model, best = self._train_trial(trial, model_type, params, run)
        except optuna.TrialPruned as pruned:
            self.tracking.end(run, "KILLED", reason=f"pruned: {pruned}")  # not FAILED: it did what was asked of it
            raise
        except KeyboardInterrupt:
            run_again(trial.study, trial)
            raise
        except (TrainingDivergedError, MemoryError, RuntimeError) as error:
            trial.set_user_attr("reason", str(error))
            self.tracking.end(run, "FAILED", reason=str(error))
            if isinstance(error, TrainingDivergedError | MemoryError) or out_of_memory(error):
                raise TrialFailedError(str(error)) from error
            raise
        values = {
            "macro_f1": best,
            "latency": measure_latency(model.eval().float(), self.config.image_size),
            "parameters": float(sum(p.numel() for p in model.network.parameters())),
        }
        self.tracking.metrics(run, {"best_val_macro_f1": best, "latency_ms": values["latency"]})
        self.tracking.end(run)
        for name, value in values.items():  # for objectives that are built on this one
            trial.set_user_attr(name, value)
        self._share_weights(trial, model_type)
        chosen = tuple(values[name] for name in self.config.objectives)
        return chosen if len(chosen) > 1 else chosen[0]

    def _train_trial(
        self, trial: optuna.Trial, model_type: str, params: dict[str, Any], run: Run
    ) -> tuple[WaferClassifier, float]:
        from optuna_integration import PyTorchLightningPruningCallback

        pl.seed_everything(self.config.seed, verbose=False)
        data = self.data_module(params["batch_size"])
        model = self.create_model(model_type, params, class_weights=data.class_weights)
        self.tracking.tags(run, weights=model.weights_source, seed=str(self.config.seed))
        history, file = History(), self._trial_file(model_type, trial.number)
        callbacks = [history, self._best_weights(file.parent, file.stem)]
        if len(self.config.objectives) == 1:  # several values cannot be pruned on
            callbacks.append(PyTorchLightningPruningCallback(trial, monitor="val_macro_f1"))
        if self._search_deadline is not None:
            callbacks.insert(0, TimeBudget(max(1.0, min(self._search_time_left(), self._trial_seconds))))
        weights = model.weights_source
        self.fit(model_type, model, data, callbacks, run=run, max_epochs=self.config.search_epochs)
        record = self._training_record(model_type, model, data, history, weights=weights, checkpoint=file)
        trial.set_user_attr("record", record)  # should these weights stay, this is what describes them
        return model, max(record["history"]["val_macro_f1"])

    def _start_without_search(self, model_type: str) -> tuple[str, float]:
        """The weights that a training really starts from, and its learning rate then; tried once for all trials."""
        if model_type not in self._starts:
            model = self.create_model(model_type)
            self._starts[model_type] = model.weights_source, model.learning_rate
        return self._starts[model_type]

    def _starts_pretrained(self, model_type: str) -> bool:
        return not self._start_without_search(model_type)[0].startswith("random")

    def _search_time_left(self) -> float:
        return float("inf") if self._search_deadline is None else self._search_deadline - time.monotonic()

    def _trial_file(self, model_type: str, number: int) -> Path:
        return self.config.checkpoints_dir / model_type / "trials" / f"{number}.ckpt"

    def _shared_weights(self) -> FileSystemArtifactStore | None:
        """Where the processes that share a study leave their trials' weights for each other."""
        folder = self.config.shared_weights_dir
        if folder is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return FileSystemArtifactStore(folder)

    def _share_weights(self, trial: optuna.Trial, model_type: str) -> None:
        file, store = self._trial_file(model_type, trial.number), self._shared_weights()
        if store is not None and file.exists():
            shared = upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=trial)
            trial.set_user_attr("artifact", shared)

    def _fetch_weights(self, trial: optuna.trial.FrozenTrial, model_type: str) -> Path | None:
        """The weights of a trial, if they are here or another process has left them where we can fetch them."""
        file, store = self._trial_file(model_type, trial.number), self._shared_weights()
        if not file.exists() and store is not None and "artifact" in trial.user_attrs:
            file.parent.mkdir(parents=True, exist_ok=True)
            with suppress(ArtifactNotFound):
                download_artifact(artifact_store=store, artifact_id=trial.user_attrs["artifact"], file_path=str(file))
        return file if file.exists() else None

    def _open_study(self, model_type: str) -> optuna.Study:
        """Creates the study, or takes it up again when resuming or when it is shared."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # of a trial that fails, our own line gives the reason
        config, name = self.config, f"{self.config.experiment_name}/{model_type}"
        directions = [OBJECTIVES[objective] for objective in config.objectives]
        storage = self._study_storage()
        fingerprint = self._fingerprint()
        if config.storage is None and not config.resume and name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        parts = {"study_name": name, "storage": storage, "pruner": self._pruner()}
        try:  # of several processes on one study, exactly one makes it
            study = optuna.create_study(directions=directions, **parts)
            study.set_user_attr("fingerprint", fingerprint)
            study.enqueue_trial(self._default_trial(model_type), user_attrs={"proposed_by": "the defaults"})
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(**parts)
        if study.user_attrs.get("fingerprint", fingerprint) != fingerprint:
            raise ConfigError(
                f"The study {name} was made with other settings or data. Repeat the settings of that run, leave out "
                "--resume to search anew, or choose another experiment_name."
            )
        study.sampler = self._sampler(len(study.get_trials(deepcopy=False)))
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            if not still_runs(trial.user_attrs.get("process", "? 0 0")):
                study.tell(trial.number, state=TrialState.FAIL)
                run_again(study, trial)
        return study

    def _study_storage(self) -> optuna.storages.BaseStorage:
        if self.config.storage is not None:
            return open_database(self.config.storage)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.config.results_dir.mkdir(parents=True, exist_ok=True)
        journal = self.config.results_dir / "optuna_journal.log"
        mend_journal(journal)
        return JournalStorage(JournalFileBackend(str(journal)))

    def _sampler(self, trials_so_far: int) -> optuna.samplers.BaseSampler:
        """Seeded by the trials so far, too: one made anew on resuming would else propose again what it did before."""
        seed = int(np.random.SeedSequence([self.config.seed, trials_so_far]).generate_state(1)[0])
        if self.config.storage is not None:
            seed = None  # a shared study must not draw the same proposals in each process
        if self.config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=TPE_STARTS_AFTER)

    def _pruner(self) -> optuna.pruners.BasePruner:
        name = self.config.pruner
        if name == "auto":  # Hyperband spreads its trials over brackets, each of which TPE has to learn anew
            name = "median" if self.config.num_optuna_trials < 30 else "hyperband"
        match name:
            case "median":
                return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
            case "halving":
                return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
            case "hyperband":
                return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.config.search_epochs)
        return optuna.pruners.NopPruner()

    def _default_trial(self, model_type: str) -> dict[str, Any]:
        """The parameters that would be used without a search, as far as the search space has them."""
        defaults = {"batch_size": self.config.batch_size, "weight_decay": 0.05, **MODEL_REGISTRY[model_type].defaults}
        defaults["learning_rate"] = self._start_without_search(model_type)[1]  # weights to fine-tune have their own
        own_space = own_search_space(model_type, pretrained=self._starts_pretrained(model_type))
        own = {name: values[0] for name, values in own_space.items()}
        space = {*SHARED_SEARCH_SPACE, *own_space}
        return {name: value for name, value in (own | defaults).items() if name in space}

    def _forget_beaten_trials(self, study: optuna.Study, model_type: str) -> None:
        """Deletes the weights of trials that can no longer win."""
        trials, store = study.get_trials(deepcopy=False), self._shared_weights()
        done = any(trial.state == TrialState.COMPLETE for trial in trials)
        keep = {trial.number for trial in study.best_trials} if done else set()
        keep |= {trial.number for trial in trials if trial.state == TrialState.RUNNING}
        for file in self._trial_file(model_type, 0).parent.glob("*.ckpt"):
            if not file.stem.isdigit() or int(file.stem) not in keep:
                file.unlink(missing_ok=True)
        for trial in trials:
            if store is not None and trial.number not in keep and "artifact" in trial.user_attrs:
                with suppress(ArtifactNotFound):  # another process may have been first
                    store.remove(trial.user_attrs["artifact"])

    def _search_record(self, study: optuna.Study, model_type: str) -> dict[str, Any]:
        if not completed(study):
            reasons = {t.user_attrs["reason"] for t in study.get_trials() if "reason" in t.user_attrs}
            raise SearchFailedError(
                f"{model_type}: none of {len(study.trials)} trials came to its end"
                f"{'. Reasons: ' + '; '.join(sorted(reasons)) if reasons else ''}. Give the search more time or epochs."
            )
        best = max(study.best_trials, key=lambda trial: trial.values[0])
        checkpoint = self._fetch_weights(best, model_type)
        if checkpoint is None:
            self._say(
                f"  the weights of trial {best.number}, the best, are not here: its parameters are trained anew. Give "
                "all processes that share this study a folder for them (artifacts=...)."
            )
        trials = study.get_trials(deepcopy=False)
        return {
            "study": study.study_name,
            "sampler": type(study.sampler).__name__,
            "proposed_by": dict(Counter(t.user_attrs["proposed_by"] for t in trials if "proposed_by" in t.user_attrs)),
            "pruner": type(study.pruner).__name__ if len(self.config.objectives) == 1 else None,
            "objectives": list(self.config.objectives),
            "seconds": study_seconds(study),
            "best": {
                "number": best.number,
                "values": best.values,
                "macro_f1": best.user_attrs["macro_f1"],
                "best_epoch": best.user_attrs.get("record", {}).get("best_epoch"),
                "parameters": best.params,
                "checkpoint": None if checkpoint is None else f"trials/{checkpoint.name}",
                "record": best.user_attrs.get("record"),
            },
            "pareto_front": [
                {"number": t.number, "values": t.values, "parameters": t.params} for t in study.best_trials
            ],
            "trials": [trial_record(trial) for trial in trials],
        }

    def _better_of(self, record: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """The record of the final training, or of the best trial where its own weights are better on validation.

        Parameters, epochs and history are those of the weights that stay; what was beaten is kept beside them.
        """
        best, final = found["best"], max(record["history"]["val_macro_f1"])
        search = found | {"best": {key: value for key, value in best.items() if key != "record"}}
        more = {"search": search, "total_seconds": found["seconds"] + record["train_seconds"]}
        if best["checkpoint"] is None or best["macro_f1"] <= final:
            return {**record, "weights_from": "final training", **more}
        self._say(f"  trial {best['number']} stays: {best['macro_f1']:.3f} on validation, final training {final:.3f}")
        beaten = ("parameters", "epochs", "best_epoch", "train_seconds", "history")
        more["final_training"] = {key: record[key] for key in beaten}
        return {**best["record"], "weights_from": f"trial {best['number']}", **more}

    # --- after training

    def evaluate(self, trained: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Predictions]]:
        """Scores trained models: on validation for the choice, then on test, which nothing before has seen.

        Returns:
            The records with `validation`, `test` (see `compute_metrics`) and `latency_ms` added, and the
            test predictions of each model.
        """
        results, predictions = [], []
        for record in trained:
            self._say(f"\n{record['model_type']}, scored on the validation and the test part", style="bold")
            model = self.load_model(record)
            by_views = {"validation": self._probabilities(model, "validation")}
            decision = self._decide(by_views["validation"])
            untuned = Decision(left_out=decision.left_out)
            self._check_is_what_was_trained(record, untuned.of_views(by_views["validation"]))
            by_views["test"] = self._probabilities(model, "test")
            predicted = {part: self._predictions(part, decision.of_views(p)) for part, p in by_views.items()}
            scores = {part: compute_metrics(p) for part, p in predicted.items()}
            latency = measure_latency(model, self.config.image_size, views=decision.views)
            results.append({**record, **scores, "latency_ms": latency, "left_out": decision.left_out})
            if self.config.tune_decision:
                plain = {
                    part: compute_metrics(self._predictions(part, untuned.of_views(p))) for part, p in by_views.items()
                }
                results[-1]["decision"] = decision_record(decision, plain, scores)
            predictions.append(predicted["test"])
        return results, predictions

    def _check_is_what_was_trained(self, record: dict[str, Any], probabilities: np.ndarray) -> None:
        """Refuses weights whose validation score is not the best of their own history.

        Raises:
            DamagedFileError: they are other weights, or no longer what they were.
        """
        confusion = self._predictions("validation", probabilities).confusion()
        score, expected = float(macro_f1(torch.from_numpy(confusion))), max(record["history"]["val_macro_f1"])
        # In bfloat16, in which training may have computed it, answers on the edge fall to the other side: of a network
        # that has learnt little yet, quite some. Its check sum has shown that the file is what was written.
        if abs(score - expected) > (0.02 if record["precision"] == "32-true" else 0.15):
            raise DamagedFileError(
                f"{record['model_type']}: the checkpoint scores {score:.3f} on validation, the best epoch of its "
                f"training {expected:.3f}. It is not what was trained. Leave out --resume to train anew."
            )

    def _probabilities(self, model: WaferClassifier, part: str) -> dict[int, np.ndarray]:
        views = VIEWS if self.config.tune_decision else (1,)
        return probabilities_by_views(model, self.data_module().images(part), views)

    def _predictions(self, part: str, probabilities: np.ndarray) -> Predictions:
        """What was answered on the "validation" or "test" part, with the truth and the lots beside it.

        Only the classes that training had maps of are in it: of the others nothing can be known.
        """
        indices, trained = self.split.parts()[part], self._train_counts() > 0
        among_trained = np.cumsum(trained) - 1
        return Predictions(
            probabilities=probabilities[:, trained],
            labels=among_trained[self.maps.labels[indices]],
            groups=self.maps.groups[indices],
            class_names=tuple(np.array(CLASS_NAMES)[trained]),
        )

    def _train_counts(self) -> np.ndarray:
        """int64 [9], training maps of each class."""
        return np.bincount(self.maps.labels[self.split.train], minlength=NUM_CLASSES)

    def _decide(self, by_views: dict[int, np.ndarray]) -> Decision:
        """Chooses views, prior correction and temperature on validation, where that is asked for."""
        counts = self._train_counts()
        if not self.config.tune_decision:
            return Decision(left_out=tuple(np.flatnonzero(counts == 0).tolist()))
        return choose_decision(by_views, self.maps.labels[self.split.validation], counts)

    def load_model(self, record: dict[str, Any]) -> WaferClassifier:
        """The best epoch of a trained model, on the CPU, in evaluation mode."""
        parameters = {k: v for k, v in record["parameters"].items() if k in self._own_parameters(record["model_type"])}
        model = self.create_model(record["model_type"], parameters, class_weights=[1.0] * NUM_CLASSES, pretrained=False)
        if record["parameters"].get("class_weights") is None:
            model.loss.weight = None
        file = self.config.checkpoints_dir / record["model_type"] / record["checkpoint"]
        checkpoint = read_checkpoint(file, expected=record.get("checkpoint_sha256"))
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval()

    @staticmethod
    def _own_parameters(model_type: str) -> set[str]:
        spec = MODEL_REGISTRY[model_type]
        return {*SHARED_SEARCH_SPACE, *spec.search_space, *spec.defaults}

    def _draw(self, results: list[dict[str, Any]], predictions: Predictions, best: int) -> None:
        folder, name = self.config.results_dir, results[best]["model_type"]
        test_maps = [self.maps[i] for i in self.split.test]
        plot_confusion_matrix(
            predictions, path=folder / "confusion_matrix.png", title=f"{name}: {len(test_maps):,} test maps"
        )
        plot_sample_predictions(
            test_maps, predictions, path=folder / "sample_predictions.png",
            title=f"{name}: test maps, right and wrong", seed=self.config.seed,
        )  # fmt: skip
        plot_model_comparison(comparison_rows(results), path=folder / "model_comparison.png")
        plot_training_history({r["model_type"]: r["history"] for r in results}, path=folder / "training_history.png")
        for model_type, study in self._studies.items():
            plot_study(study, folder=folder, name=model_type, objectives=self.config.objectives)
        for result in results:
            write_per_class_table(result["test"], path=folder / f"per_class_{result['model_type']}.csv")

    def _report(self, summary: dict[str, Any]) -> None:
        """The same as one page to read, and a card of the best model."""
        folder = self.config.results_dir
        first = ("model_comparison.png", "confusion_matrix.png", "sample_predictions.png", "training_history.png")
        searches = [file.name for r in summary["models"] for file in sorted(folder.glob(f"optuna_{r['model_type']}_*"))]
        drawn = [name for name in (*first, *searches) if (folder / name).exists()]
        write_report(summary, folder=folder, pictures=drawn, path=folder / "report.html")
        write_model_card(summary, folder=folder)

    def _summarise(self, results: list[dict[str, Any]], best: str) -> dict[str, Any]:
        counts = {
            part: dict(zip(CLASS_NAMES, np.bincount(self.maps.labels[i], minlength=NUM_CLASSES).tolist(), strict=True))
            for part, i in self.split.parts().items()
        }
        return {
            "experiment_name": self.config.experiment_name,
            "mode": "pipeline",
            "command": command_line_used(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "verdict": " ".join(
                [
                    pipeline_verdict(results, best),
                    *(f"{name} could not be trained: {error}" for name, error in self._failed.items()),
                ]
            ),
            "config": asdict(self.config),
            "environment": environment(),
            "data": {
                "source": self.maps.source,
                "notes": (*self.maps.notes, *self.split.notes),
                "maps": len(self.maps),
                "lots": self.maps.n_lots,
            },
            "split": {"fingerprint": self.split.fingerprint, "class_counts": counts},
            "models": results,
            "failed_models": [
                {"model_type": name, "reason": f"{type(error).__name__}: {error}"}
                for name, error in self._failed.items()
            ],
            "best_model": best,
            "best_model_rule": "highest macro F1 on the validation part",
            "seconds": self.seconds,
        }

    # --- the terminal

    def _say(self, text: str, *, style: str | None = None) -> None:
        """Prints a line as it is: brackets in a path are no markup. The terminal wraps; a log keeps whole lines."""
        self.console.print(text, soft_wrap=True, markup=False, emoji=False, style=style)

    def _timed(self, phase: str) -> Stopwatch:
        return Stopwatch(self.seconds, phase)

    def _print_configuration(self) -> None:
        config = self.config
        limit = f", at most {config.time_limit:g} s of training" if config.time_limit else ""
        self._say(config.experiment_name, style="bold")
        self._say(f"  models     {', '.join(config.model_types())}")
        self._say(f"  data       {config.data}, maps resized to {config.image_size}x{config.image_size}")
        self._say(f"  training   {config.max_epochs} epochs, batches of {config.batch_size}{limit}")
        self._say(f"  precision  {config.precision}, seed {config.seed}")

    def _print_outcome(self, results: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for result in results:
            test = result["test"]
            self._say(
                f"\n{result['model_type']} Results: accuracy {test['accuracy']:.4f}, macro F1 {test['macro_f1']:.4f} "
                f"(best epoch {result['best_epoch']} of {result['epochs']})"
            )
        out = Console(highlight=False) if self.config.quiet else self.console
        out.print()
        out.print(comparison_table(comparison_rows(results)))
        spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary["seconds"].items())
        self._say(f"Best on validation: {summary['best_model']}. Time spent: {spent}.")
        for failed in summary["failed_models"]:
            self._say(f"Not trained: {failed['model_type']} ({failed['reason']})")
        self._say(f"Results and pictures: {self.config.results_dir}")
        if self.config.enable_mlflow and self.config.tracker == "wandb" and not self.tracking.broken:
            self._say(
                f"Weights & Biases: `wandb sync {self.tracking.uri}/offline-run-*` sends the runs, if you want it"
            )
        elif self.config.enable_mlflow and not self.tracking.broken:
            where = "" if self.config.tracking_uri else f" in {Path(self.config.output_dir).resolve()}"
            self._say(f"MLflow: run `mlflow ui`{where} and open http://127.0.0.1:5000")
