"""Runs that can be trusted: a parent for the pipeline, a child for each model, a grandchild for each trial.

What is to be written waits in a line that one thread carries out (`line.py`), so neither importing MLflow nor a slow
store holds the training up, and a store that stays away costs a warning, not the training. A run is closed with what
became of it: FINISHED, FAILED or KILLED (pruned and interrupted ones, tagged with the reason). If this program is
killed, the next start closes its runs.
"""

from __future__ import annotations

import atexit
import glob
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from waferlab.errors import RegistryError
from waferlab.tracking.addresses import address_without_password, without_password
from waferlab.tracking.line import Trouble, in_line
from waferlab.tracking.processes import still_runs, this_process
from waferlab.tracking.registry import ModelRegistry, may_pass
from waferlab.tracking.server import page_of
from waferlab.tracking.whole_files import sweep_up, write_atomically

if TYPE_CHECKING:
    from waferlab.tracking.loggers import RunLogger

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # the line tries again
GONE = "its process was killed"
NOWHERE = "file:///nowhere"


@dataclass(eq=False)
class Run:
    """A run that the store has, or soon will have.

    Attributes:
        name: on the page.
        id: in the store; None until it is opened there.
        closed: `end` was called.
        token: by which other processes mean the same run.
    """

    name: str
    id: str | None = None
    closed: bool = False
    token: str = field(default_factory=lambda: uuid4().hex)


class RunTree(ModelRegistry):
    """Writes the runs of one MLflow experiment.

    Attributes:
        uri: where the runs are.
        closed: `close` was called; to go on, make another.

    Args:
        experiment_name: MLflow experiment; made if it is not there.
        uri: tracking URI; None for `sqlite:///mlflow.db` in `folder`, with files in `mlruns/` beside it, so that a bare
            `mlflow ui` in that folder shows everything.
        folder: where the database and the files go.
        warn: called with a line at the first trouble, and if the store stays away until the end; from another thread.
        resume: let runs go on that were opened with the same key.
        tags: of every run.
    """

    store = "MLflow"

    def __init__(
        self, experiment_name: str, *, uri: str | None, folder: Path, warn: Callable[[str], None],
        resume: bool = False, tags: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._experiment_name, self._folder, self._resume = experiment_name, folder.resolve(), resume
        self._own_database, self.uri = uri is None, uri or self._default_uri()
        self._tags, self._runs, self._opening, self._monitor = dict(tags or {}), [], None, None
        self.closed = False
        self._close_at_exit()
        super().__init__(f"{self.store} at {address_without_password(self.uri)}", warn)

    def _close_at_exit(self) -> None:
        """Before all that was registered until now."""
        atexit.unregister(self.close)
        atexit.register(self.close, "KILLED", reason="it was not closed")

    def _default_uri(self) -> str:
        return f"sqlite:///{self._folder / 'mlflow.db'}"

    def _open(self) -> str:
        """Connects to the store, closes the runs of dead processes and returns the experiment's id."""
        for name, value in (QUIET if self.uri.startswith("sqlite") else QUIET | IMPATIENT).items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        files = (self._folder / "mlruns").as_uri() if self._own_database else None
        if self._own_database:
            make_database(self._folder / "mlflow.db", files=files)
        self._process, self._client = this_process(), MlflowClient(self.uri)
        self._experiment_id = self._find_experiment(files)
        self._restore_if_deleted()
        for run in self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
            process = run.data.tags.get("process")
            if process is not None and not still_runs(process):
                self._client.set_tag(run.info.run_id, "reason", GONE)
                self._client.set_terminated(run.info.run_id, "KILLED")
        return self._experiment_id

    def _find_experiment(self, files: str | None) -> str:
        """Its id; it is made if it is not there, and of several programs that make it at once, one does."""
        from mlflow.exceptions import MlflowException

        try:
            if (experiment := self._client.get_experiment_by_name(self._experiment_name)) is None:
                return self._client.create_experiment(self._experiment_name, artifact_location=files)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = self._client.get_experiment_by_name(self._experiment_name)
        return experiment.experiment_id

    def _restore_if_deleted(self) -> bool:
        """Takes the experiment, with its runs, back from where a click on the page puts it."""
        experiment = self._client.get_experiment(self._experiment_id)
        if experiment.lifecycle_stage != "deleted":
            return False
        self._client.restore_experiment(self._experiment_id)
        self._say(f"The experiment {experiment.name!r} was deleted in MLflow; it is restored, with its runs.")
        return True

    def _judge(self, error: Exception) -> Trouble:
        """What a failed call may hope for."""
        try:
            passing = Trouble.PASSING
            if self._restore_if_deleted():
                return passing
        except Exception:  # it is away, or was never there
            passing = Trouble.AWAY
        return passing if may_pass(error) else Trouble.LASTING

    @property
    def experiment_id(self) -> str | None:
        """Of MLflow; waits until the store is open, and is None if it cannot be."""
        return self._wait(self._opened)

    # --- runs

    def start(
        self, name: str, *, parent: Run | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
    ) -> Run:
        """Opens a run below `parent`, or on top; when resuming, the one that was opened with the same `key` goes on."""
        run = Run(name)
        self._runs.append(run)
        self._start(run, parent, self._tags | dict(tags or {}), key)
        return run

    @in_line
    def _start(self, run: Run, parent: Run | None, tags: dict[str, str], key: str | None) -> None:
        ours = {"process": self._process, "key": key or "", "mlflow.source.name": "integrated_pipeline.py"}
        above = {"mlflow.parentRunId": parent.id} if parent is not None and parent.id else {}
        found = self._id_of(f"tags.key = '{key}'") if self._resume and key else None
        if found is None and run is self._opening:  # it may have been opened, and only the answer was lost
            mine = f"tags.process = '{self._process}' and attributes.start_time = {self._given}"
            found = self._id_of(mine, run.name)
        self._opening, tags = run, ours | above | tags
        if found is None:
            made = self._client.create_run(self._experiment_id, start_time=self._given, run_name=run.name, tags=tags)
            run.id = made.info.run_id
            return
        run.id = found
        self._client.update_run(found, status="RUNNING")
        with suppress(Exception):  # why it ended before is no longer true; it may have had no reason
            self._client.delete_tag(found, "reason")
        self._set_tags(run, tags)

    def _id_of(self, which: str, name: str | None = None) -> str | None:
        """The newest run that a filter finds, of that name."""
        found = self._client.search_runs([self._experiment_id], which)
        return next((run.info.run_id for run in found if name in (None, run.info.run_name)), None)

    def end(self, run: Run, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes a run as FINISHED, FAILED or KILLED; `reason` becomes a tag, without passwords."""
        run.closed = True
        self._end(run, status, reason and without_password(reason))

    @in_line
    def _end(self, run: Run, status: str, reason: str | None) -> None:
        self._set_tags(run, {"reason": reason} if reason else {})
        self._client.set_terminated(run.id, status, end_time=self._given)

    @in_line
    def end_lost(self, trial: str, *, reason: str) -> None:
        """Closes, as KILLED, what a process that is gone has left open: runs with this tag `trial`."""
        which = f"tags.trial = '{trial}' and attributes.status = 'RUNNING'"
        for run in self._client.search_runs([self._experiment_id], which):
            self._client.set_tag(run.info.run_id, "reason", reason)
            self._client.set_terminated(run.info.run_id, "KILLED")

    @in_line
    def params(self, run: Run, /, **params: Any) -> None:
        """Logs parameters; one that a run which goes on has with another value becomes a tag: it cannot be changed."""
        from mlflow.entities import Param

        there = self._client.get_run(run.id).data.params
        params = {name: str(value)[:500] for name, value in params.items()}
        new = [Param(name, value) for name, value in params.items() if name not in there]
        self._client.log_batch(run.id, params=new)
        changed = {f"resumed.{name}": value for name, value in params.items() if there.get(name, value) != value}
        self._set_tags(run, changed)

    @in_line
    def tags(self, run: Run, /, **tags: Any) -> None:
        """Sets tags."""
        self._set_tags(run, tags)

    def _set_tags(self, run: Run, tags: Mapping[str, Any]) -> None:
        for name, value in tags.items():
            self._client.set_tag(run.id, name, str(value)[:4000])

    @in_line
    def note(self, run: Run, markdown: str) -> None:
        """What the run's page shows on top."""
        self._client.set_tag(run.id, "mlflow.note.content", markdown)

    @in_line
    def metrics(self, run: Run, values: Mapping[str, float], *, step: int = 0) -> None:
        """Logs metrics of one step, with the time of now."""
        from mlflow.entities import Metric

        points = [Metric(name, float(value), self._given, step) for name, value in values.items()]
        self._client.log_batch(run.id, metrics=points)

    @in_line
    def files(self, run: Run, files: Sequence[Path], *, folder: str | None = None) -> None:
        """Copies files to the run's artifacts."""
        for file in files:
            self._client.log_artifact(run.id, str(file), folder)

    @in_line
    def dataset(self, run: Run, *, name: str, digest: str, source: str, profile: str) -> None:
        """Names the data and the split; `digest` is the split's fingerprint."""
        from mlflow.entities import Dataset, DatasetInput

        data = Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
        self._client.log_inputs(run.id, [DatasetInput(dataset=data, tags=[])])

    @in_line
    def watch_system(self, run: Run) -> None:
        """Logs the machine's load and memory to a run, every five seconds, until `close`."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        class Monitor(SystemMetricsMonitor):
            def monitor(self) -> None:
                while not self._shutdown_event.is_set():  # after an error, which ends MLflow's own, too
                    super().monitor()

        self._monitor = Monitor(run.id, sampling_interval=5, tracking_uri=self.uri)
        self._monitor.start()

    # --- for others

    def logger(self, run: Run) -> RunLogger:
        """For `pl.Trainer(logger=...)`: what Lightning logs goes to the run, and the tree ends it."""
        from waferlab.tracking.loggers import RunLogger

        return RunLogger(self, run)

    def client(self) -> Any:
        """MLflow's client; waits until all before is written, and is None if it cannot be."""
        return self._wait(self._later(lambda: self._client, "client"))

    def run_id(self, run: Run) -> str | None:
        """The id of a run in the store; waits until it is opened, and is None if it cannot be."""
        return run.id or self._wait(self._later(lambda: run.id, "run_id"))

    def run_link(self, run: Run) -> str | None:
        """What follows the address of an MLflow server for the run's page; waits, and is None, as `run_id`."""
        run_id = self.run_id(run)
        return None if run_id is None else page_of(self.experiment_id, run_id)

    # --- the end

    def close(self, status: str = "FINISHED", *, reason: str | None = None) -> None:
        """Closes all open runs, innermost first, and waits until everything is written."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        for run in reversed([run for run in self._runs if not run.closed]):
            self.end(run, status, reason=reason)
        self._close()
        self._stop()

    @in_line
    def _close(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Closes the tree by what becomes of the block: interrupted, failed or finished."""
        try:
            yield
        except KeyboardInterrupt:
            self.close("KILLED", reason="interrupted")
            raise
        except BaseException as error:
            self.close("FAILED", reason=f"{type(error).__name__}: {error}")
            raise
        self.close()


def make_database(database: Path, *, files: str) -> None:
    """Makes a fresh MLflow database, whole or not at all, unless there is one: of several programs one is first.

    Args:
        database: the file.
        files: URI of the folder for the artifacts of experiments that name none.
    """
    sweep_up(database.parent, f".{glob.escape(database.name)}.*.tmp")
    if database.exists():
        return
    empty = empty_database()
    with closing(sqlite3.connect(":memory:")) as made, suppress(FileExistsError):
        made.deserialize(empty)
        made.execute("UPDATE experiments SET artifact_location = replace(artifact_location, ?, ?)", (NOWHERE, files))
        made.commit()
        write_atomically(database, made.serialize(), replace=False)


@cache
def empty_database() -> bytes:
    """MLflow's database as it begins, with `NOWHERE` for its files; made in memory, in half the time of a disk."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return SqlAlchemyStore("sqlite://", NOWHERE).engine.raw_connection().driver_connection.serialize()


class NoRuns:
    """What the pipeline talks to when tracking is off: has the methods of `RunTree`, and they do nothing."""

    uri = experiment_id = None
    store, broken, closed = "nothing", False, True

    def start(self, name: str, **_: Any) -> Run:
        """A run that is nowhere."""
        return Run(name)

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Does nothing."""

    end = end_lost = params = tags = note = metrics = files = dataset = watch_system = close = _nothing
    client = run_id = run_link = _nothing

    def logger(self, run: Run) -> Literal[False]:
        """No logger for the Trainer."""
        return False

    def _no_registry(self, *_: Any, **__: Any) -> Any:
        """Raises RegistryError."""
        raise RegistryError("nothing is tracked")

    versions = champion = register = _no_registry

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Leaves the block as it is."""
        yield
