"""What a Trainer logs goes to a run of the tree."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import DummyExperiment, Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from waferlab.tracking.runs import Run, RunTree


NOT_IN_A_NAME = r"[^\w/. -]+"  # MLflow refuses such a name, with all that is logged beside it


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger for a run that a tree has opened: `pl.Trainer(logger=tree.logger(run))`.

    Metrics and hyperparameters wait in the tree's line, so a slow store holds no training up and one that is away does
    not end it. The step of a metric is its epoch, counted from 1; what comes without an epoch, as from
    `LearningRateMonitor`, keeps the step that it comes with. The tree ends the run, not the Trainer: so a pruned trial
    ends as KILLED. Processes other than the first of several log nothing.
    """

    def __init__(self, tree: RunTree, run: Run) -> None:
        Logger.__init__(self)  # MLFlowLogger's own would import MLflow and connect at once
        self._tree, self._run = tree, run
        self._tracking_uri, self._log_model = tree.uri, False
        self._run_id = self._experiment_id = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The tracker's own object, MLflow's client.

        Lightning asks for it at the start of each training, which waits for nothing. Whoever uses it waits until the
        run is open; if it cannot be, nothing is done.
        """
        return _WhenUsed(self._client)

    @property
    def run_id(self) -> str | None:
        """The run's; waits until it is open. None if it cannot be."""
        self._client()
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's; waits until the run is open. None if it cannot be."""
        self._client()
        return self._experiment_id

    def _client(self) -> Any:
        if getattr(rank_zero_only, "rank", 0):
            return DummyExperiment()
        if self._run_id is None:
            self._run_id, self._experiment_id = self._tree.run_id(self._run), self._tree.experiment_id
        return DummyExperiment() if self._run_id is None else self._tree.client()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends metrics to the run."""
        known = {re.sub(NOT_IN_A_NAME, "", name): value for name, value in metrics.items()}
        values = {name: value for name, value in known.items() if name != "epoch" and not isinstance(value, str)}
        step = int(metrics["epoch"]) + 1 if "epoch" in metrics else step or 0
        self._tree.metrics(self._run, values, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Sends hyperparameters to the run, those in a nested dict as `outer/inner`."""
        self._tree.params(self._run, **_flatten_dict(_convert_params(params)))

    def finalize(self, status: str = "success") -> None:
        """Leaves the run open: the tree knows what becomes of it."""


class _WhenUsed:
    """Stands for an object that is got when something of it is wanted."""

    def __init__(self, get: Callable[[], Any]) -> None:
        self._get = get

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)
