"""Offline runs of Weights & Biases, as another tracker than MLflow; nothing is sent anywhere.

Runs in the process of `tracking_worker.py`. The tree of runs is shown by group (the pipeline) and job type (pipeline,
model, trial). `wandb sync` sends the runs later, if somebody wants that.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}
JOB_TYPES = ("pipeline", "model", "trial")


class WandbRuns:
    """Carries out the commands of `Tracking` through Lightning's `WandbLogger`, one for each run that is open."""

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self._loggers: dict[int, Any] = {}
        self._depths: dict[int, int] = {}

    def open(self, uri: str | None, folder: str, experiment_name: str, process: str, resume: bool) -> None:
        """Imports Weights & Biases, offline and without its reports of use and errors."""
        os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
        from lightning.pytorch.loggers import WandbLogger

        self._make, self._process, self._folder = WandbLogger, process, Path(folder)
        self._project = re.sub(r"[#?%]", "-", experiment_name)  # the other characters it forbids, no folder has either
        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)  # or it goes to a temporary folder

    def after(self, error: Exception) -> dict[str, bool]:
        """There is no server that may come back."""
        return {"may_pass": False, "store_is_away": False}

    def start(
        self, run: int, name: str, parent: int | None, tags: dict[str, str], key: str | None, started: int
    ) -> None:
        """Opens a run beside those that are open; an offline run cannot be taken up again, so resuming opens anew."""
        import wandb

        if parent is None:
            self._group, self._depths = f"{name} {started}", {}
        depth = self._depths[run] = 0 if parent is None else self._depths[parent] + 1
        self._loggers[run] = self._make(
            name=name, project=self._project, save_dir=self._folder, offline=True, group=self._group,
            job_type=JOB_TYPES[depth], reinit="create_new",
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True,
                x_disable_machine_info=True, x_disable_stats=depth > 0,
            ),
        )  # fmt: skip
        above = None if parent is None else self._loggers[parent].experiment.name
        self._update(run, {"process": self._process, "key": key, "parent": above, **tags})

    def _update(self, run: int, values: dict[str, Any]) -> None:
        self._loggers[run].experiment.config.update(values, allow_val_change=True)

    def end(self, run: int, status: str, reason: str | None, ended: int | None = None) -> None:
        """Closes a run; status and reason are in its summary, a status other than FINISHED is a label, too."""
        experiment = self._loggers.pop(run).experiment
        experiment.summary.update({"status": status} | ({"reason": reason} if reason else {}))
        if status != "FINISHED":
            experiment.tags = (*(experiment.tags or ()), status)
        experiment.finish(exit_code=EXIT_CODES[status])

    def params(self, run: int, params: dict[str, str]) -> None:
        """Into the run's configuration."""
        self._loggers[run].log_hyperparams(params)

    def tags(self, run: int, tags: dict[str, str]) -> None:
        """Into the run's configuration: labels of Weights & Biases have no values."""
        self._update(run, tags)

    def note(self, run: int, markdown: str) -> None:
        """The run's notes."""
        self._loggers[run].experiment.notes = markdown

    def metrics(self, run: int, values: dict[str, float], step: int, logged: int) -> None:
        """Logs metrics of one step."""
        self._loggers[run].log_metrics(values, step)

    def files(self, run: int, files: Sequence[str], folder: str | None) -> None:
        """Copies files to the run's folder."""
        experiment = self._loggers[run].experiment
        target = Path(experiment.dir) / (folder or "")
        target.mkdir(parents=True, exist_ok=True)
        for file in files:  # copied, since `save` alone makes a link to a file that the next run may replace
            experiment.save(shutil.copy(file, target), base_path=experiment.dir, policy="end")

    def dataset(self, run: int, **about: str) -> None:
        """Data and split, into the run's configuration."""
        self._update(run, {"dataset": about})

    def watch_system(self, run: int) -> None:
        """The pipeline's run has the machine's load from its start on."""

    def finish(self, reason: str) -> None:
        """Closes what is still open as KILLED, innermost first."""
        for run in reversed(list(self._loggers)):
            with suppress(Exception):
                self.end(run, "KILLED", reason)
