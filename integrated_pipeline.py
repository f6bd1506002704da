"""The whole chain, told from top to bottom.

    results = IntegratedMLPipeline(ExperimentConfig(enable_optuna=False, enable_mlflow=False)).run_complete_pipeline()

reads or generates wafer maps, splits them by lot, searches and trains every chosen model with Lightning, opens the test
part once, draws the pictures, writes the summary and registers the best model.

Reading order: the architectures and what a search may choose of them; then the pipeline, in the order in which a run
goes through it: data, models, training, search, MLflow, evaluation, what comes out. How each of these is done is in
`waferlab/`, one folder a concern; all options are in `waferlab/config.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from rich.console import Console

from simple_model import LightningCNN
from waferlab.config import ExperimentConfig
from waferlab.data.datamodule import WaferMapDataModule
from waferlab.data.maps import WaferMaps
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import Split, split_maps
from waferlab.deployment.onnx_export import export_onnx
from waferlab.deployment.predictor import Predictor
from waferlab.deployment.promotion import NotRegistered, Promotion, promote
from waferlab.errors import RunError, TrainingDivergedError, TrialFailedError, ends_one_model, out_of_memory
from waferlab.evaluation.inference import decision_of, measure_latency, score_model
from waferlab.evaluation.predictions import Predictions
from waferlab.models.classifier import OPTIMIZERS, WaferClassifier
from waferlab.models.registry import MODEL_REGISTRY, ModelSpec, find_model, our_names, register_model  # noqa: F401
from waferlab.models.starting_weights import start_from
from waferlab.models.torchvision_models import TorchvisionLightningModel
from waferlab.models.yolo import YOLOLightningAdapter
from waferlab.monitoring.reference import REFERENCE_FILE, Reference
from waferlab.records import (
    BestTrial,
    ModelResult,
    SearchRecord,
    TrainedModel,
    TrainingRecord,
    code_tags,
    summarise,
    write_summary,
)
from waferlab.reports.run_report import draw_run, write_pages
from waferlab.reports.tracked_run import start_pipeline_run, track_epochs, track_outcome
from waferlab.search.budget import SearchPlan, plan_search, planned_once, seconds_by_merit
from waferlab.search.model_search import ModelSearch
from waferlab.search.portfolio import PORTFOLIOS
from waferlab.search.study import proposed_by, run_again, study_plots
from waferlab.search.told import Listener, ToldRuns, ToldTerminal
from waferlab.search.trial_files import TrialFiles
from waferlab.search.trials import Validation, pack_answers, study_seconds, take_up, trial_tag
from waferlab.search.workers import what_is_here_stays, workers_for
from waferlab.terminal import Terminal, quiet_libraries
from waferlab.tracking.processes import this_process
from waferlab.tracking.runs import NoRuns, Run, RunTree
from waferlab.tracking.wandb_runs import WandbTree
from waferlab.training.callbacks import (
    BestAnswers,
    EpochLines,
    History,
    KeepInterrupt,
    Patience,
    SeedEachEpoch,
    TimeBudget,
)
from waferlab.training.checkpoints import (
    CheckpointFiles,
    TrainingFolder,
    best_weights,
    every_epoch,
    hold_folders,
    load_trained,
    record_training,
)
from waferlab.training.devices import SameStatistics, arguments_of_several, make_trainer, on_each_device
from waferlab.training.memory import SmallerParts, keep_freed_memory
from waferlab.training.pace import QuickestThreads, possible_precisions, seconds_a_step
from waferlab.training.side_by_side import Tell

# ------------------------------------------------------------------------------------------------- the architectures


def suggest_parameters(
    trial: optuna.trial.BaseTrial, model_type: str, *, batch_size: int, pretrained: bool = True,
    learning_rate: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Asks a trial for what all have, and for the architecture's own; `batch_size` is one more choice.

    The learning rate is looked for around the one that is taken without a search, `learning_rate` or the default: up to
    8 times larger or smaller; where it has been tuned, not below its half, as after few epochs small rates look better
    than they are (Wu et al. 2018, arXiv 1803.02021). What `pretrained` weights have decided or need is heeded.
    """
    spec = find_model(model_type)
    usual = learning_rate or spec.parameters()["learning_rate"]
    around = max(min(1e-5, usual), usual / (2 if spec.portfolio else 8)), min(max(1e-1, usual), usual * 8)
    shared = {
        "learning_rate": trial.suggest_float("learning_rate", *around, log=True),
        "batch_size": trial.suggest_categorical("batch_size", tuple(sorted({16, 32, 64, batch_size}))),
        **({"dropout": trial.suggest_float("dropout", 0.1, 0.6)} if "dropout" in spec.parameters() else {}),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
    }
    return shared | spec.suggest(trial, pretrained=pretrained)


def suggest_for_cnn(trial: optuna.trial.BaseTrial, *, pretrained: bool) -> dict[str, Any]:
    """Optimiser of the small CNN, and its width, unless weights have one."""
    width = {} if pretrained else {"base_channels": trial.suggest_categorical("base_channels", (16, 32, 48, 64))}
    return width | {"optimizer": trial.suggest_categorical("optimizer", OPTIMIZERS)}


def suggest_freezing(trial: optuna.trial.BaseTrial, *, pretrained: bool) -> dict[str, Any]:
    """Whether only the head learns; on frozen random weights it would learn from noise, so that is not asked for."""
    return {"freeze_backbone": trial.suggest_categorical("freeze_backbone", (False, True))} if pretrained else {}


def suggest_size(trial: optuna.trial.BaseTrial, *, pretrained: bool) -> dict[str, Any]:
    """The size of the YOLO network, unless weights have one."""
    return {} if pretrained else {"model_size": trial.suggest_categorical("model_size", YOLOLightningAdapter.SIZES)}


torchvision_spec = partial(ModelSpec, TorchvisionLightningModel)
register_model(
    "lightning_cnn",
    ModelSpec(LightningCNN, suggest=suggest_for_cnn, portfolio=PORTFOLIOS["lightning_cnn"], in_all=True,
              defaults={"learning_rate": 4e-3, "dropout": 0.1, "optimizer": "muon"}),
)  # fmt: skip
register_model(
    "torchvision_resnet",
    torchvision_spec(
        fixed={"architecture": "resnet18"}, suggest=suggest_freezing, defaults={"learning_rate": 1e-3, "dropout": 0.2},
        portfolio=PORTFOLIOS["torchvision_resnet"], in_all=True,
    ),
)  # fmt: skip
register_model(
    "torchvision_efficientnet",
    torchvision_spec(
        fixed={"architecture": "efficientnet_b0"}, suggest=suggest_freezing,
        defaults={"learning_rate": 3e-3, "dropout": 0.2}, portfolio=PORTFOLIOS["torchvision_efficientnet"], in_all=True,
    ),
)  # fmt: skip
register_model(
    "yolo_inspired",
    ModelSpec(YOLOLightningAdapter, suggest=suggest_size, portfolio=PORTFOLIOS["yolo_inspired"], in_all=True,
              defaults={"learning_rate": 2e-3, "dropout": 0.2}),
)  # fmt: skip
register_model(
    "torchvision_resnet50",
    torchvision_spec(
        fixed={"architecture": "resnet50"}, suggest=suggest_freezing, defaults={"learning_rate": 1e-3, "dropout": 0.2}
    ),
)
register_model(
    "efficientnet_lite0",
    ModelSpec(TorchvisionLightningModel, fixed={"architecture": "efficientnet_lite0"}, suggest=suggest_freezing,
              defaults={"learning_rate": 1e-3, "dropout": 0.2}),
)  # fmt: skip
# Adding an architecture is this one call.
register_model(
    "vision_transformer",
    torchvision_spec(fixed={"architecture": "vit_b_16"}, defaults={"learning_rate": 1e-3, "dropout": 0.2}, patch=8),
)

FORWARD_SHARE = 0.35  # of the time of a training step is that of an answer, which validation needs
MAPS_OF_A_TRIALS_EPOCH = 8192  # at most: where there are many more, trials need not see all of them to be told apart
FINE_TUNING_SHARE = 1 / 3  # of a model's own learning rate, when it starts from weights made on generated maps


# ----------------------------------------------------------------------------------------------------- the pipeline


class IntegratedMLPipeline:
    """Trains, compares, reports and registers the models that a configuration names.

    Args:
        config: what to do.
        console: where to print; the standard output by default.

    Attributes:
        maps: all wafer maps, after `prepare_data`.
        split: its three parts.
        runs: the tree of runs in the tracker.
        model_runs: the run of each model in it.
        searches: those that are going on, by model.
        studies: of all searches, by model.

    Example:
        >>> config = ExperimentConfig(model_type="lightning_cnn", enable_optuna=False, enable_mlflow=False)
        >>> summary = IntegratedMLPipeline(config).run_complete_pipeline()
    """

    def __init__(self, config: ExperimentConfig, *, console: Console | None = None) -> None:
        self.config = config
        self.terminal = Terminal(console or Console(highlight=False, quiet=config.quiet), quiet=config.quiet)
        self.say = self.terminal.say
        self.maps: WaferMaps | None = None
        self.split: Split | None = None
        self.runs: RunTree | NoRuns = NoRuns()
        self.model_runs: dict[str, Run] = {}
        self.searches: dict[str, ModelSearch] = {}
        self.studies: dict[str, optuna.Study] = {}
        self.failed: dict[str, BaseException] = {}
        self.problems: list[str] = []
        self._data: WaferMapDataModule | None = None
        self._starts: dict[str, WaferClassifier] = {}
        self._paces: dict[tuple[str, str | int], float] = {}
        self._given, self._shares_a_training = (None, None), False  # maps and split; with other processes

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
        with hold_folders(self.config.results_dir, self.config.checkpoints_dir):
            self.terminal.print_configuration(self.config)
            self.failed, self.problems, self.terminal.seconds = {}, [], {}
            with self.terminal.timed("data"):
                self.prepare_data(*self._given)
            self.config.write_yaml(self.config.results_dir / "config.yaml")
            with self.open_tracking().closing(), what_is_here_stays():
                return self._run(
                    start_pipeline_run(self.runs, self.config, self.maps, self.split, key=self._fingerprint())
                )

    def _run(self, parent: Run) -> dict[str, Any]:
        """Trains, scores and writes down what came out, before anything is tried that may fail for another reason."""
        trained = self._train_all(parent)
        with self.terminal.timed("evaluation"):
            results, predictions = self.evaluate(trained)
        best = max(range(len(results)), key=lambda i: results[i].validation["macro_f1"])
        summary = summarise(
            self.config, self.maps, self.split, results,
            best=results[best].model_type, failed=self.failed, seconds=self.terminal.seconds,
        )  # fmt: skip
        self._write(summary, registered=None, not_registered_because="the registration did not come to its end")
        with self.terminal.timed("pictures"), self._or_a_line("pictures could not be drawn"):
            plots = {name: study_plots(study, self.config.objectives) for name, study in self.studies.items()}
            draw_run(self.config, results, predictions, best=best, maps=self.maps, split=self.split, searches=plots)
        self._report(summary)
        with self.terminal.timed("registration"), self._or_a_line("the model could not be registered"):
            summary |= self.register_best(results[best], predictions[best]).in_summary()
        self._report(summary)
        self._write(summary)
        track_outcome(self.config, summary, results, runs=self.runs, run=parent, model_runs=self.model_runs)
        self.terminal.print_outcome(results, summary, runs=self.runs, run=parent)
        return summary

    def _write(self, summary: dict[str, Any], **more: Any) -> None:
        summary |= {**more, "problems": self.problems}
        write_summary(self.config.results_dir / "experiment_summary.json", summary)

    def _report(self, summary: dict[str, Any]) -> None:
        with self._or_a_line("the report could not be written"):
            write_pages(summary, folder=self.config.results_dir)

    @contextmanager
    def _or_a_line(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in the block becomes a line in the terminal and the summary: the results are safe."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{what} ({type(error).__name__}: {error})")
            self.say(f"warning: {self.problems[-1]}", style="yellow")

    def _train_all(self, parent: Run) -> list[TrainedModel]:
        """Searches and trains all models; one that fails becomes a row with its reason, unless all of them do."""
        config, names, trained, searched, plans = self.config, self.config.model_types(), [], {}, {}
        if config.favours_the_best():
            for name in names:
                with self._or_a_row(name):
                    plans[name] = plan = self.plan_search(name, config.equal_share())
                    if not plan.none_because:
                        self.say(f"\n{name}, search", style="bold")
                        self._start_model_run(name, parent)
                        searched[name] = self.search(name, plan)
        left = [name for name in names if name not in self.failed]
        spent = sum(study_seconds(self.studies[name]) for name in self.failed if name in self.studies)
        merit = partial(seconds_by_merit, searches=searched, models=len(left), favourite_share=config.favourite_share)
        for name in left:
            with self._or_a_row(name):
                self.say(f"\n{name}", style="bold")
                seconds, found = merit(name, limit=config.time_limit - spent) if searched else None, searched.get(name)
                trained.append(
                    self.go_on(name, found, seconds=seconds) if found
                    else self.search_and_train(name, parent, plan=plans.get(name), seconds=seconds)
                )  # fmt: skip
        if not trained:
            reasons = "; ".join(f"{name}: {error}" for name, error in self.failed.items())
            raise self.failed[names[0]] if len(names) == 1 else RunError(f"No model could be trained. {reasons}")
        return trained

    @contextmanager
    def _or_a_row(self, model_type: str) -> Iterator[None]:
        """A model that diverges, finds nothing or has no memory ends alone; the others go on."""
        try:
            yield
        except (RuntimeError, MemoryError, ImportError) as error:
            if not ends_one_model(error):
                raise
            self.failed[model_type] = error
            self.say(f"  {model_type} is left out: {error}", style="yellow")
            if model_type in self.model_runs:
                self.runs.end(self.model_runs[model_type], "FAILED", reason=str(error))

    # --- data

    def prepare_data(self, maps: WaferMaps | None = None, split: Split | None = None) -> None:
        """Loads and splits the maps, or takes those that it is given; models and trainings need them."""
        self.maps = maps or load_wafer_maps(**self.config.data_options(), seed=self.config.seed, say=self.say)
        self.split = split or split_maps(self.maps, how=self.config.split, seed=self.config.seed)
        self._given, self._data = (maps, split), None
        self.terminal.print_data(self.maps, self.split)

    def data_module(self, batch_size: int | None = None) -> WaferMapDataModule:
        """The maps, split and in batches; they are resized once for all trials, models and the evaluation."""
        config = self.config
        if self.split is None:
            self.prepare_data()
        if self._data is None:
            self._data = WaferMapDataModule(
                self.maps, self.split, image_size=config.image_size, batch_size=config.batch_size, seed=config.seed,
                augmentation=config.data_augmentation,
                balancing=config.balance_by if config.class_balancing else "none",
            )  # fmt: skip
        return self._data.with_batch_size(batch_size or config.batch_size)

    def _fingerprint(self) -> str:
        """Changes with any setting or map that a resumed training depends on."""
        if self.split is None:
            self.prepare_data()
        text = f"{self.config.training_fingerprint()} {self.split.fingerprint} {self.config.equal_share()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # --- models

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
        config, spec, chosen = self.config, find_model(model_type), our_names(trial_params)
        if config.learning_rate is not None:
            chosen = {"learning_rate": config.learning_rate} | chosen
        own = spec.choose(model_type, chosen, image_size=config.image_size, batch_size=config.batch_size)
        model = spec.model(class_weights=class_weights, **spec.fixed, **own)
        if config.use_pretrained if pretrained is None else pretrained:
            model.starting_weights = start_from(
                model, model_type=model_type, source=config.pretrained_source, wait=config.pretrained_wait,
                folder=config.generated_weights_dir, image_size=config.image_size,
            )  # fmt: skip
        if model.starting_weights.kind == "generated" and "learning_rate" not in chosen:
            model.set_learning_rate(FINE_TUNING_SHARE * model.learning_rate)
        return model

    def load_model(self, record: TrainingRecord) -> WaferClassifier:
        """The best epoch of a trained model, on the CPU, in evaluation mode.

        Raises:
            DamagedFileError: the checkpoint is damaged, or another training's.
        """
        file = self.config.checkpoints_dir / record.model_type / record.checkpoint
        return load_trained(find_model(record.model_type).model, file, expected=record.checkpoint_sha256)

    def _start_without_search(self, model_type: str) -> WaferClassifier:
        """The model as it starts with its default parameters; made once, for all trials."""
        if model_type not in self._starts:
            self._starts[model_type] = self.create_model(model_type)
        return self._starts[model_type]

    # --- training

    def fit(
        self, model_type: str, model: WaferClassifier, data: pl.LightningDataModule, callbacks: list[pl.Callback], *,
        max_epochs: int, run: Run | None = None, resume_from: Path | None = None, batches: int | None = None,
    ) -> pl.Trainer:  # fmt: skip
        """What all trainings have in common: Lightning's Trainer as the configuration wants it.

        With `batches`, an epoch has at most so many.
        """
        config, interrupt = self.config, KeepInterrupt()
        keep_freed_memory()
        logger = False if run is None else self.runs.logger(run)
        callbacks = [interrupt, SeedEachEpoch(), SmallerParts(self.terminal.warn), *callbacks]
        if logger:
            callbacks.append(LearningRateMonitor("epoch"))
        devices = {"devices": config.one_device()}
        if self._shares_a_training:
            devices = arguments_of_several(config.devices)
            callbacks.append(SameStatistics())
        if config.threads is None:
            callbacks.append(QuickestThreads())
        else:
            torch.set_num_threads(config.threads)
        with quiet_libraries(), interrupt.heeded():
            trainer = make_trainer(
                max_epochs=max_epochs, accelerator=config.accelerator, **devices,
                precision=self.precision(model_type), accumulate_grad_batches=config.accumulate_grad_batches,
                callbacks=callbacks, logger=logger, plugins=[CheckpointFiles()],
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                default_root_dir=config.checkpoints_dir,
                **({"limit_train_batches": batches} if batches else {}) | config.trainer,
            )  # fmt: skip
            trainer.fit(model, datamodule=data, ckpt_path=resume_from, weights_only=True)
        return trainer

    def precision(self, model_type: str) -> str | int:
        """What Lightning computes this model's training in."""
        if self.config.precision != "auto":
            return self.config.precision
        if len(possible := possible_precisions(self.config.accelerator)) == 1:
            return possible[0]
        return min(possible, key=partial(self._seconds_a_step, model_type))

    def _seconds_a_step(self, model_type: str, precision: str | int) -> float:
        """As measured once, with the default parameters and one thread."""
        if (model_type, precision) not in self._paces:
            batch = next(iter(self.data_module().train_dataloader()))
            self._paces[model_type, precision] = seconds_a_step(
                self._start_without_search(model_type), batch, precision=str(precision),
                accelerator=self.config.accelerator,
            )  # fmt: skip
        return self._paces[model_type, precision]

    def train_final_model(
        self, model_type: str, params: dict[str, Any] | None = None, *, seconds: float | None = None,
        trial: BestTrial | None = None,
    ) -> TrainingRecord:  # fmt: skip
        """Trains one model and keeps its best epoch by validation macro F1.

        Args:
            model_type: a name of `MODEL_REGISTRY`.
            params: parameters that replace the defaults, such as the best of a search.
            seconds: time limit; None takes the model's share of the configuration's, if it has one.
            trial: to go on from, with the same parameters.
        """
        config, params = self.config, our_names(params)
        folder = TrainingFolder(config.checkpoints_dir / model_type, self._fingerprint(), params)
        finished = folder.finished() if config.resume else None
        if finished is not None:
            self.say(f"  finished before, taken from {folder.folder}")
            return finished
        pl.seed_everything(config.seed, verbose=False)
        data = self.data_module(params.get("batch_size"))
        model, resume_from = self._begin_final_training(model_type, params, data, folder, trial)

        def train() -> TrainingRecord:
            callbacks = [history := History(), *self._callbacks_of_final_training(model_type, folder, seconds, trial)]
            self.fit(
                model_type, model, data, callbacks,
                max_epochs=config.max_epochs, run=self.model_runs.get(model_type), resume_from=resume_from,
            )  # fmt: skip
            return record_training(
                model_type, model, data, history, precision=self.precision(model_type), checkpoint=folder.best
            )

        record = train() if config.device_count() == 1 else self._share_out(model_type, train)
        folder.finish(record)
        return record

    def _share_out(self, model_type: str, train: Callable[[], TrainingRecord]) -> TrainingRecord:
        """A training on several devices, in a process for each; what the first of them tells is printed and tracked."""

        def train_one_share(rank: int, tell: Tell) -> TrainingRecord:
            self._become_worker(tell if rank == 0 else lambda *told: None)
            self._shares_a_training = True
            return train()

        self.precision(model_type), self.data_module().setup()  # before there are several processes
        hear = Listener(self.runs, self.model_runs.get(model_type), self.terminal).hear
        return on_each_device(train_one_share, self.config, hear=hear)

    def _begin_final_training(
        self, model_type: str, params: dict[str, Any], data: WaferMapDataModule, folder: TrainingFolder,
        trial: BestTrial | None,
    ) -> tuple[WaferClassifier, Path | None]:  # fmt: skip
        """The model, and the checkpoint that Lightning is to go on from: of this training, or of a trial."""
        files = self._trial_files(model_type)
        from_trial = trial and (trial.record, files.best(trial.number), files.state(trial.number))
        cut_off = self.config.resume and folder.resume_point() is not None
        resume_from = folder.begin(resume=cut_off, from_trial=from_trial)
        fresh = None if resume_from is None else False  # a checkpoint brings all weights
        model = self.create_model(model_type, params, class_weights=data.class_weights, pretrained=fresh)
        if resume_from is None:
            folder.remember_start(model)
            self.terminal.print_start(model.starting_weights, wanted=self.config.use_pretrained)
        else:
            folder.restore_start(model)  # a checkpoint cannot tell how its training started
        if trial and not cut_off and model_type in self.model_runs:
            track_epochs(self.runs, self.model_runs[model_type], trial.record.history)
        return model, resume_from

    def _callbacks_of_final_training(
        self, model_type: str, folder: TrainingFolder, seconds: float | None, trial: BestTrial | None
    ) -> list[pl.Callback]:
        seconds = self.config.equal_share() if seconds is None else seconds
        if seconds is not None and trial is not None:
            seconds += trial.record.train_seconds  # its clock goes on
        return [
            *([TimeBudget(seconds)] if seconds is not None else []),
            self.terminal.progress(model_type) or EpochLines(self.say),
            Patience(self.config.early_stopping_patience, best=trial.record.val_macro_f1 if trial else None),
            best_weights(folder.best),
            every_epoch(folder.resume),
        ]

    def search_and_train(
        self, model_type: str, parent: Run | None = None, *, plan: SearchPlan | None = None,
        seconds: float | None = None,
    ) -> TrainedModel:  # fmt: skip
        """Searches, and goes on training the best trial to the end of the time; without a search, trains from anew."""
        share = self.config.equal_share() if seconds is None else seconds
        self._start_model_run(model_type, parent)
        if plan is None and self.config.enable_optuna:
            plan = self.plan_search(model_type, share)
        if plan and not plan.none_because:
            found = self.search(model_type, plan)
            return self.go_on(model_type, found, seconds=None if share is None else max(1.0, share - found.seconds))
        if why := plan and plan.none_because:
            self.say(f"  no search: {why}")
        with self.terminal.timed("training"):
            record = self.train_final_model(model_type, seconds=share)
        return TrainedModel(**vars(record), no_search_because=why)

    def go_on(self, model_type: str, found: SearchRecord, *, seconds: float | None = None) -> TrainedModel:
        """The final training: goes on from the trial that a search has found, to the end of the seconds."""
        best = found.best
        with self.terminal.timed("training"):
            record = self.train_final_model(
                model_type, best.parameters, seconds=seconds, trial=best if best.goes_on else None
            )
        return TrainedModel(
            **vars(record), weights_from=f"trial {best.number}, gone on with" if best.goes_on else "final training",
            search=replace(found, best=replace(best, record=None)),
            total_seconds=found.seconds + record.train_seconds - (best.record.train_seconds if best.goes_on else 0.0),
        )  # fmt: skip

    # --- search

    def plan_search(self, model_type: str, seconds: float | None) -> SearchPlan:
        """How large a search is that leaves the winner the time to learn, of `seconds` for both."""
        config, decay = self.config, find_model(model_type).parameters()["decay"]
        level = max(1, int(config.max_epochs * (1 - decay)))  # what is left is for the fall of the learning rate
        asked = {"trials": config.num_optuna_trials, "epochs": min(config.search_epochs, level), "seconds": seconds}

        def make() -> SearchPlan:
            an_epoch = 0.0
            if seconds is not None:
                data, step = self.data_module(), self._seconds_a_step(model_type, self.precision(model_type))
                validation = len(self.split.validation) / config.batch_size * FORWARD_SHARE
                an_epoch = step * (min(len(data.train_dataloader()), self._batches_of_a_trial(data)) + validation)
            share, workers = config.search_share, workers_for(config)
            return plan_search(**asked, workers=workers, share=share, seconds_an_epoch=an_epoch)

        file, of = config.checkpoints_dir / model_type / "plan.json", self._fingerprint()
        return make() if seconds is None else planned_once(file, make, asked={**asked, "of": of}, look=config.resume)

    def _batches_of_a_trial(self, data: WaferMapDataModule) -> int:
        return max(1, MAPS_OF_A_TRIALS_EPOCH // data.batch_size)

    def search(self, model_type: str, plan: SearchPlan | None = None, *, leads: bool = True) -> SearchRecord:
        """Looks for good parameters with Optuna: trials side by side, all in one study.

        The first have the defaults and the portfolio's settings. With `resume=True` an interrupted search goes on.

        Args:
            model_type: a name of `MODEL_REGISTRY`.
            plan: see `plan_search`; None for what the configuration wants, without a limit.
            leads: and waits for all who share the study; else another program leads it.

        Raises:
            SearchFailedError: not one trial came to its end.
        """
        plan, usual = plan or self.plan_search(model_type, None), self._default_trial(model_type)
        search = ModelSearch(
            model_type, self.config, plan, self._trial_files(model_type), usual,
            find_model(model_type).portfolio_around(usual), self._fingerprint(),
            self.model_runs.get(model_type), leads,
        )  # fmt: skip
        self.studies[model_type], self.searches[model_type] = search.study, search
        if search.workers > 1:  # what all of them need is made before they are
            self._start_without_search(model_type), self.precision(model_type), self.data_module().setup()
        try:
            with self.terminal.timed("search"):
                search.optimize(
                    partial(self.optuna_objective, model_type=model_type), terminal=self.terminal, runs=self.runs,
                    become_worker=self._become_worker,
                )  # fmt: skip
        finally:
            del self.searches[model_type]
        part = self.split.validation
        found = search.record(Validation(self.maps.labels[part], self.maps.groups[part]), say=self.say)
        self.terminal.print_search(found)
        return found

    def _become_worker(self, tell: Tell) -> None:
        """In a forked process: one thread, and whoever forked it prints and tracks."""
        self.config = replace(self.config, threads=1, quiet=True)
        self.terminal = ToldTerminal(self.terminal, tell)
        self.say = self.terminal.say
        if not isinstance(self.runs, NoRuns):
            self.runs = ToldRuns(self.runs, tell)

    def optuna_objective(self, trial: optuna.Trial, model_type: str) -> float | tuple[float, ...]:
        """Trains one trial and returns its best validation macro F1, or a value for each of several objectives.

        Raises:
            optuna.TrialPruned: stopped as unpromising by the pruner, through Lightning's callback.
            TrialFailedError: the loss was no number or the memory did not suffice; the study goes on.
        """
        search = self.searches.get(model_type)  # None in a study of one's own
        params = self._suggest(trial, model_type)
        trial.set_user_attr("process", this_process())
        trial.set_user_attr("proposed_by", proposed_by(trial))
        run = self.runs.start(f"trial {trial.number}", parent=search and search.run, tags=trial_tag(trial))
        try:
            model, best = self._train_trial(trial, model_type, params, run)
        except optuna.TrialPruned as pruned:
            self.runs.end(run, "KILLED", reason=f"pruned: {pruned}")  # not FAILED: it did what was asked of it
            raise
        except KeyboardInterrupt:
            run_again(trial.study, trial)
            raise
        except (TrainingDivergedError, MemoryError, RuntimeError) as error:
            self.runs.end(run, "FAILED", reason=str(error))
            trial.set_user_attr("reason", str(error))
            if isinstance(error, TrainingDivergedError) or out_of_memory(error):
                raise TrialFailedError(str(error)) from error
            raise
        values = {
            "macro_f1": best,
            "latency": measure_latency(model.eval().float(), self.config.image_size),
            "parameters": float(sum(p.numel() for p in model.network.parameters())),
        }
        for name, value in values.items():  # for objectives that are built on this one
            trial.set_user_attr(name, value)
        self.runs.metrics(run, {"best_val_macro_f1": best, "latency_ms": values["latency"]})
        self.runs.end(run)
        self._trial_files(model_type).share(trial)
        chosen = tuple(values[name] for name in self.config.objectives)
        return chosen if len(chosen) > 1 else chosen[0]

    def _train_trial(
        self, trial: optuna.Trial, model_type: str, params: dict[str, Any], run: Run
    ) -> tuple[WaferClassifier, float]:
        from optuna_integration import PyTorchLightningPruningCallback

        pl.seed_everything(self.config.seed, verbose=False)
        data = self.data_module(params["batch_size"])
        model = self.create_model(model_type, params, class_weights=data.class_weights)
        self.runs.params(run, batch_size=data.batch_size)
        self.runs.tags(run, weights=str(model.starting_weights), seed=str(self.config.seed))
        model.to_go_on = True
        search, files = self.searches.get(model_type), self._trial_files(model_type)
        file, history, answers = files.best(trial.number), History(), BestAnswers()
        seconds = search and search.budget.for_a_trial()
        callbacks = [*([TimeBudget(seconds)] if seconds else []), history, answers]
        callbacks += [best_weights(file), every_epoch(files.state(trial.number))]
        epochs = search.plan.epochs if search else self.config.search_epochs
        if state := files.begin(trial):
            epochs = max(epochs, take_up(trial, state, track=partial(track_epochs, self.runs, run)))
        if len(self.config.objectives) == 1:  # several values cannot be pruned on
            callbacks.append(PyTorchLightningPruningCallback(trial, monitor="val_macro_f1"))
        if bar := self.terminal.progress(f"trial {trial.number}"):
            callbacks.append(bar)
        self.fit(
            model_type, model, data, callbacks, run=run, batches=self._batches_of_a_trial(data), resume_from=state,
            max_epochs=epochs,
        )  # fmt: skip
        record = record_training(
            model_type, model, data, history, precision=self.precision(model_type), checkpoint=file
        )
        trial.set_user_attr("record", record.as_json())  # should this trial be gone on with, it describes what there is
        trial.set_user_attr("answers", pack_answers(answers.best))
        return model, record.val_macro_f1

    def _suggest(self, trial: optuna.trial.BaseTrial, model_type: str) -> dict[str, Any]:
        """What a search may choose of this model, from where it starts: fine-tuning has a learning rate of its own."""
        start = self._start_without_search(model_type)
        return suggest_parameters(
            trial, model_type, batch_size=self.config.batch_size, learning_rate=start.learning_rate,
            pretrained=start.starting_weights.kind != "random",
        )  # fmt: skip

    def _default_trial(self, model_type: str) -> dict[str, Any]:
        """The parameters that would be used without a search, as far as a search would choose them."""
        usual = {"learning_rate": self._start_without_search(model_type).learning_rate}
        defaults = find_model(model_type).parameters() | usual | {"batch_size": self.config.batch_size}
        return self._suggest(optuna.trial.FixedTrial(defaults), model_type)

    def _trial_files(self, model_type: str) -> TrialFiles:
        return TrialFiles(self.config.checkpoints_dir / model_type / "trials", shared=self.config.shared_weights_dir)

    # --- MLflow

    def open_tracking(self) -> RunTree | NoRuns:
        """Connects to the tracker, if it is wanted; what is logged is written by a thread of its own."""
        config = self.config
        if config.enable_mlflow and self.runs.closed:
            self.runs = (WandbTree if config.tracker == "wandb" else RunTree)(
                config.experiment_name, uri=config.tracking_uri, folder=Path(config.output_dir),
                warn=self.terminal.warn, resume=config.resume, tags=code_tags(),
            )  # fmt: skip
        return self.runs

    def _start_model_run(self, model_type: str, parent: Run | None) -> None:
        key = f"{self._fingerprint()}/{model_type}"
        self.model_runs[model_type] = self.runs.start(f"{model_type}_optimized", parent=parent, key=key)

    # --- after training

    def evaluate(self, trained: Sequence[TrainingRecord]) -> tuple[list[ModelResult], list[Predictions]]:
        """Scores trained models: on validation for the choice, then on test, which nothing before has seen.

        Returns:
            The records with scores and latency added, and the test predictions of each model.

        Raises:
            DamagedFileError: a checkpoint is not what was trained.
        """
        results, predictions = [], []
        for record in trained:
            self.say(f"\n{record.model_type}, scored on the validation and the test part", style="bold")
            result, predicted = score_model(
                self.load_model(record), record, data=self.data_module(), maps=self.maps, split=self.split,
                tune_decision=self.config.tune_decision, watch=self.terminal.watch,
            )  # fmt: skip
            results.append(result)
            predictions.append(predicted)
        return results, predictions

    def register_best(self, result: ModelResult, predictions: Predictions) -> Promotion | NotRegistered:
        """Exports the best model and registers it, as champion or challenger; see `promotion.promote`.

        Args:
            result: the model's record, as `evaluate` gives it.
            predictions: of its checkpoint on the test part.
        """
        model_type = result.model_type

        def export() -> list[Path]:
            file = export_onnx(
                self.load_model(result), self.config.checkpoints_dir / model_type / "model.onnx",
                image_size=self.config.image_size, decision=decision_of(result),
                model_type=model_type, split=self.split.fingerprint, prediction_sets=result.sets["floors"],
            )  # fmt: skip
            reference = Reference.of(Predictor(file), self.maps, self.split)
            return [file, reference.save(file.with_name(REFERENCE_FILE))]

        outcome = promote(
            export, checkpoint=predictions, maps=self.maps, split=self.split, model_type=model_type,
            name=self.config.registry_name, tracking=self.runs, run=self.model_runs.get(model_type),
            run_key=self._fingerprint(), only_exported_because=self.config.no_registry_because()
            or (self.runs.broken and "MLflow failed; a warning said why") or None,
        )  # fmt: skip
        self.say(str(outcome))
        return outcome


# ------------------------------------------------------------------------------------- what experiments are handed


def train_and_score(config: ExperimentConfig, maps: WaferMaps, split: Split) -> ModelResult:
    """One training of an experiment: the only model of a configuration, searched, trained and scored."""
    pipeline = IntegratedMLPipeline(config)
    pipeline.prepare_data(maps, split)
    (result,), _ = pipeline.evaluate([pipeline.search_and_train(config.model_types()[0])])
    return result
