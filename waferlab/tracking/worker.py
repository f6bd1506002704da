"""The process in which MLflow runs: reads one command a line, carries it out, answers with one line, in order.

`Tracking` starts it and speaks to it. It ends when its input does: then the program that it worked for is gone, and
runs that are still open are closed as KILLED. If a command fails, it says why and whether a later try may succeed, and
takes the next. It imports no torch, so it is ready long before the training is.
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
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from waferlab.tracking.processes import still_runs
from waferlab.tracking.runs import STOP_WAIT

NICENESS = 10  # training goes first
GONE = "its process was killed"


class MlflowRuns:
    """Carries out the commands of `Tracking`; its runs are known by the numbers that `Tracking` gave them."""

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.remarks: list[str] = []  # for the user
        self._ids: dict[int, str | None] = {}  # of the runs that are open
        self._fresh: tempfile.TemporaryDirectory | None = None
        self._monitor: Any = None

    def prepare(self, folder: str) -> None:
        """Imports MLflow and makes a fresh database, if `folder` has none; nothing is written there yet."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        if not (Path(folder) / "mlflow.db").exists():
            fresh = tempfile.TemporaryDirectory(prefix="mlflow_")
            SqlAlchemyStore(f"sqlite:///{fresh.name}/mlflow.db", (Path(folder) / "mlruns").as_uri())
            self._fresh = fresh
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
        if not self._uri.startswith("sqlite"):  # `Tracking` tries again, and knows for how long
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
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
        self._restore_if_deleted()
        self._close_dead_runs()
        return self._experiment_id

    def _restore_if_deleted(self) -> bool:
        """Takes the experiment, with its runs, back from where a click on the page puts it."""
        experiment = self._client.get_experiment(self._experiment_id)
        if experiment.lifecycle_stage != "deleted":
            return False
        self._client.restore_experiment(self._experiment_id)
        self.remarks.append(f"The experiment {experiment.name!r} was deleted in MLflow; it is restored, with its runs.")
        return True

    def after(self, error: Exception) -> dict[str, bool]:
        """What a failed command may hope for: see `tracking.CommandError`."""
        try:
            return {"may_pass": self._restore_if_deleted() or may_pass(error), "store_is_away": False}
        except Exception:  # it is away, or was never there
            return {"may_pass": may_pass(error), "store_is_away": True}

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
        id = self._id_of(f"tags.key = '{key}'") if self._resume and key else None
        if id is None and run in self._ids:  # tried before: it may have been opened, and only the answer was lost
            id = self._id_of(f"tags.process = '{self._process}' and attributes.start_time = {started}", name)
        self._ids[run] = id
        if id is not None:
            self._client.update_run(id, status="RUNNING")
            with suppress(Exception):  # why it ended before is no longer true; it may have had no reason
                self._client.delete_tag(id, "reason")
            self.tags(run, tags)
        else:
            created = self._client.create_run(self._experiment_id, start_time=started, run_name=name, tags=tags)
            self._ids[run] = created.info.run_id

    def _id_of(self, which: str, name: str | None = None) -> str | None:
        """The newest run that a filter finds, of that name."""
        found = self._client.search_runs([self._experiment_id], which)
        return next((run.info.run_id for run in found if name in (None, run.info.run_name)), None)

    def end(self, run: int, status: str, reason: str | None, ended: int | None = None) -> None:
        """Closes a run; `reason` becomes a tag."""
        if reason:
            self._client.set_tag(self._ids[run], "reason", reason)
        self._client.set_terminated(self._ids[run], status, end_time=ended)
        del self._ids[run]

    def params(self, run: int, params: dict[str, str]) -> None:
        """Logs parameters; a run that goes on keeps those it has, and a new value becomes a tag."""
        from mlflow.entities import Param

        there = self._client.get_run(self._ids[run]).data.params
        params = {name: value[:500] for name, value in params.items()}
        new = [Param(name, value) for name, value in params.items() if name not in there]
        self._client.log_batch(self._ids[run], params=new)
        self.tags(run, {f"resumed.{name}": value for name, value in params.items() if there.get(name, value) != value})

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

        class Monitor(SystemMetricsMonitor):
            """Goes on after an error, which ends MLflow's."""

            def monitor(self) -> None:
                while not self._shutdown_event.is_set():
                    super().monitor()

        self._monitor = Monitor(self._ids[run], sampling_interval=5, tracking_uri=self._uri)
        self._monitor.start()

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
            if may_pass(error):
                raise
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

        # An earlier try may have come so far: its version has had these tags from the start.
        version = next((one["version"] for one in self.versions(name) if tags and one["tags"] == tags), None)
        if version is None:
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


@functools.cache
def _code_version() -> dict[str, str]:
    """Tags for the commit and whether its files were changed since; empty without git, or outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
            check=True, timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "code.uncommitted_changes": str(changed).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def may_pass(error: Exception) -> bool:
    """Whether a later try may succeed: no connection, HTTP 429 or 5xx, a database that is locked or has no room."""
    if not hasattr(error, "get_http_status_code"):  # not MLflow's own
        return isinstance(error, ConnectionError | TimeoutError)
    status = error.get_http_status_code()
    if status == 500:  # what a server says; but MLflow gives it to callers' mistakes as well
        return hasattr(error, "json") or str(error).startswith("API request")
    return status == 429 or status > 500


def _in_a_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if len(line) > 200:  # where it was is said first, what was wrong last
        line = f"{line[:98]} ... {line[-98:]}"
    return f"{type(error).__name__}: {line}"


def serve(runs: Any) -> None:
    """Carries out commands until the input ends or SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the tracking was stopped"))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not come between the answers
    reason = GONE
    try:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = {"result": getattr(runs, command.pop("do"))(**command), "remarks": runs.remarks}
                runs.remarks = []
            except Exception as error:  # whatever MLflow, a server or a disk does
                answer = {"error": _in_a_line(error), **runs.after(error)}
            print(json.dumps(answer), file=answers)
    except BrokenPipeError:  # nobody is there to hear the answer
        pass
    except SystemExit as stop:
        reason = str(stop)
    finally:
        runs.finish(reason)


def watch(command: Sequence[str]) -> None:
    """Runs a command until our input ends, then ends it with all that it started; must lead a process group.

    However the program at the other end of the pipe goes, by SIGKILL too, the pipe is closed then.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)  # the others of the group end first
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end_with_the_child() -> None:
        child.wait()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_the_child, daemon=True).start()
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)
    time.sleep(STOP_WAIT)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(sys.argv[2:])
    os.nice(NICENESS)
    if sys.argv[1] == "wandb":
        from waferlab.tracking.wandb import WandbRuns

        serve(WandbRuns())
    else:
        serve(MlflowRuns())
