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
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from rich.console import Console
from torch import nn

import evaluation
from pretrained_weights import WeightsUnavailableError, fetch_weights, read_weights, sum_first_layer
from simple_model import LightningCNN, WaferClassifier
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


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the value, the reason and the remedy."""


@dataclass(kw_only=True)
class ExperimentConfig:
    """Everything a run depends on. Validated on construction.

    Attributes:
        experiment_name: folder name under results/ and checkpoints/.
        model_type: "all", one registered name, or a list of names.
        use_pretrained: start from pre-trained weights where they can be had.
        max_epochs: of the final training, with early stopping.
        batch_size: maps a training batch.
        num_optuna_trials: trials for each model type.
        enable_mlflow: track with MLflow.
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
        devices: passed to Lightning.
        precision: passed to Lightning; "auto" takes bf16-mixed where the hardware computes in it, else 32-true.
        accumulate_grad_batches: passed to Lightning.
        pretrained_wait: seconds to wait for the host of pre-trained weights to answer.
        eight_views: classify validation and test maps by the mean over the eight symmetries of the square.
        output_dir: folder that holds results/ and checkpoints/.
        resume: go on where a run with the same settings was cut off.
        quiet: print only warnings and the final table.
    """

    experiment_name: str = "wafer_defect_complete"
    model_type: str | Sequence[str] = "all"
    use_pretrained: bool = True
    max_epochs: int = 50
    batch_size: int = 32
    num_optuna_trials: int = 20
    enable_mlflow: bool = True
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
    eight_views: bool = False
    output_dir: str | Path = "."
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_epochs", 1, 100_000),
            ("batch_size", 2, 65_536),
            ("num_optuna_trials", 1, 1_000_000),
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
        self._check_choice("balance_by", ("sampler", "loss"))
        self._check_choice("image_levels", IMAGE_LEVELS)
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

    @property
    def results_dir(self) -> Path:
        """Where the summary and the pictures go."""
        return Path(self.output_dir) / "results" / self.experiment_name

    @property
    def checkpoints_dir(self) -> Path:
        """Where the best and resume checkpoints of each model go."""
        return Path(self.output_dir) / "checkpoints" / self.experiment_name

    def training_fingerprint(self) -> str:
        """Changes with any setting that a resumed training depends on."""
        free = {
            "resume",
            "quiet",
            "output_dir",
            "model_type",
            "pretrained_wait",
            "enable_mlflow",
            "data",
            "eight_views",
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
    """A published network turned to one channel and nine classes.

    `weights_source` says what the network really starts from: the name of the weights, or "random (reason)".
    """

    weights_source = "random"

    def start_from_pretrained(self, pretrained: bool, wait: float) -> None:
        """Loads pre-trained weights where they can be had; says in `weights_source` what came of it."""
        if not pretrained:
            self.weights_source = "random (not asked for)"
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
    """

    build: Callable[..., WaferClassifier]
    search_space: dict[str, tuple] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    loads_pretrained: bool = False
    bf16_pays: bool = True


MODEL_REGISTRY: dict[str, ModelSpec] = {}

# What every search chooses beside an architecture's own parameters: (low, high) is a range, a longer tuple a choice.
SHARED_SEARCH_SPACE: dict[str, tuple] = {
    "learning_rate": (1e-5, 1e-1),
    "batch_size": (16, 32, 64),
    "dropout": (0.1, 0.6),
    "weight_decay": (1e-6, 1e-1),
}


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
        defaults={"learning_rate": 4e-3},
    ),
)
register_model(
    "torchvision_resnet",
    ModelSpec(_torchvision("resnet18"), search_space=FREEZE, defaults={"learning_rate": 1e-3}, loads_pretrained=True),
)
register_model(
    "torchvision_efficientnet",
    ModelSpec(
        _torchvision("efficientnet_b0"),
        search_space=FREEZE,
        defaults={"learning_rate": 3e-3},
        loads_pretrained=True,
        bf16_pays=False,
    ),
)
register_model(
    "yolo_inspired",
    ModelSpec(
        YOLOLightningAdapter,
        search_space={"model_size": YOLOLightningAdapter.SIZES},
        defaults={"learning_rate": 2e-3},
        loads_pretrained=True,
    ),
)
DEFAULT_MODEL_TYPES = tuple(MODEL_REGISTRY)  # "all": those registered below and by users are chosen by name
register_model(
    "torchvision_resnet50",
    ModelSpec(_torchvision("resnet50"), search_space=FREEZE, defaults={"learning_rate": 1e-3}, loads_pretrained=True),
)
# Adding an architecture is this one call. `image_size` is a parameter of the model, so the factory fills it in.
register_model(
    "vision_transformer",
    ModelSpec(_torchvision("vit_b_16"), search_space={"image_size": (48,)}, defaults={"learning_rate": 1e-3}),
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
        self._data_modules: dict[int, WaferMapDataModule] = {}

    def run_complete_pipeline(self) -> dict[str, Any]:
        """Runs the chain and returns the summary that is also written to experiment_summary.json.

        Raises:
            ConfigError: a setting cannot be used here.
            DataError: the data cannot be used.
            TrainingDivergedError: the loss of a model is no longer a number.
            KeyboardInterrupt: interrupted; finished epochs and models are kept for `resume=True`.
        """
        self._check_this_can_run()
        self._print_configuration()
        with self._timed("data"):
            self.prepare_data()
        trained = []
        for model_type in self.config.model_types():
            self._say(f"\n[bold]{model_type}[/bold]")
            with self._timed("training"):
                trained.append(self.train_final_model(model_type))
        with self._timed("evaluation"):
            results, predictions = self.evaluate(trained)
        best = max(range(len(results)), key=lambda i: results[i]["validation"]["macro_f1"])
        with self._timed("pictures"):
            self._draw(results, predictions[best], best)
        summary = self._summarise(results, results[best]["model_type"])
        evaluation.write_summary(self.config.results_dir / "experiment_summary.json", summary)
        self._print_outcome(results, summary)
        return summary

    # --- before training

    def _check_this_can_run(self) -> None:
        for switch, what in (("enable_optuna", "hyperparameter search"), ("enable_mlflow", "tracking")):
            if getattr(self.config, switch):
                raise ConfigError(f"{switch}=True: this version has no {what} yet. Set {switch}=False.")
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
        self._data_modules.clear()
        self._say(f"Dataset ready: {len(self.maps)} samples, {NUM_CLASSES} classes")
        sizes = " / ".join(f"{len(part):,} {name}" for name, part in self.split.parts().items())
        lots = len(np.unique(self.maps.groups))
        self._say(f"  {sizes}, no lot of {lots:,} in two parts, split {self.split.fingerprint}")
        for note in self.maps.notes:
            self._say(f"  {note}")

    def _data_module(self, batch_size: int) -> WaferMapDataModule:
        """The maps, resized once for all models and for the evaluation."""
        config = self.config
        if batch_size in self._data_modules:
            return self._data_modules[batch_size]
        self._data_modules[batch_size] = WaferMapDataModule(
            self.maps,
            self.split,
            image_size=config.image_size,
            batch_size=batch_size,
            augmentation=config.data_augmentation,
            balancing=config.balance_by if config.class_balancing else "none",
            seed=config.seed,
        )
        return self._data_modules[batch_size]

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
        allowed = {*SHARED_SEARCH_SPACE, *spec.search_space, *spec.defaults}
        unknown = sorted(set(trial_params or {}) - allowed)
        if unknown:
            raise ConfigError(f"{model_type} has no parameter {unknown[0]!r}. Allowed: {', '.join(sorted(allowed))}.")
        parameters = dict(spec.defaults)
        if self.config.learning_rate is not None:
            parameters["learning_rate"] = self.config.learning_rate
        if "image_size" in spec.search_space:
            parameters["image_size"] = self.config.image_size
        parameters |= {k: v for k, v in (trial_params or {}).items() if k != "batch_size"}
        if spec.loads_pretrained:
            parameters["pretrained"] = self.config.use_pretrained if pretrained is None else pretrained
            parameters["pretrained_wait"] = self.config.pretrained_wait
        return spec.build(class_weights=class_weights, **parameters)

    def train_final_model(self, model_type: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Trains one model and keeps its best epoch by validation macro F1.

        Args:
            model_type: a name of `MODEL_REGISTRY`.
            params: parameters that replace the defaults, such as the best of a search.

        Returns:
            A plain record: model_type, parameters, weights, n_parameters, epochs, best_epoch, train_seconds, history,
            checkpoint. The checkpoint holds the best epoch.
        """
        if self.split is None:
            self.prepare_data()
        folder = self.config.checkpoints_dir / model_type
        fingerprint = self._fingerprint(params)
        record = self._finished(folder, fingerprint) if self.config.resume else None
        if record is not None:
            self._say(f"  finished before, taken from {folder}")
            return record
        pl.seed_everything(self.config.seed, verbose=False)
        params = params or {}
        data = self._data_module(params.get("batch_size", self.config.batch_size))
        resume_from = self._resume_point(folder, fingerprint)
        model = self.create_model(
            model_type, params, class_weights=data.class_weights, pretrained=None if resume_from is None else False
        )
        weights = self._weights_source(model, folder, resumed=resume_from is not None)
        history = self._fit(model_type, model, data, folder, resume_from)
        best = max(history.epochs, key=lambda epoch: epoch["val_macro_f1"])
        record = {
            "model_type": model_type,
            "parameters": {"batch_size": data.batch_size} | _plain(model.hparams),
            "weights": weights,
            "precision": str(self.precision(model_type)),
            "n_parameters": sum(p.numel() for p in model.network.parameters()),
            "epochs": len(history.epochs),
            "best_epoch": best["epoch"],
            "train_seconds": history.seconds(),
            "history": history.series(),
            "checkpoint": "best.ckpt",
            "fingerprint": fingerprint,
        }
        evaluation.write_summary(folder / "finished.json", record)
        return record

    def _fit(
        self, model_type: str, model: WaferClassifier, data: WaferMapDataModule, folder: Path, resume_from: Path | None
    ) -> History:
        config = self.config
        on_terminal = self.console.is_terminal and not config.quiet
        interrupt = KeepInterrupt()
        history = History(say=None if on_terminal else self._say)
        callbacks: list[pl.Callback] = [
            interrupt,
            history,
            EarlyStopping("val_macro_f1", mode="max", patience=config.early_stopping_patience),
            ModelCheckpoint(
                folder, filename="best", monitor="val_macro_f1", mode="max", save_weights_only=True,
                enable_version_counter=False,
            ),
            # A second one, unmonitored, because `save_last` follows the best epoch rather than the last.
            ModelCheckpoint(folder, filename="resume", enable_version_counter=False),
        ]  # fmt: skip
        if config.time_limit is not None:
            callbacks.insert(0, TimeBudget(config.time_limit / len(config.model_types())))
        if on_terminal:
            callbacks.insert(0, ProgressBar(self.console, model_type))
        trainer = pl.Trainer(
            max_epochs=config.max_epochs, accelerator=config.accelerator, devices=config.devices,
            precision=self.precision(model_type), accumulate_grad_batches=config.accumulate_grad_batches,
            callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, default_root_dir=folder,
        )  # fmt: skip
        try:
            trainer.fit(model, datamodule=data, ckpt_path=resume_from, weights_only=True)
        except SystemExit:  # Lightning turns Ctrl-C into an exit of status 1; whoever called decides what to do
            raise KeyboardInterrupt from None
        finally:
            interrupt.give_back()
        return history

    def _fingerprint(self, params: dict[str, Any] | None) -> str:
        text = f"{self.config.training_fingerprint()} {self.split.fingerprint} {sorted((params or {}).items())}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _finished(self, folder: Path, fingerprint: str) -> dict[str, Any] | None:
        file = folder / "finished.json"
        if not file.exists():
            return None
        record = json.loads(file.read_text())
        if record["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{folder} was trained with other settings or data. Repeat the settings of that run, or leave out "
                "--resume to train anew."
            )
        return {key: value for key, value in record.items() if key != "schema_version"}

    def _resume_point(self, folder: Path, fingerprint: str) -> Path | None:
        """The checkpoint to go on from; without `resume`, clears what an earlier run left and starts afresh."""
        mark, checkpoint = folder / "started.json", folder / "resume.ckpt"
        if self.config.resume and mark.exists() and checkpoint.exists():
            if json.loads(mark.read_text())["fingerprint"] != fingerprint:
                raise ConfigError(
                    f"{checkpoint} comes from other settings or data. Repeat the settings of that run, or leave out "
                    "--resume to train anew."
                )
            return checkpoint
        for name in ("finished.json", "started.json", "resume.ckpt", "best.ckpt"):
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        evaluation.write_summary(mark, {"fingerprint": fingerprint})
        return None

    def _weights_source(self, model: WaferClassifier, folder: Path, *, resumed: bool) -> str:
        """What the training really started from; remembered beside the checkpoint, since a resumed run cannot tell."""
        mark = folder / "started.json"
        started = json.loads(mark.read_text())
        if resumed:
            return started["weights"]
        source = getattr(model, "weights_source", "random (not asked for)")
        evaluation.write_summary(mark, started | {"weights": source})
        asked = self.config.use_pretrained and isinstance(model, AdaptedModel)
        if asked and source.startswith("random"):
            self._say(f"  no pre-trained weights: {source[len('random (') : -1]}; goes on without")
        return source

    # --- after training

    def evaluate(self, trained: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[evaluation.Predictions]]:
        """Scores trained models: on validation for the choice, then on test, which nothing before has seen.

        Returns:
            The records with `validation`, `test` (see `evaluation.compute_metrics`) and `latency_ms` added, and the
            test predictions of each model.
        """
        data = self._data_module(self.config.batch_size)
        results, predictions = [], []
        for record in trained:
            model = self.load_model(record)
            scores = {}
            for part, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
                indices = self.split.parts()[part]
                predicted = evaluation.Predictions(
                    probabilities=predict_probabilities(
                        model, loader.dataset.images, eight_views=self.config.eight_views
                    ),
                    labels=self.maps.labels[indices],
                    groups=self.maps.groups[indices],
                    class_names=CLASS_NAMES,
                )
                scores[part] = evaluation.compute_metrics(predicted, seed=self.config.seed)
            latency = measure_latency(model, self.config.image_size)
            results.append({**record, **scores, "latency_ms": latency})
            predictions.append(predicted)
        return results, predictions

    def load_model(self, record: dict[str, Any]) -> WaferClassifier:
        """The best epoch of a trained model, on the CPU, in evaluation mode."""
        parameters = {k: v for k, v in record["parameters"].items() if k in self._own_parameters(record["model_type"])}
        model = self.create_model(record["model_type"], parameters, class_weights=[1.0] * NUM_CLASSES, pretrained=False)
        if record["parameters"].get("class_weights") is None:
            model.loss.weight = None
        file = self.config.checkpoints_dir / record["model_type"] / record["checkpoint"]
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
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
        for result in results:
            evaluation.write_per_class_table(result["test"], path=folder / f"per_class_{result['model_type']}.csv")

    def _summarise(self, results: list[dict[str, Any]], best: str) -> dict[str, Any]:
        counts = {
            part: dict(zip(CLASS_NAMES, np.bincount(self.maps.labels[i], minlength=NUM_CLASSES).tolist(), strict=True))
            for part, i in self.split.parts().items()
        }
        return {
            "experiment_name": self.config.experiment_name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": asdict(self.config),
            "environment": environment(),
            "data": {
                "source": self.maps.source,
                "notes": self.maps.notes,
                "maps": len(self.maps),
                "lots": len(np.unique(self.maps.groups)),
            },
            "split": {"fingerprint": self.split.fingerprint, "class_counts": counts},
            "models": results,
            "best_model": best,
            "best_model_rule": "highest macro F1 on the validation part",
            "seconds": self.seconds,
        }

    # --- the terminal

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)  # the terminal wraps; a log keeps whole lines

    def _timed(self, phase: str) -> _Stopwatch:
        return _Stopwatch(self.seconds, phase)

    def _print_configuration(self) -> None:
        config = self.config
        limit = f", at most {config.time_limit:g} s of training" if config.time_limit else ""
        self._say(f"[bold]{config.experiment_name}[/bold]")
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
        self._say(f"Results and pictures: {self.config.results_dir}")


class _Stopwatch:
    """Adds the seconds of a `with` block to a phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.monotonic() - self.started


@torch.inference_mode()
def predict_probabilities(
    model: WaferClassifier, images: torch.Tensor, *, eight_views: bool = False, batch_size: int = 256
) -> np.ndarray:
    """Class probabilities float32 [N, 9] for resized maps, uint8 [N, 1, S, S], computed in full precision.

    With `eight_views`, the mean over the eight symmetries of each map: a wafer turned is the same wafer.
    """
    model.eval()

    def classify(batch: torch.Tensor) -> torch.Tensor:
        views = list(symmetries(batch)) if eight_views else [batch]
        return torch.stack([model(encode(view)).softmax(-1) for view in views]).mean(0)

    return torch.cat([classify(batch.to(model.device)).cpu() for batch in images.split(batch_size)]).numpy()


@torch.inference_mode()
def measure_latency(model: WaferClassifier, image_size: int, *, repeats: int = 30) -> float:
    """Median milliseconds to classify one map on the CPU in full precision, after five runs to warm up."""
    image = torch.zeros(1, 1, image_size, image_size)
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


def environment() -> dict[str, Any]:
    """Versions and hardware that figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _plain(hparams: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(hparams).items()}
