"""The errors that a user can do something about, with the exit status that a script ends with."""

from __future__ import annotations


class UserError(ValueError):
    """What was asked for cannot be done; the message names the value, the reason and the remedy."""

    exit_status = 2


class RunError(RuntimeError):
    """The work could not be brought to its end; the message says why and how to go on."""

    exit_status = 1


class ConfigError(UserError):
    """A setting that cannot be used."""


class DataError(UserError):
    """Data that cannot be used."""


class FolderInUseError(UserError):
    """Another run works in the same folder."""


class ServerError(RunError):
    """The MLflow server could not be started."""


class DamagedFileError(RunError):
    """A file of an earlier run that is no longer what was written."""


class TrainingDivergedError(RunError):
    """The loss is no longer a number."""


class SearchFailedError(RunError):
    """A search without a single finished trial."""
