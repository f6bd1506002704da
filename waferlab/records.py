"""What a run writes down: JSON that is whole or not there, and where its figures come from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SUMMARY_SCHEMA_VERSION = 1


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


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replaces the file in one step, so that a crash leaves the old content, never half of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace cannot cross disks
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def command_line_used() -> str:
    """How this program was started, without the folder it lies in."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Code, versions and hardware that figures depend on.

    Returns:
        commit: of this code; None where git or the repository is missing, as in an installed copy.
        uncommitted_changes: whether its tracked Python files differed from that commit; None where that is not known.
        python, torch, lightning, processor, cpu_capability, cpu_cores, torch_threads, gpu.
    """
    import lightning
    import torch

    return {
        **_commit_of_this_code(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # the vector instructions that PyTorch uses
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


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


def code_tags() -> dict[str, str]:
    """The commit of this code and whether its files were changed since, as tags of MLflow; none where not known."""
    code = _commit_of_this_code()
    changed = str(code["uncommitted_changes"]).lower()
    return {"mlflow.source.git.commit": code["commit"], "code.uncommitted_changes": changed} if code["commit"] else {}


def plain_hparams(hparams: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(hparams).items()}
