"""Every option of a run, checked when it is made."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from waferlab.data.image_files import IMAGE_LEVELS
from waferlab.data.reading import SYNTHETIC
from waferlab.data.splitting import SPLITS
from waferlab.errors import ConfigError
from waferlab.models.registry import MODEL_REGISTRY, find_model
from waferlab.tracking.addresses import address_without_password
from waferlab.tracking.whole_files import write_atomically

SAMPLERS = ("auto", "tpe", "random")
PRUNERS = ("auto", "median", "halving", "hyperband", "none")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")  # of Lightning's Trainer, as the next
PRECISIONS = (  # not those that convert the weights as well, such as bf16-true: the images stay in 32 bits
    "auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16", "transformer-engine", "transformer-engine-float16",
)  # fmt: skip
TRACKERS = ("mlflow", "wandb")
PRETRAINED_SOURCES = ("auto", "imagenet", "wafer")
FREE = {"trains": False}  # of a field that a training does not depend on: a resumed one may have another value
TRAINER_IS_OURS = {
    "max_epochs", "max_steps", "callbacks", "logger", "plugins", "default_root_dir", "enable_progress_bar",
    "enable_model_summary", "num_sanity_val_steps", "enable_checkpointing", "fast_dev_run", "barebones",
    "limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch", "use_distributed_sampler",
}  # fmt: skip
PLACE_AND_MANNER = ("output_dir", "resume", "quiet")
LONGEST_NAME = 100  # bytes: it becomes a part of longer names
LONGEST_REASON = 300  # characters of what the reader of YAML says, which may quote what it read
LARGEST_FILE = 2**20  # bytes of YAML; that of a run has two thousand
DEEPEST = 20  # levels of lists and mappings in it
IN_WORDS = {str: "a text", Path: "a text", bool: "true or false", int: "a whole number", type(None): "null"}
OBJECTIVES = {"macro_f1": "maximize", "latency": "minimize", "parameters": "minimize"}


def whole(default: int | None, low: int, high: int, *, trains: bool = True) -> Any:
    """A field for a whole number in a range, or None where that is the default.

    With trains=False, a resumed training may have another value (see `FREE`).
    """
    return field(default=default, metadata={"kinds": (int,), "low": low, "high": high, "trains": trains})


def number(default: float | None, low: float, high: float, *, trains: bool = True) -> Any:
    """As `whole`, for any number."""
    return field(default=default, metadata={"kinds": (int, float), "low": low, "high": high, "trains": trains})


def one_of(default: str, choices: Sequence[str], *, trains: bool = True) -> Any:
    """A field for one of some words."""
    return field(default=default, metadata={"choices": choices, "trains": trains})


def shortened(value: Any) -> str:
    """As `repr`, but never longer than a line or two: what somebody wrote may be of any size."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # a whole number of so many digits that Python does not write them
        return f"a {type(value).__name__} too large to be shown"


def can_be_written(text: str) -> bool:
    """Whether a text can stand in a file: names of files that are not UTF-8 have characters that no text may have."""
    return "\0" not in text and not any(0xD800 <= ord(character) < 0xE000 for character in text)


def of_type(value: Any, hint: Any) -> bool:
    """Whether a value is what a field's type says, the items of lists included."""
    kind, items = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(of_type(value, one) for one in items)
    if kind in (list, Sequence):
        return isinstance(value, list | tuple) and all(of_type(item, items[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_in_words(hint: Any) -> str:
    """For people, what a field's type allows."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(type_in_words, get_args(hint))))
    if get_origin(hint) in (list, Sequence):
        return "a list of names"
    return IN_WORDS.get(hint, "options by name")


@dataclass(kw_only=True)
class ExperimentConfig:
    """Everything a run depends on. Validated on construction.

    Attributes:
        experiment_name: folder name under results/ and checkpoints/.
        model_type: "all", one registered name, or a list of names.
        use_pretrained: start from pre-trained weights where they can be had.
        pretrained_source: which: "imagenet" (published weights), "wafer" (made on generated maps) or
            "auto", which takes published ones where they can be had, else those made on generated maps.
        pretrained_dir: folder of the weights made on generated maps; None for checkpoints/pretrained in the output
            folder.
        max_epochs: of the final training, with early stopping.
        batch_size: maps a training batch.
        num_optuna_trials: trials for each model type.
        search_epochs: epochs of a trial.
        search_share: share of the time limit that the search may use; what the winner has learnt in it stays.
        favourite_share: share of the final trainings' time for the model whose search scored highest, once all
            searches are done; the others share the rest. None: each model is searched and trained with an equal share.
        sampler: who proposes parameters after the defaults and the settings of the architecture's portfolio: "auto"
            and "tpe" (TPE) or "random".
        pruner: who stops unpromising trials: "auto" (successive halving after a third of a trial's epochs), "median",
            "halving" (the strictest: only the best third goes on after 2, 4, 10, ... epochs), "hyperband" or "none".
        objectives: what the search is for; "macro_f1" alone, or with "latency" and "parameters" to be small. With more
            than one, nothing is pruned and the summary lists the Pareto front.
        storage: where studies are kept: None for a journal file beside the results, or any Optuna storage URL, which
            several processes and machines may share.
        artifacts: folder that all who share `storage` can reach, in which trials leave their weights for whoever
            trains the winner; None for `<file>_weights` beside the file of an SQLite storage, else for none.
        heartbeat: seconds between the signs of life of those who share `storage`; the trial of one who gives none for
            five times as long runs again.
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
        split: how: "lots" at random, or "ordered": the last 20% of the lots are the test (see `split_in_order`).
        image_levels: how images of a folder are read: "auto", "three" or "binary".
        image_size: side in pixels to which maps are resized; most die grids are 25 to 40 dies wide, and on real maps
            40 scored higher than 48 at equal training time.
        seed: of data, split, initial weights and batches.
        learning_rate: peak; None takes each model's own default.
        early_stopping_patience: epochs without a better validation macro F1.
        time_limit: seconds for all training together, shared equally; the learning rate is annealed to end with it.
        accelerator: passed to Lightning.
        devices: of a final training: "auto" for one, how many, or their numbers in a list, [1] for the second. With
            several, each step is shared out among processes of one thread (see `waferlab/training/devices.py`).
        precision: passed to Lightning; "auto" takes bf16-mixed where the hardware computes in it and a measurement
            finds it quicker, else 32-true.
        accumulate_grad_batches: passed to Lightning.
        threads: of a training on a CPU; None takes as many as are quickest at the moment, so that the same weights come
            out again only with a fixed number.
        workers: trials side by side, in processes of one thread each; None for as many as there are cores. Neither
            takes more than OMP_NUM_THREADS says, if that is set.
        trainer: most other arguments of Lightning's Trainer, such as {"gradient_clip_val": 1.0}.
        pretrained_wait: seconds to wait for the host of pre-trained weights to answer.
        tune_decision: choose on validation, after training, whether to average over eight views of each map, how far
            to lean to frequent classes, and the temperature of the probabilities (see `decision.py`).
        output_dir: folder that holds results/ and checkpoints/.
        resume: go on where a run with the same settings was cut off.
        quiet: print only warnings and the final table.
    """

    experiment_name: str = "wafer_defect_complete"
    model_type: str | Sequence[str] = field(default="all", metadata=FREE)
    use_pretrained: bool = True
    pretrained_source: str = one_of("auto", PRETRAINED_SOURCES)
    pretrained_dir: str | Path | None = field(default=None, metadata=FREE)
    max_epochs: int = whole(50, 1, 100_000)
    batch_size: int = whole(32, 2, 65_536)
    num_optuna_trials: int = whole(20, 1, 1_000_000)
    search_epochs: int = whole(8, 1, 100_000)
    search_share: float = number(0.4, 0.05, 0.95)
    favourite_share: float | None = number(None, 0.05, 0.95)
    sampler: str = one_of("auto", SAMPLERS)
    pruner: str = one_of("auto", PRUNERS)
    objectives: Sequence[str] = ("macro_f1",)
    storage: str | None = field(default=None, metadata=FREE)
    artifacts: str | Path | None = field(default=None, metadata=FREE)
    heartbeat: int = whole(15, 1, 600, trains=False)
    enable_mlflow: bool = field(default=True, metadata=FREE)
    tracker: str = one_of("mlflow", TRACKERS, trains=False)
    tracking_uri: str | None = field(default=None, metadata=FREE)
    registry_name: str | None = field(default="wafer_defect_classifier", metadata=FREE)
    enable_optuna: bool = True
    data_augmentation: bool = True
    class_balancing: bool = True
    balance_by: str = one_of("sampler", ("sampler", "loss"))
    data: str | Path = field(default=SYNTHETIC, metadata=FREE)
    samples_per_class: int = whole(150, 1, 1_000_000)
    max_samples_per_class: int | None = whole(None, 1, 100_000_000)
    split: str = one_of("lots", tuple(SPLITS))
    image_levels: str = one_of("auto", IMAGE_LEVELS)
    image_size: int = whole(40, 16, 512)
    seed: int = whole(0, 0, 2**31 - 1)
    learning_rate: float | None = number(None, 1e-6, 1.0)
    early_stopping_patience: int = whole(15, 1, 100_000)
    time_limit: float | None = number(None, 1, 10_000_000)
    accelerator: str = "auto"
    devices: int | str | list[int] = "auto"
    precision: str | int = "auto"
    accumulate_grad_batches: int = whole(1, 1, 100_000)
    threads: int | None = whole(None, 1, 1024, trains=False)
    workers: int | None = whole(None, 1, 1024, trains=False)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    pretrained_wait: float = number(5.0, 0.1, 600, trains=False)
    tune_decision: bool = field(default=False, metadata=FREE)
    output_dir: str | Path = field(default=".", metadata=FREE)
    resume: bool = field(default=False, metadata=FREE)
    quiet: bool = field(default=False, metadata=FREE)

    def __post_init__(self) -> None:
        for name in ("output_dir", "pretrained_dir", "artifacts"):
            if isinstance(path := getattr(self, name), str | Path):
                setattr(self, name, type(path)(os.path.expanduser(path)))
        hints = get_type_hints(type(self))
        for option in fields(self):
            self._check(option, hints[option.name])
        for name, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
            if str(getattr(self, name)) not in known:
                raise ConfigError(f"{name}={shortened(getattr(self, name))} is unknown. Allowed: {', '.join(known)}.")
        self._check_devices()
        self._check_trainer()
        if self.tracker == "wandb" and self.enable_mlflow and find_spec("wandb") is None:
            raise ConfigError("tracker='wandb' needs Weights & Biases, which is not installed: pip install wandb.")
        objectives = list(self.objectives)
        if not objectives or objectives[0] != "macro_f1" or not set(objectives) <= set(OBJECTIVES):
            raise ConfigError(
                f"objectives={shortened(self.objectives)} cannot be searched. Name 'macro_f1' first, then any of "
                "'latency' and 'parameters'."
            )
        name = self.experiment_name
        forbidden = any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name) or name.strip(". ") != name
        if forbidden or not 0 < len(name.encode(errors="replace")) <= LONGEST_NAME:
            raise ConfigError(
                f"experiment_name={shortened(name)} names a folder: use letters, digits, '_', '-' and inner dots, at "
                f"most {LONGEST_NAME}."
            )
        registry = self.registry_name
        if registry is not None and (not registry.strip() or any(c in "/:" for c in registry)):
            raise ConfigError(
                f"registry_name={shortened(registry)} names no model in MLflow: leave out '/' and ':', or write null."
            )
        for name in self.model_types():
            find_model(name).check_size(name, self.image_size)

    def _check(self, option: Field, hint: Any) -> None:
        """Against the range or the choices that stand at the field, or else its type."""
        value, allowed = getattr(self, option.name), option.metadata
        said = f"{option.name}={shortened(value)}"
        if isinstance(value, str | Path) and not can_be_written(str(value)):
            raise ConfigError(f"{said} cannot be used: some of its characters no file can hold. Leave them out.")
        if "choices" in allowed:
            if not isinstance(value, str) or value not in allowed["choices"]:
                raise ConfigError(f"{said} is unknown. Allowed: {', '.join(allowed['choices'])}.")
        elif "low" in allowed:
            low, high, kinds = allowed["low"], allowed["high"], allowed["kinds"]
            if value is None and option.default is None:
                return
            if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
                kind = "a number" if float in kinds else "a whole number"
                raise ConfigError(f"{said} is out of range. Allowed: {kind} from {low:,} to {high:,}.")
        elif option.name != "devices" and not of_type(value, hint):
            raise ConfigError(f"{said} cannot be used. Allowed: {type_in_words(hint)}.")

    def _check_devices(self) -> None:
        devices = self.devices
        named = isinstance(devices, list) and devices and all(type(number) is int for number in devices)
        number = type(devices) is int or (isinstance(devices, str) and devices.isdecimal() and len(devices) <= 4)
        if devices == "auto" or named or (number and 1 <= int(devices) <= 1024):
            return
        raise ConfigError(
            f"devices={shortened(devices)} names none. Allowed: 'auto' (one), how many, or a list of their numbers, "
            "such as [0, 1]."
        )

    def device_count(self) -> int:
        """Devices that a final training is on."""
        if isinstance(self.devices, list):
            return len(self.devices)
        return 1 if self.devices == "auto" else int(self.devices)

    def one_device(self) -> int | list[int]:
        """As Lightning is told, for what is on one device only."""
        return self.devices[:1] if isinstance(self.devices, list) else 1

    def _check_trainer(self) -> None:
        if not self.trainer:
            return
        from lightning.pytorch import Trainer

        known, options = set(inspect.signature(Trainer).parameters), {option.name for option in fields(self)}
        ours = TRAINER_IS_OURS | ({"strategy"} if self.device_count() > 1 else set())  # which train with DDP
        for name in sorted(set(self.trainer) - (known - ours - options)):
            near = difflib.get_close_matches(name, known, 1)
            why = f"no argument of Lightning's Trainer.{f' Did you mean {near[0]!r}?' if near else ''}"
            if name in options:
                why = f"an option of its own. Write {name}={self.trainer[name]!r} beside trainer=..."
            elif name in ours:
                why = "the pipeline's own affair. Leave it out."
            raise ConfigError(f"trainer={shortened(dict(self.trainer))}: {shortened(name)} is {why}")

    def as_plain(self) -> dict[str, Any]:
        """All options by name, in the types of YAML and JSON; addresses without the passwords in them."""
        plain = json.loads(json.dumps(asdict(self), default=str))
        addresses = {name: plain[name] for name in ("storage", "tracking_uri") if plain[name]}
        return plain | {name: address_without_password(address) for name, address in addresses.items()}

    def write_yaml(self, file: Path) -> None:
        """Writes all options, but where and how this run goes on, so that `--config FILE` repeats it elsewhere."""
        import yaml

        options = {name: value for name, value in self.as_plain().items() if name not in PLACE_AND_MANNER}
        write_atomically(file, yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode())

    def model_types(self) -> list[str]:
        """The chosen model types in order, each once."""
        if not MODEL_REGISTRY:
            raise ConfigError(
                "No model is registered yet: import integrated_pipeline first, which registers all of them."
            )
        if self.model_type == "all":
            return [name for name, spec in MODEL_REGISTRY.items() if spec.in_all]
        names = [self.model_type] if isinstance(self.model_type, str) else list(self.model_type)
        if "all" in names and len(names) > 1:
            raise ConfigError(f"model_type={shortened(names)}: 'all' stands alone, for {', '.join(MODEL_REGISTRY)}.")
        for name in names:
            find_model(name)
        if not names:
            raise ConfigError("model_type=[] is empty. Name at least one model, or 'all'.")
        return list(dict.fromkeys(names))

    def data_options(self) -> dict[str, Any]:
        """What `load_wafer_maps` is to be asked for, but for the seed."""
        names = ("data", "samples_per_class", "max_samples_per_class", "image_levels")
        return {name: getattr(self, name) for name in names}

    def no_registry_because(self) -> str | None:
        """Why no model can be registered with this configuration; None if one can."""
        if not self.enable_mlflow:
            return "nothing is tracked (enable_mlflow=False)"
        if self.tracker == "wandb":
            return "offline runs of Weights & Biases have no registry (tracker='wandb')"
        return "no registry is named (registry_name=None)" if self.registry_name is None else None

    def equal_share(self) -> float | None:
        """Seconds of the time limit for each model, search included; None without a limit."""
        return None if self.time_limit is None else self.time_limit / len(self.model_types())

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
        trains = {option.name for option in fields(self) if option.metadata.get("trains", True)}
        settings = {name: value for name, value in asdict(self).items() if name in trains}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------- options from files and commands


def read_options(file: str | Path) -> dict[str, Any]:
    """Options by name from a YAML file, such as the config.yaml that a run leaves; none of their values is checked.

    Raises:
        ConfigError: it cannot be read, is no mapping, or names an option that there is not.
    """
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{file} is larger than {LARGEST_FILE:,} bytes: that is no file of options.")
    found = _from_yaml(content, of=f"{file} cannot be read as YAML")
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no options. Write one a line, such as 'image_size: 32'.")
    return {known_option(str(name), said=f"{file}: "): value for name, value in found.items()}


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Options by name from "name=value", values written as in YAML: "image_size=32", "objectives=[macro_f1, latency]".

    Raises:
        ConfigError: one is no assignment, its value is no YAML, or there is no option of that name.
    """
    options = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{shortened(assignment)} is no option. Write NAME=VALUE, such as image_size=32.")
        options[known_option(name.strip())] = _from_yaml(value, of=shortened(assignment))
    return options


def default_options() -> dict[str, Any]:
    """All options with their defaults, as YAML knows them."""
    return ExperimentConfig().as_plain()


def known_option(name: str, *, said: str = "") -> str:
    """The name itself, if it is one of an option.

    Args:
        name: as somebody wrote it.
        said: where, for the error.

    Raises:
        ConfigError: it is not; the error names the nearest.
    """
    names = [option.name for option in fields(ExperimentConfig)]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise ConfigError(
            f"{said}{shortened(name)} is no option. {f'Did you mean {near[0]!r}? ' if near else ''}All of them, with "
            "what they mean, are in waferlab/config.py."
        )
    return name


def _from_yaml(text: str | bytes, *, of: str) -> Any:
    """What is written, in plain values; raises ConfigError, which begins with `of`, if that is nothing."""
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_loader())
    except (ValueError, yaml.YAMLError) as error:  # ValueError: 2001-99-99, or a number of thousands of digits
        reason = " ".join(str(error).split())
        raise ConfigError(f"{of}: {reason[:LONGEST_REASON]}{'...' * (len(reason) > LONGEST_REASON)}") from error


def _yaml_loader() -> type:
    """PyYAML's safe loader, which takes 1e-3 for a number, too, as YAML 1.2 does.

    It follows no aliases (`*name`): options need none, and a few of them can stand for gigabytes. Nor does it go deep:
    each of many levels costs it more than the one before.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        levels = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"aliases such as *{self.peek_event().anchor} are not read. Write the value.")
            if self.levels == DEEPEST:
                raise yaml.YAMLError(f"lists within lists are not read, from {DEEPEST} deep on. No option needs them.")
            self.levels += 1
            try:
                return super().compose_node(parent, index)
            finally:
                self.levels -= 1

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader
