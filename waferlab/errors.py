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


class ModelError(UserError):
    """A model that cannot be had, or whose file cannot be used."""


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


class TrialFailedError(RuntimeError):
    """A trial that cannot give a value: its reason is kept, the study goes on."""


class SurplusTrialError(RuntimeError):
    """A trial more than wanted: another machine has started the last one at the same moment."""


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has an error of its own on a GPU; on a CPU it raises a plain RuntimeError."""
    of_a_gpu = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # without importing PyTorch
    words = ("not enough memory", "can't allocate memory", "alloc_cpu", "bad_alloc", "could not create a primitive")
    return of_a_gpu or isinstance(error, MemoryError) or any(word in str(error) for word in words)


def ends_one_model(error: BaseException) -> bool:
    """Whether an error is one model's own affair: it diverged, found nothing or had no memory; others can go on."""
    if isinstance(error, DamagedFileError):  # somebody has to look at that first
        return False
    return isinstance(error, RunError) or out_of_memory(error)


class WeightsUnavailableError(RuntimeError):
    """Pre-trained weights are neither in the cache nor to be had from their host in time."""


class RegistryError(RuntimeError):
    """The registry cannot be asked or refused; what it holds is then not known."""
