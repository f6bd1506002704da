"""What has to hold of a folder after a run that was broken and went on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

LEFT_BEHIND = (".tmp", ".partial", ".unfinished")


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs that ended alike have in common: best trials, scores, and digests of the weights.

    Raises:
        ValueError: nothing of that is there, so that any two runs would be alike.
    """
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in files_of(folder, "best.ckpt"):
        weights = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
        found[str(file.relative_to(folder))] = _digest(weights)
    for file in files_of(folder, "*.safetensors"):  # of pre-training
        found[str(file.relative_to(folder))] = _digest(load_file(file))
    for file in files_of(folder, "*.json"):
        record, name = json.loads(file.read_text()), str(file.relative_to(folder))
        if file.name == "experiment_summary.json":
            for model in record["models"]:
                best = (model.get("search") or {}).get("best") or {}
                chosen = best.get("parameters"), best.get("values")
                found[f"{name} {model['model_type']}"] = [model["test"]["macro_f1"], *chosen]
        elif record.get("mode") in ("comparison", "ablation"):
            for run in record["runs"]:
                found[f"{name} {run['variant']} {run['seed']}"] = run["macro_f1"]
    if not found:
        raise ValueError(f"{folder} holds neither weights nor scores")
    return found


def _digest(weights: dict[str, Any]) -> str:
    parts = (name.encode() + value.numpy().tobytes() for name, value in weights.items())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def files_of(folder: Path, name: str) -> list[Path]:
    """Those of that name, but for the tracker's copies, which lie in folders of random names."""
    return sorted(file for file in folder.rglob(name) if "mlruns" not in file.relative_to(folder).parts)


def problems(folder: Path) -> list[str]:
    """Files that are not whole, runs that are not closed or twice there, more than one champion."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if trouble := trouble_of(file):
            found.append(f"{file.relative_to(folder)}: {trouble}")
    for database in folder.glob("mlflow.db"):
        found += problems_of_tracking(database)
    return found


def trouble_of(file: Path) -> str:
    """Why a file is not whole; nothing if it is."""
    if file.name.endswith(LEFT_BEHIND) or ".partial." in file.name:
        return "left behind"
    reader = READERS.get(file.suffix)
    try:
        if reader is not None:
            reader(file)
    except Exception as error:  # whatever a reader finds wrong
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _read_checkpoint(file: Path) -> None:
    from waferlab.training.checkpoints import checkpoint_digest

    checkpoint_digest(file)


def _read_arrays(file: Path) -> None:
    with np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            arrays[name]


def _read_picture(file: Path) -> None:
    from PIL import Image

    with Image.open(file) as picture:
        picture.load()


def _read_model(file: Path) -> None:
    import onnxruntime

    onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _read_weights(file: Path) -> None:
    from safetensors.torch import load_file

    load_file(file)


def _read_yaml(file: Path) -> None:
    import yaml

    yaml.safe_load(file.read_text())


def _read_page(file: Path) -> None:
    if "</html>" not in file.read_text():
        raise ValueError("it does not end")


def _read_lines(file: Path) -> None:
    for line in file.read_bytes().splitlines():
        json.loads(line)


READERS = {
    ".log": lambda file: _read_lines(file) if file.name == "optuna_journal.log" else None,
    ".json": lambda file: json.loads(file.read_text()),
    ".ckpt": _read_checkpoint,
    ".npz": _read_arrays,
    ".safetensors": _read_weights,
    ".png": _read_picture,
    ".onnx": _read_model,
    ".yaml": _read_yaml,
    ".html": _read_page,
}


def problems_of_tracking(database: Path) -> list[str]:
    """Of MLflow's database: damage, runs that are open or twice there, versions and champions."""
    found = []
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as store:
        (verdict,) = store.execute("pragma integrity_check").fetchone()
        if verdict != "ok":
            found.append(f"{database.name}: {verdict}")
        runs = store.execute("select run_uuid, name, status from runs where lifecycle_stage = 'active'").fetchall()
        keys = dict(store.execute("select run_uuid, value from tags where key = 'key'"))
        parents = dict(store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        versions = store.execute("select name, version from model_versions").fetchall()
        aliases = store.execute("select name, alias, version from registered_model_aliases").fetchall()
    found += [f"run {name} is {status}" for _, name, status in runs if status == "RUNNING"]
    known = {run for run, _, _ in runs}
    found += [f"run {name} hangs below none" for run, name, _ in runs if parents.get(run, run) not in known]
    finished = Counter(
        (name, keys.get(run), parents.get(run))  # one with a key goes on, whatever became of it
        for run, name, status in runs
        if status in ("FINISHED", "RUNNING") or keys.get(run)
    )
    found += [f"run {name} is there {count} times" for (name, _, _), count in finished.items() if count > 1]
    names = {name for name, _ in versions}
    for name in names:
        champions = [version for of, alias, version in aliases if (of, alias) == (name, "champion")]
        mine = [version for of, version in versions if of == name]
        if len(champions) != 1 or len(mine) != 1:
            found.append(f"{name} has the versions {mine}, champion {champions}")
    return found
