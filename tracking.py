"""MLflow runs that can be trusted: a parent for the pipeline, a child for each model, a grandchild for each trial.

All of MLflow happens in one worker thread, in order. So importing it and making a fresh database overlap with training,
and a server that is down costs a warning, not the training. A run is closed with what became of it: FINISHED, FAILED
or KILLED (pruned and interrupted ones, tagged with the reason). Runs of a process that was killed are closed at
the next start.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORE_WAIT = 60.0  # seconds that the end of a program waits for what is still to be written


@dataclass
class TrackedRun:
    """A run that exists in MLflow, or soon will: its id is set by the worker thread."""

    name: str
    id: str | None = None
    closed: bool = False


class NoTracking:
    """What the pipeline talks to when tracking is off: takes every call and does nothing."""

    uri = None
    experiment_id = None
    broken = False

    def __getattr__(self, name: str) -> Callable[..., TrackedRun]:
        """Any method of `Tracking`."""
        return lambda *args, **kwargs: TrackedRun("")


class Tracking:
    """Writes the runs of one experiment.

    Args:
        experiment_name: MLflow experiment; made if it is not there.
        uri: tracking URI; None for `sqlite:///mlflow.db` in `folder`, with files in `mlruns/` beside it, so that a bare
            `mlflow ui` in that folder shows everything.
        folder: where the database and the files go.
        warn: called once, with one line, if MLflow cannot be used; the work goes on without it.
        resume: let runs go on that were opened with the same key.
    """

    def __init__(
        self,
        experiment_name: str,
        *,
        uri: str | None,
        folder: Path,
        warn: Callable[[str], None],
        resume: bool = False,
    ) -> None:
        self.experiment_name, self.folder = experiment_name, folder.resolve()
        self.uri = uri or f"sqlite:///{self.folder / 'mlflow.db'}"
        self.experiment_id: str | None = None
        self.broken = False
        self._local_files, self._resume = uri is None, resume
        self._warn, self._monitor = warn, None
        self._open_runs: list[TrackedRun] = []
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._later(self._open)

    # --- runs

    def start(
        self, name: str, *, parent: TrackedRun | None = None, tags: dict[str, str] | None = None, key: str | None = None
    ) -> TrackedRun:
        """Opens a run below `parent`, or on top; when resuming, the one that was opened with the same `key` goes on."""
        run = TrackedRun(name)
        started = int(time.time() * 1000)  # now, not when the worker comes to it
        self._open_runs.append(run)

        def create() -> None:
            above = {} if parent is None else {"mlflow.parentRunId": parent.id}
            ours = {"process": this_process(), "key": key or "", "mlflow.source.name": "integrated_pipeline.py"}
            all_tags = {**ours, **self._code_version(), **above, **(tags or {})}
            run.id = self._id_of(key) if self._resume and key else None
            if run.id is not None:
                self._client.update_run(run.id, status="RUNNING")
                self._log_tags(run, all_tags)
            else:
                created = self._client.create_run(self.experiment_id, start_time=started, run_name=name, tags=all_tags)
                run.id = created.info.run_id

        self._later(create)
        return run

    def end(self, run: TrackedRun, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes a run as FINISHED, FAILED or KILLED; `reason` becomes a tag."""
        run.closed = True
        ended = int(time.time() * 1000)

        def terminate() -> None:
            if reason:
                self._client.set_tag(run.id, "reason", reason)
            self._client.set_terminated(run.id, status, end_time=ended)

        self._later(terminate)

    def params(self, run: TrackedRun, **params: Any) -> None:
        """Logs parameters."""
        self._later(lambda: self._log_params(run, params))

    def tags(self, run: TrackedRun, **tags: str) -> None:
        """Sets tags."""
        self._later(lambda: self._log_tags(run, tags))

    def note(self, run: TrackedRun, markdown: str) -> None:
        """What the run's page shows on top."""
        self._later(lambda: self._client.set_tag(run.id, "mlflow.note.content", markdown))

    def metrics(self, run: TrackedRun, values: dict[str, float], *, step: int = 0) -> None:
        """Logs metrics of one step, with the time of now."""
        now = int(time.time() * 1000)

        def log() -> None:
            from mlflow.entities import Metric

            metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
            self._client.log_batch(run.id, metrics=metrics)

        self._later(log)

    def files(self, run: TrackedRun, files: Sequence[Path], *, folder: str | None = None) -> None:
        """Copies files to the run's artifacts."""

        def log() -> None:
            for file in files:
                self._client.log_artifact(run.id, str(file), folder)

        self._later(log)

    def dataset(self, run: TrackedRun, *, name: str, digest: str, source: str, profile: str) -> None:
        """Names the data and the split; `digest` is the split's fingerprint."""

        def log() -> None:
            from mlflow.entities import Dataset, DatasetInput

            data = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
            self._client.log_inputs(run.id, [DatasetInput(dataset=data, tags=[])])

        self._later(log)

    def watch_system(self, run: TrackedRun) -> None:
        """Logs the machine's load and memory to a run, every five seconds, until `close`."""

        def watch() -> None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(run.id, sampling_interval=5, tracking_uri=self.uri)
            self._monitor.start()

        self._later(watch)

    def call(self, function: Callable[[Any], Any]) -> Future:
        """Runs `function(client)` after everything before it; the future holds its result, or None if MLflow broke."""
        return self._later(lambda: function(self._client))

    def champion(self, name: str) -> Future:
        """The version that `models:/name@champion` names and its ONNX file as (version, path), or None."""

        def fetch() -> tuple[str, Path] | None:
            from mlflow.artifacts import download_artifacts
            from mlflow.exceptions import MlflowException

            try:
                version = self._client.get_model_version_by_alias(name, "champion")
            except MlflowException:  # no such model, or none of its versions is champion yet
                return None
            folder = download_artifacts(f"models:/{name}/{version.version}", tracking_uri=self.uri)
            return version.version, next(Path(folder).glob("*.onnx"))

        return self._later(fetch)

    def register(
        self, run: TrackedRun, file: Path, *, name: str, alias: str, description: str, example: Any, classes: int
    ) -> Future:
        """Registers an ONNX file as the next version of a model, under an alias; the future holds the version.

        Args:
            run: that the file comes from.
            file: to register.
            name: of the registered model.
            alias: "champion" or "challenger".
            description: of the version, in Markdown.
            example: input, uint8 [N, rows, columns].
            classes: columns of the output.
        """

        def log_and_register() -> str:
            import mlflow
            import numpy as np
            import onnx
            from mlflow.models import ModelSignature
            from mlflow.types import Schema, TensorSpec

            mlflow.set_tracking_uri(self.uri)
            with mlflow.start_run(run_id=run.id):
                logged = mlflow.onnx.log_model(
                    onnx.load(file),
                    name="model",
                    registered_model_name=name,
                    signature=ModelSignature(
                        Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1), "maps")]),
                        Schema([TensorSpec(np.dtype("float32"), (-1, classes), "probabilities")]),
                    ),
                    input_example={"maps": example},
                    pip_requirements=["mlflow", "onnx", "onnxruntime"],  # inferring them takes ten seconds
                    onnx_execution_providers=["CPUExecutionProvider"],
                    save_as_external_data=False,
                )
            version = str(logged.registered_model_version)
            self._client.update_model_version(name, version, description=description)
            self._client.set_registered_model_alias(name, alias, version)
            return version

        return self._later(log_and_register)

    def close(self, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes all open runs, innermost first, and waits until everything is written."""
        for run in reversed([run for run in self._open_runs if not run.closed]):
            self.end(run, status, reason=reason)
        self._later(lambda: self._monitor and self._monitor.finish())
        finished = self._worker.submit(lambda: None)
        try:
            finished.result(timeout=STORE_WAIT)
        except TimeoutError:
            self._break(f"it did not take everything within {STORE_WAIT:g} s")
        self._worker.shutdown(wait=False, cancel_futures=True)

    # --- in the worker thread

    def _later(self, work: Callable[[], Any]) -> Future:
        def guarded() -> Any:
            if self.broken:
                return None
            try:
                return work()
            except Exception as error:  # whatever MLflow, a server or a disk does: the training goes on
                self._break(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")

        return self._worker.submit(guarded)

    def _break(self, reason: str) -> None:
        if not self.broken:
            self.broken = True
            self._warn(f"warning: goes on without MLflow at {self.uri} ({reason})")

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if "://" in self.uri and not self.uri.startswith("sqlite"):  # a server that is down must not hold us up long
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        _quiet_store_messages()
        from mlflow import MlflowClient

        self._client = MlflowClient(self.uri)
        experiment = self._client.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            files = (self.folder / "mlruns").as_uri() if self._local_files else None
            self.experiment_id = self._client.create_experiment(self.experiment_name, artifact_location=files)
        else:
            self.experiment_id = experiment.experiment_id
        self._close_dead_runs()

    def _close_dead_runs(self) -> None:
        for run in self._client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
            process = run.data.tags.get("process")
            if process is not None and not still_runs(process):
                self._client.set_tag(run.info.run_id, "reason", "its process was killed")
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _id_of(self, key: str) -> str | None:
        found = self._client.search_runs([self.experiment_id], f"tags.key = '{key}'", max_results=1)
        return found[0].info.run_id if found else None

    def _log_params(self, run: TrackedRun, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(run.id, params=[Param(name, str(value)[:500]) for name, value in params.items()])

    def _log_tags(self, run: TrackedRun, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(run.id, name, str(value)[:4000])

    @staticmethod
    def _code_version() -> dict[str, str]:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}


class MlflowServer:
    """`mlflow ui` on 127.0.0.1 in a process group of its own, stopped as a whole.

    Args:
        uri: the store that it shows; it must exist, since several processes making a fresh database get in each
            other's way.
        port: tried first; the next free one is taken.

    Raises:
        ServerError: it did not come up within a minute.
    """

    def __init__(self, uri: str, *, port: int = 5000) -> None:
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        # One worker and no job processes: half the start-up time, a tenth of the memory, and nothing left behind.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1",
             "--port", str(self.port), "--workers", "1"],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until_up(self, seconds: float = 60.0) -> None:
        """Returns as soon as the server answers."""
        from urllib.error import URLError
        from urllib.request import urlopen

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urlopen(f"{self.url}/health", timeout=2):
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        self.stop()
        raise ServerError(f"The MLflow server did not start on {self.url}: {' '.join(last) or 'no answer'}")

    def link(self, experiment_id: str) -> str:
        """The page with the experiment's runs."""
        return f"{self.url}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"

    def stop(self) -> None:
        """Ends the server and all processes that it started."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        self._log.close()


class ServerError(RuntimeError):
    """The MLflow server could not be started."""


def _free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given back is free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"No free port from {first} to {first + 99}. Stop a server that runs there.")


def _quiet_store_messages() -> None:
    """A fresh database is announced by dozens of lines about migrations."""
    import logging

    for name in ("alembic", "mlflow.store", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.ERROR)


def this_process() -> str:
    """Host, process number and start time: a number alone may belong to another process tomorrow."""
    import psutil

    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.0f}"


def still_runs(process: str) -> bool:
    """Whether a process that `this_process` named may still run; of other hosts one cannot know, so it may."""
    import psutil

    host, number, started = process.rsplit(" ", 2)
    if host != platform.node():
        return True
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" == started
    except psutil.NoSuchProcess:
        return False
