"""What is printed: plain lines, bars with the time left on a terminal, tables."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from waferlab.config import ExperimentConfig
from waferlab.data.maps import WaferMaps
from waferlab.data.splitting import Split
from waferlab.errors import printable
from waferlab.records import ModelResult, SearchRecord, StartingWeights
from waferlab.reports import tables as reports
from waferlab.reports.columns import InColumns
from waferlab.reports.tables import comparison_rows, results_table, sets_in_short
from waferlab.tracking.addresses import address_without_password
from waferlab.tracking.runs import NoRuns, Run, RunTree
from waferlab.training.progress import ProgressBar

CHATTY = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps back what libraries say of themselves, such as which devices there are, while the block lasts."""
    from lightning.pytorch.utilities.warnings import PossibleUserWarning

    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            for message in ("exists and is not empty", "LeafSpec", "smaller than the logging interval"):
                warnings.filterwarnings("ignore", message=f".*{message}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Terminal:
    """Prints what a run has to say, and keeps the seconds of its phases.

    Args:
        console: where to.
        quiet: print the outcome only.

    Attributes:
        seconds: of each phase that was `timed`.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.seconds: dict[str, float] = {}
        # The file itself: it warns from another thread, whoever redirects `sys.stderr` meanwhile.
        self._errors = Console(file=sys.stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def say(self, text: str, *, style: str | None = None) -> None:
        """Prints a line as it is: brackets in a path are no markup. The terminal wraps; a log keeps whole lines.

        What is amiss (yellow) a quiet one says, too, to the standard error.
        """
        if self.quiet and style == "yellow":
            self.warn(text.strip())
            return
        self.console.print(printable(text), soft_wrap=True, markup=False, emoji=False, style=style)

    def warn(self, text: str) -> None:
        """Prints a line to the standard error, from any thread."""
        self._errors.print(printable(text))

    def aloud(self) -> Terminal:
        """One that prints the outcome, which a quiet one does, too."""
        return Terminal(Console(highlight=False)) if self.quiet else self

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to a phase."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    def progress(self, title: str) -> ProgressBar | None:
        """A bar for a training; None where lines are printed instead, since nobody watches."""
        return ProgressBar(self.console, title) if self.somebody_watches() else None

    def watch(self, batches: Sequence[Any], title: str) -> Iterable[Any]:
        """The batches one by one, on a terminal with a bar that shows the time left."""
        if not self.somebody_watches():
            return batches
        return track(batches, f"  {title}", console=self.console, transient=True)

    def somebody_watches(self) -> bool:
        """Whether a person sees bars move."""
        return self.console.is_terminal and not self.quiet

    def print_configuration(self, config: ExperimentConfig) -> None:
        """What is about to be done."""
        limit = f", at most {config.time_limit:g} s of training" if config.time_limit else ""
        search = "none"
        if config.enable_optuna:
            search = f"{config.num_optuna_trials} trials a model, of {config.search_epochs} epochs"
        where = address_without_password(config.tracking_uri) if config.tracking_uri else config.output_dir
        tracking = f"{config.tracker} at {where}" if config.enable_mlflow else "none"
        self.say(config.experiment_name, style="bold")
        self.say(f"  models     {', '.join(config.model_types())}")
        self.say(f"  data       {config.data}, maps resized to {config.image_size}x{config.image_size}")
        self.say(f"  search     {search}")
        self.say(f"  training   {config.max_epochs} epochs, batches of {config.batch_size}{limit}")
        self.say(f"  precision  {config.precision}, seed {config.seed}")
        self.say(f"  tracking   {tracking}")

    def print_data(self, maps: WaferMaps, split: Split) -> None:
        """What there is to learn from."""
        self.say(f"Dataset ready: {len(maps)} samples, {np.count_nonzero(maps.class_counts)} classes")
        sizes = " / ".join(f"{len(part):,} {name}" for name, part in split.parts().items())
        self.say(f"  {sizes}, no lot of {maps.n_lots:,} in two parts, split {split.fingerprint}")
        for note in (*maps.notes, *split.notes):
            self.say(f"  {note}")

    def print_start(self, weights: StartingWeights, *, wanted: bool) -> None:
        """What a training starts from, if pre-trained weights were wanted."""
        if weights.kind != "random":
            self.say(f"  starts from {weights}")
        elif wanted:
            self.say(f"  no pre-trained weights: {weights.reason}; goes on without")

    def print_search(self, found: SearchRecord) -> None:
        """What a search came to."""
        best = found.best
        self.say(
            f"  {found.begun()} trials in {found.seconds:.0f} s, {found.pruned} of them stopped early; trial "
            f"{best.number} goes on ({best.macro_f1:.3f} on validation): {found.why}"
        )

    def print_table(self, table: reports.Table) -> None:
        """A table of a report, with its note below."""
        self.console.print()
        self.console.print(InColumns(table))
        if table.note:
            self.say(table.note)

    def print_outcome(
        self, results: Sequence[ModelResult], summary: Mapping[str, Any], *, runs: RunTree | NoRuns, run: Run
    ) -> None:
        """Scores, the table of all models, where everything is."""
        for result in results:
            self.say(
                f"\n{result.model_type} Results: accuracy {result.test['accuracy']:.4f}, macro F1 "
                f"{result.test['macro_f1']:.4f} (best epoch {result.best_epoch} of {result.epochs})"
            )
        out = self.aloud().console
        out.print()
        table = results_table(comparison_rows(results), chosen=summary["best_model"])
        out.print(InColumns(table, title="Model comparison"))
        for best in (result for result in results if result.model_type == summary["best_model"] and result.sets):
            self.say(f"{best.model_type}: {sets_in_short(best.sets)}")
        spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary["seconds"].items())
        self.say(f"Best on validation: {summary['best_model']}. Time spent: {spent}.")
        for failed in summary["failed_models"]:
            self.say(f"Not trained: {failed['model_type']} ({failed['reason']})")
        config = summary["config"]
        self.say(f"Results and pictures: {Path(config['output_dir']) / 'results' / config['experiment_name']}")
        if config["enable_mlflow"] and not runs.broken:
            self._print_where_to_look(config, runs, run)

    def _print_where_to_look(self, config: Mapping[str, Any], runs: RunTree | NoRuns, run: Run) -> None:
        page, uri = runs.run_link(run), config["tracking_uri"]
        if page is None and config["tracker"] != "wandb":  # the store could not be used, as a warning said
            return
        if config["tracker"] == "wandb":
            self.say(f"Weights & Biases: `wandb sync {runs.uri}/offline-run-*` sends the runs, if you want it")
        elif uri and str(uri).startswith("http"):
            self.say(f"MLflow: {str(uri).rstrip('/')}/{page}")
        else:
            store = f" --backend-store-uri '{address_without_password(str(uri))}'" if uri else ""
            where = "" if uri else f" in {Path(config['output_dir']).resolve()}"
            self.say(f"MLflow: run `mlflow ui{store}`{where} and open http://127.0.0.1:5000/{page}")
