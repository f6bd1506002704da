"""A model whose validation scores are written down beforehand, and a way to look at a training before it starts."""

from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import torch
from conftest import tiny_settings
from torch import nn

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.models.classifier import WaferClassifier
from waferlab.records import StartingWeights, TrainingRecord

settings = partial(tiny_settings, model_type="scripted", enable_mlflow=False, enable_optuna=False)


def pipeline(data, folder, **more):
    """A pipeline on tiny data, by default with the scripted model, without search and tracking."""
    made = IntegratedMLPipeline(ExperimentConfig(**settings(data, folder, **more)))
    made.config.results_dir.mkdir(parents=True, exist_ok=True)
    return made


def pipeline_in(folder, **more):
    """A pipeline that trains a small CNN for an epoch on the `tiny.npz` of a folder."""
    small = {"model_type": "lightning_cnn", "max_epochs": 1, "learning_rate": 0.01}
    return IntegratedMLPipeline(ExperimentConfig(**settings(folder / "tiny.npz", folder, **small | more)))


def as_trained(trained, **more):
    """A pipeline with the settings and the folder of the model that the fixture `trained` gives."""
    made = pipeline_in(trained[0], **more)
    made.prepare_data()
    return made


class Scripted(WaferClassifier):
    """A linear model whose validation macro F1 follows a script, one a training; its weights tell their epoch.

    Batches that reach it are kept in `seen`, by step.
    """

    scripts: ClassVar[list[list[float]]] = []
    seen: ClassVar[dict[str, list[torch.Tensor]]] = {}

    def __init__(self, *, dropout=0.1, **training):
        super().__init__(**training)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 9))
        self.network.register_buffer("epoch", torch.zeros(()))

    def on_fit_start(self):
        super().on_fit_start()
        self.script = Scripted.scripts.pop(0) if Scripted.scripts else None

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.network.epoch.fill_(self.current_epoch + 1)

    def training_step(self, batch, batch_idx):
        Scripted.seen.setdefault("fit", []).append(batch[0].clone())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        Scripted.seen.setdefault("val", []).append(batch[0].clone())
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if self.script is None:
            super().on_validation_epoch_end()
        else:
            self.log("val_macro_f1", self.script[self.current_epoch])


def a_record(**more):
    """The record of a training that never was."""
    return TrainingRecord(
        **{
            "model_type": "scripted",
            "parameters": {"batch_size": 16, "learning_rate": 0.004, "betas": [0.9, 0.999]},
            "weights": StartingWeights("published", name="ResNet18_Weights.IMAGENET1K_V1"),
            "precision": "32-true",
            "n_parameters": 153,
            "epochs": 3,
            "best_epoch": 2,
            "train_seconds": 1.5,
            "history": {"epoch": [1, 2, 3], "val_macro_f1": [0.25, 0.75, 0.5], "learning_rate": [0.1, 0.05, 0.0]},
            "checkpoint": "best.ckpt",
            "checkpoint_sha256": "0" * 64,
        }
        | more
    )


class BeforeTraining(Exception):
    """Raised in place of a training; holds what Lightning was handed."""

    def __init__(self, trainer, model, data):
        super().__init__("stopped before the training")
        self.trainer, self.model, self.data = trainer, model, data

    def callback(self, kind):
        return next(c for c in self.trainer.callbacks if isinstance(c, kind))


def before_training(monkeypatch, start):
    """What Lightning's `fit` is handed by `start()`: trainer, model and data; nothing is trained."""

    def stop(trainer, model, *, datamodule, **_):
        raise BeforeTraining(trainer, model, datamodule)

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", stop)
        try:
            start()
        except BeforeTraining as seen:
            return seen
    raise AssertionError("nothing was about to be trained")
