"""A study that processes and machines share: a database that may be away for a while, workers that may be gone.

Each worker gives a sign of life while its trial runs. One that gives none for long is taken for dead, and whoever finds
out first puts its trial's parameters back in the queue. If it was not dead after all, it finds its trial taken away,
leaves it, and goes on with another.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import wraps
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import (
    DataError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from waferlab.errors import ConfigError, DatabaseGoneError, first_line
from waferlab.search.study import run_again, seconds_between_signs
from waferlab.search.trials import lost_and_not_queued
from waferlab.tracking.addresses import address_without_password, without_password

PATIENCE = 120.0  # seconds that a database may be away
LONGEST_PAUSE = 5.0  # seconds between tries
SIGNS_MISSED = 5  # in a row, after which a worker is taken for dead


def open_database(url: str, *, heartbeat: int) -> RDBStorage:
    """Connects to the database of a study; tries again when another process makes the tables of a fresh one just now.

    Args:
        url: as SQLAlchemy takes it.
        heartbeat: seconds between the signs of life of whoever runs a trial.

    Raises:
        ConfigError: it cannot be had.
    """
    for attempt in range(4):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return PatientDatabase(
                    url, engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=heartbeat,
                    grace_period=SIGNS_MISSED * heartbeat, heartbeat_stale_trial_callback=run_again,
                )  # fmt: skip
        except (SQLAlchemyError, StorageInternalError) as error:
            last = error
            time.sleep(2**attempt / 4)
        except (ImportError, ValueError) as error:  # no driver for it, or no database URL at all
            raise ConfigError(f"storage={address_without_password(url)!r} cannot be used ({error}).") from error
    why = without_password(first_line(last))
    raise ConfigError(f"storage={address_without_password(url)!r} cannot be used ({why}). Does the server run?")


class PatientDatabase(RDBStorage):
    """Optuna's own storage, which tries again what failed as the server was away: it restarts, or a link breaks."""


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        started, pause, failed = time.monotonic(), 0.1, False
        while True:
            try:
                return method(*arguments, **named)
            except UpdateFinishedTrialError:
                if failed and method.__name__ == "set_trial_state_values":
                    return True  # it was done, and only the answer was lost
                raise
            except (OperationalError, InterfaceError, StorageInternalError) as error:
                # A connection that breaks in the middle has many names; data that it does not take has these.
                if isinstance(error.__cause__, DataError | IntegrityError | ProgrammingError):
                    raise
                if time.monotonic() - started > PATIENCE:
                    raise DatabaseGoneError(
                        f"storage={address_without_password(arguments[0].url)!r} has not answered for {PATIENCE:.0f} s "
                        f"({without_password(first_line(error))}). What it holds is kept there: go on when it is back."
                    ) from error
            failed = True
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)

    return call


# What is asked of it by the cache that Optuna puts in front of it, and for the signs of life.
_ASKED = (
    *("_create_new_trial", "_get_trials", "_set_trial_param", "_get_stale_trial_ids", "record_heartbeat"),
    "get_trial_id_from_study_id_trial_number",
)
for _name in {*BaseStorage.__abstractmethods__, *_ASKED}:
    setattr(PatientDatabase, _name, _patient(getattr(RDBStorage, _name)))


# ------------------------------------------------------------------------------------------------------ lost trials


def bring_back_lost_trials(study: optuna.Study) -> None:
    """Has the trials of workers that are gone run again: those that give no sign of life, or were dropped before one.

    Also those whose loss was found out by a process that was gone itself before they were in the queue again.
    """
    interval = seconds_between_signs(study)
    if interval is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    before = datetime.now() - timedelta(seconds=2 * SIGNS_MISSED * interval)
    for trial in lost_and_not_queued(study):
        if trial.datetime_complete < before:
            run_again(study, trial)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "process" not in trial.user_attrs and trial.datetime_start < before:
            with suppress(ValueError):  # somebody else has just done it
                study.tell(trial.number, state=TrialState.FAIL)
                run_again(study, trial)


@contextmanager
def lost_trials_watched(study: optuna.Study) -> Iterator[None]:
    """Looks for lost trials while the block lasts, however long the trials take that run in it."""
    interval = seconds_between_signs(study)
    if interval is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(interval):
            with suppress(StorageInternalError, DatabaseGoneError):  # it has been away for long; whoever trains says so
                bring_back_lost_trials(study)

    watcher = threading.Thread(target=watch, name="lost trials", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
