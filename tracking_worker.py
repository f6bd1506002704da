"""The process in which MLflow runs: reads one command a line, carries it out, answers with one line, in order.

`Tracking` starts it and speaks to it. It ends when its input does: then the program that it worked for is gone, and
runs that are still open are closed as KILLED. After an error it says what it was, closes the runs and ends. It imports
no torch, so it is ready long before the training is.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracking import still_runs

NICENESS = 10  # training goes first
GONE = "its process was killed"


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _answering(command: Callable) -> Callable:
    """Has a command of the registry answer {"answer": ...} or {"error": ...}: its failure ends no tracking."""

    @functools.wraps(command)
    def carry_out(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return {"answer": command(*args, **kwargs)}
        except Exception as error:  # whatever MLflow, a server or a disk does
            return {"error": _in_a_line(error)}

    return carry_out


class MlflowRuns:
    """Carries out the commands of `Tracking`; its runs are known by the numbers that `Tracking` gave them."""

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._ids: dict[int, str] = {}  # of the runs that are open
        self._fresh: tempfile.TemporaryDirectory | None = None
        self._monitor: Any = None

    def prepare(self, folder: str) -> None:
        """Imports MLflow and makes a fresh database, if `folder` has none; nothing is written there yet."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        if not (Path(folder) / "mlflow.db").exists():
            self._fresh = tempfile.TemporaryDirectory(prefix="mlflow_")
            SqlAlchemyStore(f"sqlite:///{self._fresh.name}/mlflow.db", (Path(folder) / "mlruns").as_uri())
        import mlflow.onnx  # the registry wants it at the end
        import mlflow.system_metrics.system_metrics_monitor  # noqa: F401
        import onnx  # noqa: F401

    def open(self, uri: str | None, folder: str, experiment_name: str, process: str, resume: bool) -> str:
        """Connects to the store, closes the runs of dead processes and returns the experiment's id."""
        self._process, self._resume = process, resume
        if uri is None:
            self._uri = f"sqlite:///{folder}/mlflow.db"
            self._put_in_place(Path(folder) / "mlflow.db")
        else:
            self._uri = uri
        if not self._uri.startswith("sqlite"):  # a server that is down must not hold us up long
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        mlflow.set_tracking_uri(self._uri)  # a model's address is looked up there, not where the client points to
        self._client = mlflow.MlflowClient(self._uri)
        experiment = self._client.get_experiment_by_name(experiment_name)
        if experiment is None:
            files = (Path(folder) / "mlruns").as_uri() if uri is None else None
            self._experiment_id = self._client.create_experiment(experiment_name, artifact_location=files)
        else:
            self._experiment_id = experiment.experiment_id
        self._close_dead_runs()
        return self._experiment_id

    def _put_in_place(self, database: Path) -> None:
        """Moves the fresh database to where it belongs, whole or not at all: of several processes one is first."""
        if not database.exists() and self._fresh is None:
            self.prepare(str(database.parent))
        if not database.exists():
            database.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".mlflow_", dir=database.parent) as beside:
                copy = shutil.copy(Path(self._fresh.name) / "mlflow.db", beside)
                with suppress(FileExistsError):
                    os.link(copy, database)
        if self._fresh is not None:
            self._fresh.cleanup()

    def _close_dead_runs(self) -> None:
        for run in self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
            process = run.data.tags.get("process")
            if process is not None and not still_runs(process):
                self._client.set_tag(run.info.run_id, "reason", GONE)
                self._client.set_terminated(run.info.run_id, "KILLED")

    def start(
        self, run: int, name: str, parent: int | None, tags: dict[str, str], key: str | None, started: int
    ) -> None:
        """Opens a run, or takes up the one with the same key."""
        ours = {"process": self._process, "key": key or "", "mlflow.source.name": "integrated_pipeline.py"}
        above = {} if parent is None else {"mlflow.parentRunId": self._ids[parent]}
        tags = {**ours, **_code_version(), **above, **tags}
        self._ids[run] = self._id_of(key) if self._resume and key else None
        if self._ids[run] is not None:
            self._client.update_run(self._ids[run], status="RUNNING")
            with suppress(Exception):  # why it ended before is no longer true; it may have had no reason
                self._client.delete_tag(self._ids[run], "reason")
            self.tags(run, tags)
        else:
            created = self._client.create_run(self._experiment_id, start_time=started, run_name=name, tags=tags)
            self._ids[run] = created.info.run_id

    def _id_of(self, key: str) -> str | None:
        found = self._client.search_runs([self._experiment_id], f"tags.key = '{key}'", max_results=1)
        return found[0].info.run_id if found else None

    def end(self, run: int, status: str, reason: str | None, ended: int | None = None) -> None:
        """Closes a run; `reason` becomes a tag."""
        if reason:
            self._client.set_tag(self._ids[run], "reason", reason)
        self._client.set_terminated(self._ids.pop(run), status, end_time=ended)

    def params(self, run: int, params: dict[str, str]) -> None:
        """Logs parameters."""
        from mlflow.entities import Param

        self._client.log_batch(self._ids[run], params=[Param(name, value[:500]) for name, value in params.items()])

    def tags(self, run: int, tags: dict[str, str]) -> None:
        """Sets tags."""
        for name, value in tags.items():
            self._client.set_tag(self._ids[run], name, value[:4000])

    def note(self, run: int, markdown: str) -> None:
        """What the run's page shows on top."""
        self._client.set_tag(self._ids[run], "mlflow.note.content", markdown)

    def metrics(self, run: int, values: dict[str, float], step: int, logged: int) -> None:
        """Logs metrics of one step."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, logged, step) for name, value in values.items()]
        self._client.log_batch(self._ids[run], metrics=metrics)

    def files(self, run: int, files: Sequence[str], folder: str | None) -> None:
        """Copies files to the run's artifacts."""
        for file in files:
            self._client.log_artifact(self._ids[run], file, folder)

    def dataset(self, run: int, name: str, digest: str, source: str, profile: str) -> None:
        """Names the data and the split."""
        from mlflow.entities import Dataset, DatasetInput

        data = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
        self._client.log_inputs(self._ids[run], [DatasetInput(dataset=data, tags=[])])

    def watch_system(self, run: int) -> None:
        """Logs the machine's load and memory to a run, every five seconds."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self._ids[run], sampling_interval=5, tracking_uri=self._uri)
        self._monitor.start()

    @_answering
    def versions(self, name: str) -> list[dict[str, Any]]:
        """Number, aliases and tags of each version of a model, oldest first; none if there is no such model."""
        aliases = self._aliases(name)
        found = [] if aliases is None else self._client.search_model_versions(f"name='{name}'")
        return [
            {
                "version": str(one.version),
                "aliases": [alias for alias, version in aliases.items() if str(version) == str(one.version)],
                "tags": dict(one.tags),
            }
            for one in sorted(found, key=lambda one: int(one.version))
        ]

    @_answering
    def champion(self, name: str, into: str) -> dict[str, str] | None:
        """Copies the files of the version behind the alias "champion"; None if there is no such version."""
        from mlflow.artifacts import download_artifacts

        version = (self._aliases(name) or {}).get("champion")
        if version is None:
            return None
        problem = ""
        try:
            download_artifacts(f"models:/{name}/{version}", dst_path=into, tracking_uri=self._uri)
        except Exception as error:  # whatever a disk, a server or a store in the cloud does
            problem = _in_a_line(error)
        return {"version": str(version), "problem": problem}

    def _aliases(self, name: str) -> dict[str, Any] | None:
        """The version of each alias of a model; None only if the store says that it has no such model."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self._client.get_registered_model(name).aliases)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise  # a store that is down or refuses does not say that there is no champion

    @_answering
    def register(
        self, run: int, file: str, name: str, about: str, alias: str, description: str, tags: dict[str, str],
        beside: list[str], example: list, classes: int,
    ) -> str:  # fmt: skip
        """Registers an ONNX file as the next version of a model and returns the version."""
        import mlflow
        import mlflow.onnx
        import numpy as np
        import onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        with mlflow.start_run(run_id=self._ids[run]):
            logged = mlflow.onnx.log_model(
                onnx.load(file),
                name="model",
                signature=ModelSignature(
                    Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1), "maps")]),
                    Schema([TensorSpec(np.dtype("float32"), (-1, classes), "probabilities")]),
                ),
                input_example={"maps": np.array(example, dtype=np.uint8)},
                pip_requirements=["mlflow", "onnx", "onnxruntime"],  # inferring them takes ten seconds
                onnx_execution_providers=["CPUExecutionProvider"],
                save_as_external_data=False,
                extra_files=beside,
            )
        # With its tags from the start: if the store fails in between, the version is known again.
        version = str(mlflow.register_model(logged.model_uri, name, tags=tags).version)
        self._client.update_registered_model(name, description=about)
        self._client.update_model_version(name, version, description=description)
        self._client.set_registered_model_alias(name, alias, version)
        return version

    def finish(self, reason: str) -> None:
        """Closes what is still open as KILLED, innermost first."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        for run in reversed([run for run, id in self._ids.items() if id is not None]):
            with suppress(Exception):  # the store may be the very thing that failed
                self.end(run, "KILLED", reason)
        if self._fresh is not None:
            self._fresh.cleanup()


def _code_version() -> dict[str, str]:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}


def serve(runs: Any) -> None:
    """Carries out commands until the input ends, an error occurs, or SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the tracking was stopped"))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not come between the answers
    reason = GONE
    try:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                result = getattr(runs, command.pop("do"))(**command)
            except Exception as error:  # whatever MLflow, a server or a disk does
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
                print(json.dumps({"error": reason}), file=answers)
                break
            print(json.dumps({"result": result}), file=answers)
    except BrokenPipeError:  # nobody is there to hear the answer
        pass
    except SystemExit as stop:
        reason = str(stop)
    finally:
        runs.finish(reason)


if __name__ == "__main__":
    os.nice(NICENESS)
    if sys.argv[1] == "wandb":
        from tracking_wandb import WandbRuns

        serve(WandbRuns())
    else:
        serve(MlflowRuns())
