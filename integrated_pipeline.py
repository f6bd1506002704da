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
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import TrialState
from rich.console import Console
from torch import nn

import evaluation
import promotion
import reporting
from checkpoints import CheckpointFiles, TrainingFolder, checkpoint_digest, hold_folder, read_checkpoint
from decision import VIEWS, Decision, choose_decision
from deployment import export_onnx
from errors import ConfigError, DamagedFileError, RunError, SearchFailedError, TrainingDivergedError
from pretrained_weights import (
    WeightsUnavailableError,
    fetch_weights,
    load_generated_weights,
    read_weights,
    sum_first_layer,
)
from simple_model import LightningCNN, WaferClassifier, macro_f1
from small_convolutions import quicken_small_convolutions
from tracking import NoTracking, TrackedRun, Tracking, still_runs, this_process
from training_callbacks import History, KeepInterrupt, ProgressBar, TimeBudget
from wafer_data import (
    CLASS_NAMES,
    IMAGE_LEVELS,
    NUM_CLASSES,
    SYNTHETIC,
    Split,
    WaferMapDataModule,
    WaferMaps,
    encode,
    load_wafer_maps,
    split_by_lot,
    symmetries,
)

# A run prints its own lines only.
for _name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
warnings.filterwarnings("ignore", category=pl.utilities.warnings.PossibleUserWarning)
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")

# ------------------------------------------------------------------------------------------------ configuration


SAMPLERS = ("auto", "tpe", "random")
PRUNERS = ("auto", "median", "halving", "hyperband", "none")
TRACKERS = ("mlflow", "wandb")
PRETRAINED_SOURCES = ("auto", "imagenet", "wafer")
FINE_TUNING_SHARE = 0.1  # of a model's own learning rate, when it starts from weights made on generated maps
TPE_STARTS_AFTER = 10  # finished trials, Optuna's own default; until then it draws at random
SEARCH_MUST_GAIN = 0.01  # validation macro F1; so much lies between two trainings that differ in their seed alone
OBJECTIVES = {"macro_f1": "maximize", "latency": "minimize", "parameters": "minimize"}


@dataclass(kw_only=True)
class ExperimentConfig:
    """Everything a run depends on. Validated on construction.

    Attributes:
        experiment_name: folder name under results/ and checkpoints/.
        model_type: "all", one registered name, or a list of names.
        use_pretrained: start from pre-trained weights where they can be had.
        pretrained_source: which: "imagenet" (published weights), "wafer" (made by pretrain.py on generated maps) or
            "auto", which takes published ones where they can be had, else those made on generated maps.
        pretrained_dir: folder of the weights made by pretrain.py; None for checkpoints/pretrained in the output
            folder.
        max_epochs: of the final training, with early stopping.
        batch_size: maps a training batch.
        num_optuna_trials: trials for each model type.
        search_epochs: epochs of a trial.
        search_share: share of the time limit that the search may use; the rest belongs to the final training.
        favourite_share: share of the final trainings' time for the model whose search scored highest, once all
            searches are done; the others share the rest. None: each model is searched and trained with an equal share.
        sampler: who proposes parameters: "auto" and "tpe" (TPE, which draws its first 10 trials at random, so that a
            shorter search is a random one) or "random".
        pruner: who stops unpromising trials: "auto" (median below 30 trials, then Hyperband), "median", "halving"
            (successive halving, the strictest: only the best third goes on after 2, 4, 10, ... epochs), "hyperband" or
            "none".
        objectives: what the search is for; "macro_f1" alone, or with "latency" and "parameters" to be small. With more
            than one, nothing is pruned and the summary lists the Pareto front.
        storage: where studies are kept: None for a journal file beside the results, or any Optuna storage URL, which
            several processes and machines may share.
        artifacts: folder that all who share `storage` can reach, in which trials leave their weights for whoever
            trains the winner; None for `<file>_weights` beside the file of an SQLite storage, else for none.
        enable_mlflow: track the runs, with MLflow unless `tracker` says otherwise.
        tracker: "mlflow", or "wandb" for offline runs of Weights & Biases in wandb/ in the output folder.
        tracking_uri: MLflow server or store; None for mlflow.db and mlruns/ in the output folder.
        registry_name: registered model that the best model becomes a version of; None registers nothing.
        enable_optuna: search before the final training.
        data_augmentation: the eight symmetries of the square and light die noise.
        class_balancing: weigh classes by the inverse square root of their frequency.
        balance_by: "sampler" (rare classes drawn more often) or "loss" (weights in the loss).
        data: "synthetic", or a path: LSWMD.pkl, .npz or a folder of class folders (see `load_wafer_maps`).
        samples_per_class: generated maps of each class.
        max_samples_per_class: keep at most so many of each class.
        image_levels: how images of a folder are read: "auto", "three" or "binary".
        image_size: side in pixels to which maps are resized; most die grids are 25 to 40 dies wide, and on real maps
            40 scored higher than 48 at equal training time.
        seed: of data, split, initial weights and batches.
        learning_rate: peak; None takes each model's own default.
        early_stopping_patience: epochs without a better validation macro F1.
        time_limit: seconds for all training together, shared equally; the learning rate is annealed to end with it.
        accelerator: passed to Lightning.
        devices: "auto" or 1 for one device, or its number in a list, [1] for the second; passed to Lightning.
        precision: passed to Lightning; "auto" takes bf16-mixed where the hardware computes in it, else 32-true.
        accumulate_grad_batches: passed to Lightning.
        pretrained_wait: seconds to wait for the host of pre-trained weights to answer.
        tune_decision: choose on validation, after training, whether to average over eight views of each map, how far
            to lean to frequent classes, and the temperature of the probabilities (see `decision.py`).
        output_dir: folder that holds results/ and checkpoints/.
        resume: go on where a run with the same settings was cut off.
        quiet: print only warnings and the final table.
    """

    experiment_name: str = "wafer_defect_complete"
    model_type: str | Sequence[str] = "all"
    use_pretrained: bool = True
    pretrained_source: str = "auto"
    pretrained_dir: str | Path | None = None
    max_epochs: int = 50
    batch_size: int = 32
    num_optuna_trials: int = 20
    search_epochs: int = 8
    search_share: float = 0.6
    favourite_share: float | None = None
    sampler: str = "auto"
    pruner: str = "auto"
    objectives: Sequence[str] = ("macro_f1",)
    storage: str | None = None
    artifacts: str | Path | None = None
    enable_mlflow: bool = True
    tracker: str = "mlflow"
    tracking_uri: str | None = None
    registry_name: str | None = "wafer_defect_classifier"
    enable_optuna: bool = True
    data_augmentation: bool = True
    class_balancing: bool = True
    balance_by: str = "sampler"
    data: str | Path = SYNTHETIC
    samples_per_class: int = 150
    max_samples_per_class: int | None = None
    image_levels: str = "auto"
    image_size: int = 40
    seed: int = 0
    learning_rate: float | None = None
    early_stopping_patience: int = 15
    time_limit: float | None = None
    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    precision: str | int = "auto"
    accumulate_grad_batches: int = 1
    pretrained_wait: float = 5.0
    tune_decision: bool = False
    output_dir: str | Path = "."
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_epochs", 1, 100_000),
            ("batch_size", 2, 65_536),
            ("num_optuna_trials", 1, 1_000_000),
            ("search_epochs", 1, 100_000),
            ("search_share", 0.05, 0.95),
            ("favourite_share", 0.05, 0.95),
            ("samples_per_class", 1, 1_000_000),
            ("max_samples_per_class", 1, 100_000_000),
            ("image_size", 16, 512),
            ("seed", 0, 2**31 - 1),
            ("learning_rate", 1e-6, 1.0),
            ("early_stopping_patience", 1, 100_000),
            ("time_limit", 1, 10_000_000),
            ("accumulate_grad_batches", 1, 100_000),
            ("pretrained_wait", 0.1, 600),
        ):
            self._check_range(name, low, high)
        self._check_one_device()
        self._check_choice("balance_by", ("sampler", "loss"))
        self._check_choice("image_levels", IMAGE_LEVELS)
        self._check_choice("sampler", SAMPLERS)
        self._check_choice("pruner", PRUNERS)
        self._check_choice("tracker", TRACKERS)
        if self.tracker == "wandb" and self.enable_mlflow and find_spec("wandb") is None:
            raise ConfigError("tracker='wandb' needs Weights & Biases, which is not installed: pip install wandb.")
        self._check_choice("pretrained_source", PRETRAINED_SOURCES)
        objectives = list(self.objectives)
        if not objectives or objectives[0] != "macro_f1" or not set(objectives) <= set(OBJECTIVES):
            raise ConfigError(
                f"objectives={self.objectives!r} cannot be searched. Name 'macro_f1' first, then any of 'latency' and "
                "'parameters'."
            )
        name = self.experiment_name
        if not name or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name) or name.strip(". ") != name:
            raise ConfigError(f"experiment_name={name!r} names a folder: use letters, digits, '_', '-' and inner dots.")
        self.model_types()

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        optional = type(self).__dataclass_fields__[name].default is None
        if value is None and optional:
            return
        integral = "int" in str(type(self).__dataclass_fields__[name].type)
        right_type = isinstance(value, int if integral else (int, float)) and not isinstance(value, bool)
        if not right_type or not low <= value <= high:
            kind = "a whole number" if integral else "a number"
            raise ConfigError(f"{name}={value!r} is out of range. Allowed: {kind} from {low:,} to {high:,}.")

    def _check_one_device(self) -> None:
        devices = self.devices
        one = devices in ("auto", "1", 1) or (isinstance(devices, list) and len(devices) == 1)
        if not one or isinstance(devices, bool):
            raise ConfigError(
                f"devices={devices!r}: a run trains on one device. Allowed: 'auto', 1, or a list of one device's "
                "number. To use several, run an experiment on each."
            )

    def _check_choice(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name}={getattr(self, name)!r} is unknown. Allowed: {', '.join(allowed)}.")

    def model_types(self) -> list[str]:
        """The chosen model types in order, each once."""
        if self.model_type == "all":
            return list(DEFAULT_MODEL_TYPES)
        names = [self.model_type] if isinstance(self.model_type, str) else list(self.model_type)
        for name in names:
            if name not in MODEL_REGISTRY:
                allowed = ", ".join(["all", *MODEL_REGISTRY])
                raise ConfigError(f"model_type={name!r} is unknown. Allowed: {allowed}.")
        if not names:
            raise ConfigError("model_type=[] is empty. Name at least one model, or 'all'.")
        return list(dict.fromkeys(names))

    def favours_the_best(self) -> bool:
        """Whether the final training's time goes by the outcome of the searches."""
        several = len(self.model_types()) > 1
        return None not in (self.favourite_share, self.time_limit) and self.enable_optuna and several

    @property
    def results_dir(self) -> Path:
        """Where the summary and the pictures go."""
        return Path(self.output_dir) / "results" / self.experiment_name

    @property
    def checkpoints_dir(self) -> Path:
        """Where the best and resume checkpoints of each model go."""
        return Path(self.output_dir) / "checkpoints" / self.experiment_name

    @property
    def generated_weights_dir(self) -> Path:
        """Where weights made on generated maps are looked for: beside all else that runs leave, in no hidden folder."""
        if self.pretrained_dir is not None:
            return Path(self.pretrained_dir)
        return Path(self.output_dir) / "checkpoints" / "pretrained"

    @property
    def shared_weights_dir(self) -> Path | None:
        """Where those who share a study leave their trials' weights; None if there is no such place."""
        if self.storage is None or self.artifacts is not None:
            return None if self.storage is None else Path(self.artifacts)
        file = self.storage.removeprefix("sqlite:///").partition("?")[0]
        return Path(f"{file}_weights") if file and self.storage.startswith("sqlite:///") else None

    def training_fingerprint(self) -> str:
        """Changes with any setting that a resumed training depends on."""
        free = {
            "resume",
            "quiet",
            "output_dir",
            "model_type",
            "pretrained_wait",
            "pretrained_dir",
            "enable_mlflow",
            "tracker",
            "tracking_uri",
            "registry_name",
            "storage",
            "artifacts",
            "data",
            "tune_decision",
        }
        settings = {k: v for k, v in asdict(self).items() if k not in free}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def native_precision(accelerator: str = "auto") -> str:
    """Gives "bf16-mixed" where the hardware computes in bfloat16, "32-true" elsewhere."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu"):
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bf16-mixed"
    return "32-true"


# ------------------------------------------------------------------------------------------------------ models


class AdaptedModel(WaferClassifier):
    """A published network turned to one channel and nine classes."""

    def start_from_pretrained(self, pretrained: bool, wait: float) -> None:
        """Loads pre-trained weights where they can be had; says in `weights_source` what came of it."""
        if not pretrained:
            return
        try:
            self.weights_source = self.load_pretrained(wait)
        except WeightsUnavailableError as error:
            self.weights_source = f"random ({error})"

    def load_pretrained(self, wait: float) -> str:
        """Loads the weights into `self.network` and returns their name, or raises `WeightsUnavailableError`."""
        raise WeightsUnavailableError("none are published for this network")


class TorchvisionLightningModel(AdaptedModel):
    """A torchvision classifier with a one-channel first layer and a head of 512 units.

    Args:
        architecture: "resnet18", "resnet50", "efficientnet_b0" or "vit_b_16".
        dropout: in the head, 0..1.
        freeze_backbone: train the head only.
        pretrained: start from torchvision's default ImageNet weights where they can be had.
        pretrained_wait: seconds to wait for their host.
        image_size: side of the images, needed by vision transformers.
        **training: see `WaferClassifier`.

    Raises:
        ValueError: an unknown architecture.
    """

    ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0", "vit_b_16")

    def __init__(
        self,
        *,
        architecture: str = "resnet18",
        dropout: float = 0.2,
        freeze_backbone: bool = False,
        pretrained: bool = False,
        pretrained_wait: float = 5.0,
        image_size: int = 40,
        num_classes: int = NUM_CLASSES,
        **training,
    ) -> None:
        super().__init__(num_classes=num_classes, **training)
        if architecture not in self.ARCHITECTURES:
            raise ValueError(f"architecture={architecture!r} is unknown. Allowed: {', '.join(self.ARCHITECTURES)}.")
        self.save_hyperparameters(ignore=["pretrained", "pretrained_wait"])
        import torchvision.models

        self.architecture = architecture
        options = {"image_size": image_size, "patch_size": 8} if architecture == "vit_b_16" else {}
        builder = torchvision.models.get_model_builder(architecture)
        if architecture == "vit_b_16":  # patches of 8 dies: with 16, a 48-pixel map would be nine patches
            builder = torchvision.models.VisionTransformer
            options |= {"num_layers": 6, "num_heads": 6, "hidden_dim": 192, "mlp_dim": 768}
        self.network = builder(**options)
        self._replace_first_layer()
        self._replace_head(dropout, num_classes)
        quicken_small_convolutions(self.network)
        self.start_from_pretrained(pretrained, pretrained_wait)
        if freeze_backbone:
            head = set(self.network.get_submodule(self._head_name()).parameters())
            for parameter in self.network.parameters():
                parameter.requires_grad = parameter in head

    def _first_layer_name(self) -> str:
        return next(n for n, m in self.network.named_modules() if isinstance(m, nn.Conv2d))

    def _head_name(self) -> str:
        return list(dict(self.network.named_children()))[-1]

    def _replace_first_layer(self) -> None:
        name = self._first_layer_name()
        old = self.network.get_submodule(name)
        new = nn.Conv2d(1, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
        self.network.set_submodule(name, new)

    def _replace_head(self, dropout: float, num_classes: int) -> None:
        old = self.network.get_submodule(self._head_name())
        features = next(m.in_features for m in old.modules() if isinstance(m, nn.Linear))
        head = nn.Sequential(
            nn.Linear(features, 512), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(512, num_classes)
        )
        self.network.set_submodule(self._head_name(), head)

    def load_pretrained(self, wait: float) -> str:
        """ImageNet weights into all but the head; the first layer's kernels summed over RGB."""
        import torchvision.models

        if self.architecture == "vit_b_16":
            raise WeightsUnavailableError("none are published for this small transformer")
        weights = torchvision.models.get_model_weights(self.architecture).DEFAULT
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        file = fetch_weights(weights.url, cache, wait=wait, hash_prefix=cache.stem.rpartition("-")[2])
        self.adopt(read_weights(file))
        return f"torchvision {weights}"

    def adopt(self, state: dict[str, torch.Tensor]) -> None:
        """Copies a torchvision state dict (three-channel first layer, 1000-class head) into the network."""
        head, first = self._head_name() + ".", self._first_layer_name() + ".weight"
        state = {name: value for name, value in state.items() if not name.startswith(head)}
        state[first] = sum_first_layer(state[first])
        missing, unexpected = self.network.load_state_dict(state, strict=False)
        if unexpected or any(not name.startswith(head) for name in missing):
            raise WeightsUnavailableError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")


class YOLOLightningAdapter(AdaptedModel):
    """The classification network of YOLO11 (CSP blocks, SiLU) from ultralytics, for one channel and nine classes.

    ultralytics is AGPL-3.0 and is imported only when this model is built.

    Args:
        model_size: "n", "s" or "m".
        dropout: before the last layer, 0..1.
        pretrained: start from ultralytics' ImageNet weights where they can be had.
        pretrained_wait: seconds to wait for their host.
        **training: see `WaferClassifier`.

    Raises:
        ValueError: an unknown size.
    """

    SIZES = ("n", "s", "m")
    WEIGHTS_URL = "https://github.com/ultralytics/assets/releases/download/v8.3.0/{name}"

    def __init__(
        self,
        *,
        model_size: str = "n",
        dropout: float = 0.2,
        pretrained: bool = False,
        pretrained_wait: float = 5.0,
        num_classes: int = NUM_CLASSES,
        **training,
    ) -> None:
        super().__init__(num_classes=num_classes, **training)
        if model_size not in self.SIZES:
            raise ValueError(f"model_size={model_size!r} is unknown. Allowed: {', '.join(self.SIZES)}.")
        self.save_hyperparameters(ignore=["pretrained", "pretrained_wait"])
        self.model_size = model_size
        self.network = import_ultralytics_tasks().ClassificationModel(
            f"yolo11{model_size}-cls.yaml", ch=1, nc=num_classes, verbose=False
        )
        self.network.model[-1].drop.p = dropout
        self.start_from_pretrained(pretrained, pretrained_wait)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float [B, 1, S, S] to logits [B, 9]; outside training the network returns (probabilities, logits)."""
        output = super().forward(images)
        return output[1] if isinstance(output, tuple) else output

    def load_pretrained(self, wait: float) -> str:
        """ImageNet weights into all but the last layer; the first layer's kernels summed over RGB."""
        name = f"yolo11{self.model_size}-cls.pt"
        cache = Path(torch.hub.get_dir()) / "checkpoints" / name
        file = fetch_weights(self.WEIGHTS_URL.format(name=name), cache, wait=wait)
        self.adopt(read_weights(file, allowed=ultralytics_classes()))
        return f"ultralytics {name}"

    def adopt(self, checkpoint: dict[str, Any]) -> None:
        """Copies an ultralytics checkpoint {"model": ClassificationModel} (RGB, 1000 classes) into the network."""
        state = (checkpoint.get("ema") or checkpoint["model"]).float().state_dict()
        ours = self.network.state_dict()
        first = "model.0.conv.weight"
        state[first] = sum_first_layer(state[first])
        head = f"model.{len(self.network.model) - 1}.linear."
        state = {name: value for name, value in state.items() if not name.startswith(head)}
        wrong = [n for n, v in state.items() if n not in ours or ours[n].shape != v.shape]
        if wrong or any(n not in state and not n.startswith(head) for n in ours):
            raise WeightsUnavailableError(f"the weights do not fit, for example {wrong[:1]}")
        self.network.load_state_dict(state, strict=False)


def import_ultralytics_tasks():
    """Imports ultralytics quietly: no network, no installing, and torch keeps its threads."""
    threads = torch.get_num_threads()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # ultralytics would set it to 1
    for name, value in (("YOLO_OFFLINE", "1"), ("YOLO_AUTOINSTALL", "false"), ("YOLO_VERBOSE", "false")):
        os.environ.setdefault(name, value)
    import ultralytics.nn.tasks as tasks

    torch.set_num_threads(threads)
    return tasks


def ultralytics_classes() -> list[type]:
    """The classes that a classification checkpoint of ultralytics consists of, and nothing else."""
    tasks = import_ultralytics_tasks()
    from ultralytics.nn.modules import block, conv, head

    names = {
        block: ("C2PSA", "PSABlock", "Attention", "C3k2", "C3k", "C2f", "C3", "Bottleneck"),
        conv: ("Conv",),
        head: ("Classify",),
    }
    torch_classes = [
        nn.Sequential, nn.ModuleList, nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.Identity, nn.AdaptiveAvgPool2d,
        nn.Dropout, nn.Linear,
    ]  # fmt: skip
    return [tasks.ClassificationModel, *torch_classes, *(getattr(m, n) for m, ns in names.items() for n in ns)]


# ---------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class ModelSpec:
    """One line of the registry.

    Attributes:
        build: called with the model's own parameters and those of `WaferClassifier`; returns the model.
        search_space: parameters that only this architecture has, each with the values that a search may choose.
        defaults: what to build without a search.
        loads_pretrained: whether `build` takes `pretrained` and `pretrained_wait`.
        bf16_pays: whether precision="auto" may take bfloat16; on CPU it slows depthwise convolutions down.
        takes_image_size: whether `build` takes `image_size`, as networks for one size of images do.
    """

    build: Callable[..., WaferClassifier]
    search_space: dict[str, tuple] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    loads_pretrained: bool = False
    bf16_pays: bool = True
    takes_image_size: bool = False


MODEL_REGISTRY: dict[str, ModelSpec] = {}

# What every search chooses beside an architecture's own parameters.
SHARED_SEARCH_SPACE = ("learning_rate", "batch_size", "dropout", "weight_decay")
# To freeze random weights would leave the head to learn from noise, and short trials do not always show it.
NEEDS_PRETRAINED = ("freeze_backbone",)


def suggest_parameters(
    trial: optuna.trial.BaseTrial, model_type: str, *, batch_size: int, pretrained: bool = True
) -> dict[str, Any]:
    """Asks a trial for the shared parameters and for the architecture's own; `batch_size` is one more to choose.

    Without `pretrained` weights to start from, it is not asked for what makes no sense without them.
    """
    shared = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True),
        "batch_size": trial.suggest_categorical("batch_size", tuple(sorted({16, 32, 64, batch_size}))),
        "dropout": trial.suggest_float("dropout", 0.1, 0.6),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
    }
    own = own_search_space(model_type, pretrained=pretrained)
    return shared | {name: trial.suggest_categorical(name, values) for name, values in own.items()}


def own_search_space(model_type: str, *, pretrained: bool) -> dict[str, tuple]:
    """The parameters that only this architecture has, as far as they make sense for the weights it starts from."""
    space = MODEL_REGISTRY[model_type].search_space
    return {name: values for name, values in space.items() if pretrained or name not in NEEDS_PRETRAINED}


def register_model(name: str, spec: ModelSpec) -> None:
    """Adds an architecture; it can then be named in `ExperimentConfig.model_type`.

    Raises:
        ConfigError: the name is taken.
    """
    if name in MODEL_REGISTRY or name == "all":
        raise ConfigError(f"model name {name!r} is taken. Choose another.")
    MODEL_REGISTRY[name] = spec


def _torchvision(architecture: str) -> Callable[..., WaferClassifier]:
    return lambda **parameters: TorchvisionLightningModel(architecture=architecture, **parameters)


FREEZE = {"freeze_backbone": (False, True)}
register_model(
    "lightning_cnn",
    ModelSpec(
        LightningCNN,
        search_space={"base_channels": (16, 32, 48, 64), "optimizer": ("adamw", "adam", "sgd")},
        defaults={"learning_rate": 4e-3, "dropout": 0.1},
    ),
)
register_model(
    "torchvision_resnet",
    ModelSpec(
        _torchvision("resnet18"),
        search_space=FREEZE,
        defaults={"learning_rate": 1e-3, "dropout": 0.2},
        loads_pretrained=True,
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
    ),
)
register_model(
    "yolo_inspired",
    ModelSpec(
        YOLOLightningAdapter,
        search_space={"model_size": YOLOLightningAdapter.SIZES},
        defaults={"learning_rate": 2e-3, "dropout": 0.2},
        loads_pretrained=True,
    ),
)
DEFAULT_MODEL_TYPES = tuple(MODEL_REGISTRY)  # "all": those registered below and by users are chosen by name
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


# ------------------------------------------------------------------------------------------------------ search


class TrialFailedError(RuntimeError):
    """A trial that cannot give a value: its reason is kept, the study goes on."""


def _proposed_by(trial: optuna.Trial) -> str:
    """Where a trial's parameters come from; TPE itself draws at random until it has seen enough trials."""
    if "proposed_by" in trial.user_attrs:  # it was put into the queue
        return trial.user_attrs["proposed_by"]
    seen = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    tpe = isinstance(trial.study.sampler, optuna.samplers.TPESampler)
    return "TPE" if tpe and len(seen) >= TPE_STARTS_AFTER else "chance"


def _mend_journal(journal: Path) -> None:
    """Cuts off a last line that a crash left unfinished: the next one would be written behind it, and lost with it.

    Raises:
        DamagedFileError: a line before the last is no longer what was written.
    """
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line.decode())
        except ValueError as error:
            raise DamagedFileError(
                f"Line {number} of {journal} is damaged ({error}). Move the file away; with --resume the models that "
                "are finished are kept, and the others are searched for anew."
            ) from error
    if rest:
        with journal.open("r+b") as file:
            file.truncate(len(content) - len(rest))


def _completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,), deepcopy=False)


def _counted_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to an end of their own: those that were cut off run again and are not counted."""
    trials = study.get_trials(deepcopy=False)
    run_again = {t.user_attrs.get("again") for t in trials}
    return [t for t in trials if t.state.is_finished() and t.number not in run_again]


def _study_seconds(study: optuna.Study) -> float:
    """Seconds that finished trials took, over all sittings and processes."""
    done = [t.duration for t in _counted_trials(study) if t.duration is not None]
    return sum(duration.total_seconds() for duration in done)


def _database(url: str) -> optuna.storages.BaseStorage:
    """Connects to an Optuna storage; tries again when another process makes the tables of a fresh one just now."""
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(4):
        try:
            return optuna.storages.get_storage(url)
        except SQLAlchemyError as error:
            last = error
            time.sleep(2**attempt / 4)
        except (ImportError, ValueError) as error:  # no driver for it, or no database URL at all
            raise ConfigError(f"storage={url!r} cannot be used ({error}).") from error
    raise ConfigError(f"storage={url!r} cannot be used ({str(last).strip().splitlines()[0]}). Does the server run?")


def _out_of_memory(error: BaseException) -> bool:
    """PyTorch has an error of its own on a GPU; on a CPU it raises a plain RuntimeError."""
    words = ("not enough memory", "can't allocate memory", "alloc_cpu")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def ends_one_model(error: BaseException) -> bool:
    """Whether an error is one model's own affair: it diverged, found nothing or had no memory; others can go on."""
    if isinstance(error, DamagedFileError):  # somebody has to look at that first
        return False
    return isinstance(error, RunError | MemoryError) or _out_of_memory(error)


def _run_again(study: optuna.Study, trial: optuna.trial.BaseTrial) -> None:
    """Puts the parameters of a trial that was cut off first in the queue."""
    again = {"again": trial.number, "proposed_by": "a trial that was cut off"}
    study.enqueue_trial(trial.params, user_attrs=again)


def _trial_record(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """What the summary keeps of a trial; a pruned one has its last reported value."""
    reported = trial.intermediate_values
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": trial.values if trial.state == TrialState.COMPLETE else None,
        "last_macro_f1": reported[max(reported)] if reported else None,
        "epochs": len(reported),
        "parameters": trial.params,
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        **{key: trial.user_attrs[key] for key in ("reason", "again", "proposed_by") if key in trial.user_attrs},
    }


def _trial_line(study: optuna.Study, trial: optuna.trial.FrozenTrial, *, wanted: int, deadline: float | None) -> str:
    """One line for the terminal: number, state, value, best so far, parameters, time left."""
    done = _counted_trials(study)
    best = max((t.values[0] for t in _completed(study)), default=None)
    last = trial.values[0] if trial.values else None
    value = "  -  " if last is None else f"{last:.3f}"
    left = max(0, wanted - len(done)) * _study_seconds(study) / max(1, len(done))
    left = left if deadline is None else max(0.0, min(left, deadline - time.monotonic()))
    shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
    return (
        f"  trial {len(done)}/{wanted}  {trial.state.name.lower():8}  {value}  "
        f"best {'  -  ' if best is None else f'{best:.3f}'}  {shown}  about {left:.0f} s left"
        + (f"  ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else "")
    )


# ---------------------------------------------------------------------------------------------------- pipeline


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
        self.tracking: Tracking | NoTracking = NoTracking()
        self._parent_run = TrackedRun("")
        self._model_runs: dict[str, TrackedRun] = {}
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
        self.open_tracking()
        try:
            self._start_parent_run()
            summary = self._run()
        except KeyboardInterrupt:
            self.tracking.close("KILLED", reason="interrupted")
            raise
        except BaseException as error:
            self.tracking.close("FAILED", reason=f"{type(error).__name__}: {error}")
            raise
        self.tracking.close()
        return summary

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
        evaluation.write_summary(self.config.results_dir / "experiment_summary.json", summary)

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
            "parameters": {"batch_size": data.batch_size} | _plain(model.hparams),
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
        run = self._model_runs.get(model_type, TrackedRun(""))
        history = History(say=None if on_terminal else self._say, log=partial(self.tracking.metrics, run))
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
        self.fit(model_type, model, data, callbacks, max_epochs=self.config.max_epochs, resume_from=resume_from)
        return history

    def fit(
        self,
        model_type: str,
        model: WaferClassifier,
        data: WaferMapDataModule,
        callbacks: list[pl.Callback],
        *,
        max_epochs: int,
        resume_from: Path | None = None,
    ) -> None:
        """What all trainings have in common: Lightning's Trainer as the configuration wants it."""
        config, interrupt = self.config, KeepInterrupt()
        trainer = pl.Trainer(
            max_epochs=max_epochs, accelerator=config.accelerator,
            devices=1 if config.devices == "auto" else config.devices,
            precision=self.precision(model_type), accumulate_grad_batches=config.accumulate_grad_batches,
            callbacks=[interrupt, *callbacks], logger=False, enable_progress_bar=False, enable_model_summary=False,
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

    def open_tracking(self) -> Tracking | NoTracking:
        """Connects to the tracker, if it is wanted; it runs in a process of its own."""
        config = self.config
        if config.enable_mlflow and self.tracking.closed:
            self.tracking = Tracking(
                config.experiment_name,
                uri=config.tracking_uri,
                folder=Path(config.output_dir),
                # The file itself: it warns from another thread, whoever redirects `sys.stderr` meanwhile.
                warn=Console(file=sys.stderr, markup=False, emoji=False, highlight=False, soft_wrap=True).print,
                resume=config.resume,
                tracker=config.tracker,
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
        self.tracking.note(self._parent_run, evaluation.comparison_markdown(comparison_rows(summary["models"])))

    def register_best(
        self, result: dict[str, Any], predictions: evaluation.Predictions
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
                decision=_decision_of(result),
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
        started, before = time.monotonic(), _study_seconds(study)
        self._search_deadline = None if seconds is None else started + max(0.0, seconds - before)
        # Pruned trials leave time to the others, so each may use twice its even share.
        self._trial_seconds = float("inf") if seconds is None else 2 * seconds / wanted

        def enough() -> bool:
            done = _counted_trials(study)
            typical = _study_seconds(study) / max(1, len(done))
            return len(done) >= wanted or self._search_time_left() < max(0.5 * typical, 1e-9)

        def report_and_stop(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            self._forget_beaten_trials(study, model_type)
            self._say(_trial_line(study, trial, wanted=wanted, deadline=self._search_deadline))
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
        trial.set_user_attr("proposed_by", _proposed_by(trial))
        run = self.tracking.start(f"trial {trial.number}", parent=self._model_runs.get(model_type))
        self.tracking.params(run, **params)
        try:
            model, best = self._train_trial(trial, model_type, params, run)
        except optuna.TrialPruned as pruned:
            self.tracking.end(run, "KILLED", reason=f"pruned: {pruned}")  # not FAILED: it did what was asked of it
            raise
        except KeyboardInterrupt:
            _run_again(trial.study, trial)
            raise
        except (TrainingDivergedError, MemoryError, RuntimeError) as error:
            trial.set_user_attr("reason", str(error))
            self.tracking.end(run, "FAILED", reason=str(error))
            if isinstance(error, TrainingDivergedError | MemoryError) or _out_of_memory(error):
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
        self, trial: optuna.Trial, model_type: str, params: dict[str, Any], run: TrackedRun
    ) -> tuple[WaferClassifier, float]:
        from optuna_integration import PyTorchLightningPruningCallback

        pl.seed_everything(self.config.seed, verbose=False)
        data = self.data_module(params["batch_size"])
        model = self.create_model(model_type, params, class_weights=data.class_weights)
        self.tracking.tags(run, weights=model.weights_source, seed=str(self.config.seed))
        history, file = History(log=partial(self.tracking.metrics, run)), self._trial_file(model_type, trial.number)
        callbacks = [history, self._best_weights(file.parent, file.stem)]
        if len(self.config.objectives) == 1:  # several values cannot be pruned on
            callbacks.append(PyTorchLightningPruningCallback(trial, monitor="val_macro_f1"))
        if self._search_deadline is not None:
            callbacks.insert(0, TimeBudget(max(1.0, min(self._search_time_left(), self._trial_seconds))))
        weights = model.weights_source
        self.fit(model_type, model, data, callbacks, max_epochs=self.config.search_epochs)
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
                _run_again(study, trial)
        return study

    def _study_storage(self) -> optuna.storages.BaseStorage:
        if self.config.storage is not None:
            return _database(self.config.storage)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.config.results_dir.mkdir(parents=True, exist_ok=True)
        journal = self.config.results_dir / "optuna_journal.log"
        _mend_journal(journal)
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
        if not _completed(study):
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
            "seconds": _study_seconds(study),
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
            "trials": [_trial_record(trial) for trial in trials],
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

    def evaluate(self, trained: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[evaluation.Predictions]]:
        """Scores trained models: on validation for the choice, then on test, which nothing before has seen.

        Returns:
            The records with `validation`, `test` (see `evaluation.compute_metrics`) and `latency_ms` added, and the
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
            scores = {part: evaluation.compute_metrics(p) for part, p in predicted.items()}
            latency = measure_latency(model, self.config.image_size, views=decision.views)
            results.append({**record, **scores, "latency_ms": latency, "left_out": decision.left_out})
            if self.config.tune_decision:
                plain = {
                    part: evaluation.compute_metrics(self._predictions(part, untuned.of_views(p)))
                    for part, p in by_views.items()
                }
                results[-1]["decision"] = _decision_record(decision, plain, scores)
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

    def _predictions(self, part: str, probabilities: np.ndarray) -> evaluation.Predictions:
        """What was answered on the "validation" or "test" part, with the truth and the lots beside it.

        Only the classes that training had maps of are in it: of the others nothing can be known.
        """
        indices, trained = self.split.parts()[part], self._train_counts() > 0
        among_trained = np.cumsum(trained) - 1
        return evaluation.Predictions(
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

    def _draw(self, results: list[dict[str, Any]], predictions: evaluation.Predictions, best: int) -> None:
        folder, name = self.config.results_dir, results[best]["model_type"]
        test_maps = [self.maps[i] for i in self.split.test]
        evaluation.plot_confusion_matrix(
            predictions, path=folder / "confusion_matrix.png", title=f"{name}: {len(test_maps):,} test maps"
        )
        evaluation.plot_sample_predictions(
            test_maps, predictions, path=folder / "sample_predictions.png",
            title=f"{name}: test maps, right and wrong", seed=self.config.seed,
        )  # fmt: skip
        evaluation.plot_model_comparison(comparison_rows(results), path=folder / "model_comparison.png")
        evaluation.plot_training_history(
            {r["model_type"]: r["history"] for r in results}, path=folder / "training_history.png"
        )
        for model_type, study in self._studies.items():
            evaluation.plot_study(study, folder=folder, name=model_type, objectives=self.config.objectives)
        for result in results:
            evaluation.write_per_class_table(result["test"], path=folder / f"per_class_{result['model_type']}.csv")

    def _report(self, summary: dict[str, Any]) -> None:
        """The same as one page to read, and a card of the best model."""
        folder = self.config.results_dir
        first = ("model_comparison.png", "confusion_matrix.png", "sample_predictions.png", "training_history.png")
        searches = [file.name for r in summary["models"] for file in sorted(folder.glob(f"optuna_{r['model_type']}_*"))]
        drawn = [name for name in (*first, *searches) if (folder / name).exists()]
        reporting.write_report(summary, folder=folder, pictures=drawn, path=folder / "report.html")
        reporting.write_model_card(summary, folder=folder)

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
                    _pipeline_verdict(results, best),
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

    def _timed(self, phase: str) -> _Stopwatch:
        return _Stopwatch(self.seconds, phase)

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
        out.print(evaluation.comparison_table(comparison_rows(results)))
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


class _Stopwatch:
    """Adds the seconds of a `with` block to a phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.monotonic() - self.started


def predict_probabilities(
    model: WaferClassifier, images: torch.Tensor, decision: Decision | None = None, *, batch_size: int = 256
) -> np.ndarray:
    """Class probabilities float32 [N, 9] for resized maps, uint8 [N, 1, S, S], computed in full precision."""
    decision = decision or Decision()
    by_views = probabilities_by_views(model, images, (decision.views,), batch_size=batch_size)
    return decision.of_views(by_views)


@torch.inference_mode()
def probabilities_by_views(
    model: WaferClassifier, images: torch.Tensor, views: Sequence[int] = VIEWS, *, batch_size: int = 256
) -> dict[int, np.ndarray]:
    """For each number of views (1, 8) the mean of the network's own probabilities over them, float32 [N, 9].

    The map as it is comes first among its eight views, so 1 costs nothing beside 8.
    """
    model.eval()
    parts: dict[int, list[torch.Tensor]] = {count: [] for count in views}
    for batch in images.split(batch_size):
        turned = islice(symmetries(batch.to(model.device)), max(views))
        probabilities = torch.stack([model(encode(view)).softmax(-1) for view in turned])
        for count in views:
            parts[count].append(probabilities[:count].mean(0).cpu())
    return {count: torch.cat(batches).numpy() for count, batches in parts.items()}


def _decision_record(decision: Decision, plain: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """The decision, and what the plain answers of the same weights would have scored."""
    return asdict(decision) | {
        "validation_macro_f1_before": plain["validation"]["macro_f1"],
        "validation_macro_f1_after": scores["validation"]["macro_f1"],
        "test_macro_f1_before": plain["test"]["macro_f1"],
        "calibration_error_before": plain["test"]["expected_calibration_error"],
        "calibration_error_after": scores["test"]["expected_calibration_error"],
    }


@torch.inference_mode()
def measure_latency(model: WaferClassifier, image_size: int, *, views: int = 1, repeats: int = 30) -> float:
    """Median milliseconds to classify one map on the CPU in full precision, after five runs to warm up."""
    image = torch.zeros(views, 1, image_size, image_size)
    times = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[5:]))


def comparison_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each model that the comparison table and picture show."""
    return [
        {
            "model_type": r["model_type"],
            "accuracy": r["test"]["accuracy"],
            "macro_f1": r["test"]["macro_f1"],
            "macro_f1_interval": (r["test"]["intervals"] or {}).get("macro_f1"),
            "n_parameters": r["n_parameters"],
            "train_seconds": r["train_seconds"],
            "latency_ms": r["latency_ms"],
        }
        for r in results
    ]


def _decision_of(result: dict[str, Any]) -> Decision:
    """The decision that `evaluate` chose for a model."""
    chosen = {"left_out": result["left_out"]} | result.get("decision", {})
    return Decision(**{f.name: chosen[f.name] for f in fields(Decision) if f.name in chosen})


def command_line_used() -> str:
    """How this program was started, without the folder it lies in."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def _pipeline_verdict(results: Sequence[dict[str, Any]], best: str) -> str:
    """Two sentences: what was chosen and how good it is, and what the runner-up on validation reaches."""
    by_name = {r["model_type"]: r for r in results}

    def score(name: str) -> str:
        test = by_name[name]["test"]
        low, high = (test["intervals"] or {}).get("macro_f1") or (None, None)
        return f"{test['macro_f1']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    first = (
        f"{best} is best on validation and reaches macro F1 {score(best)} on {by_name[best]['test']['n_samples']:,} "
    )
    first += "test maps of lots it has never seen."
    others = sorted((n for n in by_name if n != best), key=lambda n: -by_name[n]["validation"]["macro_f1"])
    return f"{first} {others[0]}, next on validation, reaches {score(others[0])}." if others else first


def environment() -> dict[str, Any]:
    """Code, versions and hardware that figures depend on.

    Returns:
        commit: of this code; None where git or the repository is missing, as in an installed copy.
        uncommitted_changes: whether its tracked Python files differed from that commit; None where that is not known.
        python, torch, lightning, processor, cpu_capability, cpu_cores, torch_threads, gpu.
    """
    return {
        **_commit_of_this_code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # the vector instructions that PyTorch uses
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache  # it does not change while the program runs
def _commit_of_this_code() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if git("ls-files", "--", Path(__file__).name):  # else it lies in a repository that is not its own
            changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
            return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"commit": None, "uncommitted_changes": None}


def _plain(hparams: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(hparams).items()}
