"""Every option of a run, checked when it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from waferlab.data.reading import IMAGE_LEVELS, SYNTHETIC
from waferlab.errors import ConfigError
from waferlab.models.registry import MODEL_REGISTRY

SAMPLERS = ("auto", "tpe", "random")
PRUNERS = ("auto", "median", "halving", "hyperband", "none")
TRACKERS = ("mlflow", "wandb")
PRETRAINED_SOURCES = ("auto", "imagenet", "wafer")
OBJECTIVES = {"macro_f1": "maximize", "latency": "minimize", "parameters": "minimize"}


@dataclass(kw_only=True)
class ExperimentConfig:
    """Everything a run depends on. Validated on construction.

    Attributes:
        experiment_name: folder name under results/ and checkpoints/.
        model_type: "all", one registered name, or a list of names.
        use_pretrained: start from pre-trained weights where they can be had.
        pretrained_source: which: "imagenet" (published weights), "wafer" (made by `pretrain` on generated maps) or
            "auto", which takes published ones where they can be had, else those made on generated maps.
        pretrained_dir: folder of the weights made by `pretrain`; None for checkpoints/pretrained in the output
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
        if not MODEL_REGISTRY:
            raise ConfigError("No model is registered yet: import integrated_pipeline first, which registers all of them.")
        if self.model_type == "all":
            return [name for name, spec in MODEL_REGISTRY.items() if spec.in_all]
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
