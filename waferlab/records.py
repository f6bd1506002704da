"""What a run writes down: JSON that is whole or not there, and where its figures come from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np

from waferlab.data.maps import CLASS_NAMES, NUM_CLASSES, WaferMaps
from waferlab.data.splitting import SPLITS, Split
from waferlab.tracking.addresses import command_line_used
from waferlab.tracking.whole_files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
SUMMARY_SCHEMA_VERSION = 1
LIBRARIES = (
    "torch",
    "torchvision",
    "lightning",
    "optuna",
    "mlflow",
    "ultralytics",
    "numpy",
    "scikit-learn",
    "onnxruntime",
)


# ------------------------------------------------------------------------------------------------ what is kept


@dataclass(frozen=True)
class StartingWeights:
    """What a network starts from.

    Attributes:
        kind: "random", "published" or "generated" (made on generated wafer maps).
        name: of the weights; "" for random ones.
        reason: why they are random, or "".
    """

    kind: str
    name: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"random ({self.reason})" if self.kind == "random" else self.name


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """All that is to be known of a training; it describes the weights in its checkpoint and goes where they go.

    Attributes:
        model_type: a registered name.
        parameters: batch size and all hyperparameters of the model, by name.
        weights: what the network started from.
        precision: that it was computed in, in Lightning's words.
        n_parameters: of the network.
        epochs: that were trained.
        best_epoch: whose weights are in the checkpoint, from 1.
        train_seconds: validation included, over all sittings.
        history: a value an epoch, by name: epoch, train_loss, val_macro_f1, learning_rate, ...
        checkpoint: path in the model's folder of checkpoints.
        checkpoint_sha256: that the checkpoint must have.
    """

    model_type: str
    parameters: dict[str, Any]
    weights: StartingWeights
    precision: str
    n_parameters: int
    epochs: int
    best_epoch: int
    train_seconds: float
    history: dict[str, list[float]]
    checkpoint: str
    checkpoint_sha256: str

    @property
    def val_macro_f1(self) -> float:
        """Of the best epoch."""
        return max(self.history["val_macro_f1"])

    def as_json(self) -> dict[str, Any]:
        """Plain values; with `starting_weights` for programs and the same as a text, `weights`, for people."""
        record = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return record | {"starting_weights": record["weights"], "weights": str(self.weights)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The record that `as_json` gave."""
        fields = {f.name for f in dataclasses.fields(cls)} - {"weights"}
        some = {name: value for name, value in record.items() if name in fields}
        return cls(weights=StartingWeights(**record["starting_weights"]), **some)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What is kept of a trial.

    Attributes:
        number: in its study.
        state: "complete", "pruned", "fail", ...
        values: of the objectives; None if it did not come to its end.
        last_macro_f1: the last that it reported, on validation.
        epochs: that it reported.
        parameters: that it was asked to try.
        seconds: from its start to its end.
        proposed_by: the sampler, chance, the defaults, ...
        reason: why it failed.
        again: the number of the cut-off trial that it runs again.
    """

    number: int
    state: str
    values: list[float] | None
    last_macro_f1: float | None
    epochs: int
    parameters: dict[str, Any]
    seconds: float | None
    proposed_by: str | None = None
    reason: str | None = None
    again: int | None = None


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """The trial that the final training goes on from.

    Attributes:
        number: in its study.
        values: of the objectives.
        macro_f1: on validation.
        best_epoch: from 1.
        parameters: that it tried.
        goes_on: whether its state is here, so that the final training can go on from it.
        record: that describes its weights.
    """

    number: int
    values: list[float]
    macro_f1: float
    best_epoch: int | None
    parameters: dict[str, Any]
    goes_on: bool
    record: TrainingRecord | None = None


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """What a search did and found.

    Attributes:
        study: its name in the storage.
        sampler, pruner: the names of their classes; no pruner with several objectives.
        proposed_by: how many trials each proposed.
        pruned: how many trials were stopped as unpromising.
        workers: processes that ran trials side by side.
        objectives: what was searched for.
        seconds: that all trials took.
        best: the trial to go on from.
        why: it, and not the defaults or another.
        pareto_front: number, values and parameters of the trials that no other beats.
        trials: all of them.
    """

    study: str
    sampler: str
    pruner: str | None
    proposed_by: dict[str, int]
    pruned: int
    workers: int
    objectives: list[str]
    seconds: float
    best: BestTrial
    why: str
    pareto_front: list[dict[str, Any]]
    trials: list[TrialRecord]

    def begun(self) -> int:
        """How many trials there were, without those that still waited when the time was up."""
        return sum(trial.state != "waiting" for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class TrainedModel(TrainingRecord):
    """The weights that stay after search and final training.

    Attributes:
        weights_from: "final training", or the trial that it went on from.
        search: what it did and found, if there was one.
        no_search_because: why there was none although one was wanted.
        total_seconds: of search and final training.
    """

    weights_from: str = "final training"
    search: SearchRecord | None = None
    no_search_because: str | None = None
    total_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelResult(TrainedModel):
    """A trained model with its scores.

    Attributes:
        validation, test: see `evaluation.metrics.compute_metrics`; of the test part, by_grid, too, see
            `scores_by_grid`.
        latency_ms: median to answer one map on the CPU.
        left_out: numbers of the classes that it does not answer with.
        decision: the rule that was fitted on validation, with scores before and after.
        sets: how often prediction sets fitted on validation hold the true class of test maps; see
            `evaluation.conformal.evaluate_sets`, with `floors` to make them again.
    """

    validation: dict[str, Any]
    test: dict[str, Any]
    latency_ms: float
    left_out: tuple[int, ...] = ()
    decision: dict[str, Any] | None = None
    sets: dict[str, Any] | None = None


# ------------------------------------------------------------------------------------------------------ writing


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Writes ``experiment_summary.json`` whole or not at all, with `SUMMARY_SCHEMA_VERSION` as schema_version.

    NumPy scalars and arrays, tuples, dataclasses and paths are turned into what JSON knows.

    Raises:
        ValueError: if a number is NaN or infinite (JSON has neither); names the place, such as ``models[0].macro_f1``.
        TypeError: if a value has no counterpart in JSON; names the place.
    """
    plain = _to_json(summary, place="")
    document = {"schema_version": SUMMARY_SCHEMA_VERSION} | plain | {"schema_version": SUMMARY_SCHEMA_VERSION}
    return write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def _to_json(value: Any, *, place: str) -> Any:
    """The value in JSON's own types; ``place`` is the key path so far, for error messages."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}, which JSON cannot hold: use None and say why beside it")
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item, place=f"{place}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, place=f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}, which has no form in JSON: convert it before writing")


# ------------------------------------------------------------------------------------------------- the summary


def summarise(
    config: Any,
    maps: WaferMaps,
    split: Split,
    results: Sequence[ModelResult],
    *,
    best: str,
    failed: Mapping[str, BaseException],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What `experiment_summary.json` says of a run, but for its registration.

    Args:
        config: the configuration.
        maps: all maps.
        split: its three parts.
        results: of the models that could be trained.
        best: the name of the best one on validation.
        failed: why the others could not be trained.
        seconds: of each phase so far; those of later phases are added to the same mapping.
    """
    counts = {
        part: dict(zip(CLASS_NAMES, np.bincount(maps.labels[i], minlength=NUM_CLASSES).tolist(), strict=True))
        for part, i in split.parts().items()
    }
    why = [f"{name} could not be trained: {error}" for name, error in failed.items()]
    return {
        "experiment_name": config.experiment_name,
        "mode": "pipeline",
        "command": command_line_used(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "verdict": " ".join([_verdict(results, best), *why]),
        "config": config.as_plain(),
        "environment": environment(),
        "data": {
            "source": maps.source,
            "notes": (*maps.notes, *split.notes),
            "maps": len(maps),
            "lots": maps.n_lots,
        },
        "split": {"how": SPLITS[config.split], "fingerprint": split.fingerprint, "class_counts": counts},
        "models": [result.as_json() for result in results],
        "failed_models": [
            {"model_type": name, "reason": f"{type(error).__name__}: {error}"} for name, error in failed.items()
        ],
        "best_model": best,
        "best_model_rule": "highest macro F1 on the validation part",
        "decided_by_time": decided_by_time(config, results),
        "seconds": seconds,
    }


def decided_by_time(config: Any, results: Sequence[ModelResult]) -> list[str]:
    """What followed the speed and load of the machine, in sentences; with none, a repetition gives the same figures.

    Args:
        config: the configuration.
        results: what came of it.
    """
    said = []
    if config.time_limit is not None:
        epochs = ", ".join(f"{result.epochs} of {result.model_type}" for result in results)
        trials = sum(result.search.begun() for result in results if result.search)
        said.append(
            f"time_limit={config.time_limit:g} let the machine's speed decide how much was trained: here {epochs} "
            f"epochs and {trials} trials."
        )
    if any(result.search and result.search.workers > 1 for result in results):
        said.append("Trials ran side by side, compared with those that had come as far. workers=1 repeats them.")
    if config.threads is None:
        said.append("The quickest number of threads was taken: sums in another order differ. threads=1 repeats them.")
    if config.precision == "auto":
        precisions = ", ".join(sorted({result.precision for result in results}))
        said.append(f"precision='auto' took what was quickest here: {precisions}. Name it, to have it elsewhere.")
    return said


def _verdict(results: Sequence[ModelResult], best: str) -> str:
    """Two sentences: what was chosen and how good it is, and what the runner-up on validation reaches."""
    by_name = {result.model_type: result for result in results}

    def score(name: str) -> str:
        test = by_name[name].test
        low, high = (test["intervals"] or {}).get("macro_f1") or (None, None)
        return f"{test['macro_f1']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    first = f"{best} is best on validation and reaches macro F1 {score(best)} on {by_name[best].test['n_samples']:,} "
    first += "test maps of lots it has never seen."
    others = sorted((n for n in by_name if n != best), key=lambda n: -by_name[n].validation["macro_f1"])
    return f"{first} {others[0]}, next on validation, reaches {score(others[0])}." if others else first


def environment() -> dict[str, Any]:
    """Code, versions and hardware that figures depend on.

    Returns:
        commit: of this code; None where git or the repository is missing, as in an installed copy.
        uncommitted_changes: whether its tracked Python files differed from that commit; None where that is not known.
        python, and the version of each library of `LIBRARIES`; None of one that is not installed.
        processor, cpu_capability, cpu_cores, torch_threads, gpu.
    """
    import torch

    return {
        **_commit_of_this_code(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in LIBRARIES},
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # the vector instructions that PyTorch uses
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def version_of(library: str) -> str | None:
    """That is installed here, be it in a package for GPUs; None if it is not."""
    for package in (library, f"{library}-gpu"):
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def code_tags() -> dict[str, str]:
    """The commit of this code and whether its files were changed since, as tags of MLflow; none where not known."""
    code = _commit_of_this_code()
    changed = str(code["uncommitted_changes"]).lower()
    return {"mlflow.source.git.commit": code["commit"], "code.uncommitted_changes": changed} if code["commit"] else {}


@cache  # it does not change while the program runs
def _commit_of_this_code() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if git("ls-files", "--", "waferlab/records.py"):  # else it lies in a repository that is not its own
            changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
            return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"commit": None, "uncommitted_changes": None}
