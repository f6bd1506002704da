"""The files of a registered model, for those who answer with it: found quickly where the registry is a file here.

Importing MLflow takes three seconds, as long as a first answer may take in all. So where the registry is an SQLite
file, as it is by default, the two lines that MLflow would read there are read directly; whatever is not as expected is
asked of MLflow, which knows every other kind of registry and of storage.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from waferlab.errors import ModelError
from waferlab.tracking.addresses import address_without_password, without_password
from waferlab.tracking.line import in_a_line

OURS = "sqlite:///mlflow.db"  # in the folder where a run was started; what a bare `mlflow ui` shows
URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
BY_ALIAS = """
    SELECT v.version, v.storage_location FROM model_versions v JOIN registered_model_aliases a
    ON v.name = a.name AND v.version = a.version WHERE v.name = :name AND a.alias = :alias"""
BY_VERSION = "SELECT version, storage_location FROM model_versions WHERE name = :name AND version = :version"


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and where its exported file is; what is kept with it lies in extra_files/."""

    name: str
    version: str
    file: Path


def fetch_registered(uri: str, *, into: Path, tracking_uri: str | None = None) -> Registered:
    """The files of "models:/<name>@<alias>" or "models:/<name>/<version>".

    Args:
        uri: of the model.
        into: an empty folder, to which files are copied that do not lie on this machine.
        tracking_uri: of the registry; None for MLFLOW_TRACKING_URI, else `OURS`.

    Raises:
        ModelError: there is no such model, or the registry cannot be asked.
    """
    wanted = URI.fullmatch(uri)
    if wanted is None:
        raise ModelError(f"--model {uri}: cannot be read. Write models:/<name>@champion or models:/<name>/<version>.")
    registry = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or OURS
    database = _sqlite_file(registry)
    if database is not None and not database.is_file():  # MLflow would make an empty one
        raise ModelError(
            f"--model {uri}: there is no {database} here, so no model is registered. Start where the training ran, or "
            "give --tracking-uri or the file: --model checkpoints/<experiment>/<model>/model.onnx."
        )
    found = None if database is None else _asked_directly(database, wanted)
    version, folder = found or _asked_of_mlflow(uri, wanted, into=into, registry=registry)
    file = next(iter(sorted(folder.glob("*.onnx"))), None)
    if file is None:
        raise ModelError(f"--model {uri}: version {version} has no ONNX file. Give a version that this project made.")
    return Registered(wanted["name"], version, file)


def _sqlite_file(registry: str) -> Path | None:
    return Path(unquote(registry.removeprefix("sqlite:///"))) if registry.startswith("sqlite:///") else None


def _asked_directly(database: Path, wanted: re.Match[str]) -> tuple[str, Path] | None:
    """The version and the folder on this machine; None where MLflow has to be asked."""
    question = BY_ALIAS if wanted["alias"] else BY_VERSION
    with contextlib.suppress(sqlite3.Error):
        address = f"{database.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=10)) as asked:
            found = asked.execute(question, wanted.groupdict()).fetchall()
        if len(found) == 1 and found[0][1]:
            place = urlsplit(str(found[0][1]))
            folder = Path(unquote(place.path))
            if place.scheme in ("", "file") and folder.is_dir():
                return str(found[0][0]), folder
    return None


def _asked_of_mlflow(uri: str, wanted: re.Match[str], *, into: Path, registry: str) -> tuple[str, Path]:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

    from waferlab.tracking.registry import may_pass

    client = MlflowClient(registry, registry)

    def ask() -> tuple[str, Path]:
        version = wanted["version"] or client.get_model_version_by_alias(wanted["name"], wanted["alias"]).version
        # Not by its name: MLflow looks for that in the registry of the environment, whichever it is given here.
        files = client.get_model_version_download_uri(wanted["name"], version)
        return str(version), Path(download_artifacts(files, dst_path=str(into), tracking_uri=registry))

    try:
        try:
            return ask()
        except Exception as error:  # a connection may break; MLflow then tries again, but where a run is tracked, too
            if not (may_pass(error) and MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 0):
                raise
            return ask()
    except Exception as error:  # the registry's own kinds, a disk's, a network's
        why = without_password(f"{address_without_password(registry)} ({in_a_line(error)})")
        raise ModelError(
            f"--model {uri}: cannot be had from {why}. Registered models are listed by `mlflow ui`; --tracking-uri "
            "names another registry."
        ) from error
