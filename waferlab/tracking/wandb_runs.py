"""Offline runs of Weights & Biases, as another tracker than MLflow; nothing is sent anywhere.

The tree of runs is shown by group (the pipeline) and job type (pipeline, model, trial). `wandb sync` sends the runs
later, if somebody wants that; the parts of a run that was resumed in the order in which they were written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from waferlab.errors import RegistryError
from waferlab.tracking.line import Trouble, in_line
from waferlab.tracking.processes import this_process
from waferlab.tracking.runs import Run, RunTree

EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}
JOB_TYPES = ("pipeline", "model", "trial")


class WandbTree(RunTree):
    """Writes the runs through Lightning's `WandbLogger`, one for each that is open, to wandb/ in the folder.

    An offline run that is closed cannot be opened again: one that is resumed goes on in a second folder with the same
    id, and `wandb sync` makes one run of both. There is no registry.
    """

    store = "Weights & Biases"

    def _default_uri(self) -> str:
        return str(self._folder / "wandb")

    def _open(self) -> None:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        Path(self.uri).mkdir(parents=True, exist_ok=True)  # or it goes to a temporary folder
        self._loggers: dict[Run, Any] = {}
        self._depths: dict[Run | None, int] = {None: -1}
        self._client = None

    def _judge(self, error: Exception) -> Trouble:
        return Trouble.LASTING  # there is no server that may come back

    def _ask(self, question: Callable[[], Any]) -> Any:
        raise RegistryError("offline runs of Weights & Biases have no registry")

    @in_line
    def _start(self, run: Run, parent: Run | None, tags: dict[str, str], key: str | None) -> None:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        known = self._id_of(key)
        if parent is None:
            self._group = f"{run.name} {known or self._given}"
        elif parent not in self._depths:  # of a program on another machine, whose search this one has joined
            self._group, self._depths[parent] = f"joined {parent.id}", JOB_TYPES.index("model")
        depth = self._depths[run] = self._depths[parent] + 1
        self._loggers[run] = WandbLogger(
            id=known, name=run.name, save_dir=self._folder, offline=True, group=self._group,
            job_type=JOB_TYPES[depth],
            project=re.sub(r"[#?%]", "-", self._experiment_name),  # the other characters it forbids, no folder has
            reinit="create_new",
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True,
                x_disable_machine_info=True, x_disable_stats=depth > 0,
            ),
        )  # fmt: skip
        run.id = self._loggers[run].experiment.id
        self._close_at_exit()  # before Weights & Biases ends what it has open as finished
        self._set_tags(run, {"process": this_process(), "key": key, "parent": parent and parent.name, **tags})

    def _id_of(self, key: str | None) -> str | None:
        """For a run with this key: that of the earlier one when resuming, else a new one, kept for then."""
        if key is None:
            return None
        kept = Path(self.uri) / "ids" / hashlib.sha256(f"{self._experiment_name} {key}".encode()).hexdigest()[:16]
        if self._resume and kept.exists() and (found := kept.read_text()):
            return found
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(found := uuid4().hex[:8])
        return found

    def _set_tags(self, run: Run, tags: Mapping[str, Any]) -> None:
        """Into the run's configuration: labels of Weights & Biases have no values."""
        self._loggers[run].log_hyperparams(tags)

    def end_lost(self, trial: str, *, reason: str) -> None:
        """Nothing: a run on another machine lies there."""

    @in_line
    def _end(self, run: Run, status: str, reason: str | None) -> None:
        experiment = self._loggers.pop(run).experiment
        experiment.summary.update({"status": status} | ({"reason": reason} if reason else {}))
        if status != "FINISHED":
            experiment.tags = (*(experiment.tags or ()), status)
        experiment.finish(exit_code=EXIT_CODES[status])

    @in_line
    def params(self, run: Run, /, **params: Any) -> None:
        """Into the run's configuration."""
        self._set_tags(run, {name: str(value) for name, value in params.items()})

    @in_line
    def note(self, run: Run, markdown: str) -> None:
        """The run's notes."""
        self._loggers[run].experiment.notes = markdown

    @in_line
    def metrics(self, run: Run, values: Mapping[str, float], *, step: int = 0) -> None:
        """Logs metrics of one step."""
        self._loggers[run].log_metrics({name: float(value) for name, value in values.items()}, step)

    @in_line
    def files(self, run: Run, files: Sequence[Path], *, folder: str | None = None) -> None:
        """Copies files to the run's folder."""
        experiment = self._loggers[run].experiment
        target = Path(experiment.dir) / (folder or "")
        target.mkdir(parents=True, exist_ok=True)
        for file in files:  # copied, since `save` alone makes a link to a file that the next run may replace
            experiment.save(shutil.copy(file, target), base_path=experiment.dir, policy="end")

    @in_line
    def dataset(self, run: Run, **about: str) -> None:
        """Data and split, into the run's configuration."""
        self._set_tags(run, {"dataset": about})

    def watch_system(self, run: Run) -> None:
        """The pipeline's run has the machine's load from its start on."""

    @in_line
    def _close(self) -> None:
        import wandb

        if wandb.run is None:  # else the program has one of its own
            wandb.teardown()  # waits until the files are whole
