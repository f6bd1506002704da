"""An Optuna study: where it is kept, who proposes, who stops, and what becomes of trials that were cut off."""

from __future__ import annotations

import json
import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

from waferlab.errors import ConfigError, DamagedFileError

TPE_STARTS_AFTER = 10  # finished trials, Optuna's own default; until then it draws at random


def proposed_by(trial: optuna.Trial) -> str:
    """Where a trial's parameters come from; TPE itself draws at random until it has seen enough trials."""
    if "proposed_by" in trial.user_attrs:  # it was put into the queue
        return trial.user_attrs["proposed_by"]
    seen = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    tpe = isinstance(trial.study.sampler, optuna.samplers.TPESampler)
    return "TPE" if tpe and len(seen) >= TPE_STARTS_AFTER else "chance"


def mend_journal(journal: Path) -> None:
    """Cuts off a last line that a crash left unfinished: the next one would be written behind it, and lost with it.

    Raises:
        DamagedFileError: a line before the last is no longer what was written.
    """
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line.decode())
        except ValueError as error:
            raise DamagedFileError(
                f"Line {number} of {journal} is damaged ({error}). Move the file away; with --resume the models that "
                "are finished are kept, and the others are searched for anew."
            ) from error
    if rest:
        with journal.open("r+b") as file:
            file.truncate(len(content) - len(rest))


def open_database(url: str) -> optuna.storages.BaseStorage:
    """Connects to an Optuna storage; tries again when another process makes the tables of a fresh one just now."""
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(4):
        try:
            return optuna.storages.get_storage(url)
        except SQLAlchemyError as error:
            last = error
            time.sleep(2**attempt / 4)
        except (ImportError, ValueError) as error:  # no driver for it, or no database URL at all
            raise ConfigError(f"storage={url!r} cannot be used ({error}).") from error
    raise ConfigError(f"storage={url!r} cannot be used ({str(last).strip().splitlines()[0]}). Does the server run?")


def run_again(study: optuna.Study, trial: optuna.trial.BaseTrial) -> None:
    """Puts the parameters of a trial that was cut off first in the queue."""
    again = {"again": trial.number, "proposed_by": "a trial that was cut off"}
    study.enqueue_trial(trial.params, user_attrs=again)
