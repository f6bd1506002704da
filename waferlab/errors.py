"""The errors that a user can do something about, with the exit status that a script ends with."""

from __future__ import annotations

import errno

# What a machine may refuse a program in the middle of its work, and the remedy.
REMEDIES = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room in your quota",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "Choose a folder on a disk that can be written",
    errno.EACCES: "Change its rights, or choose another folder for the output",
    errno.EPERM: "Change its rights, or choose another folder for the output",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Close other programs, which have too many files open",
    errno.ELOOP: "A link stands where this program wants a file of its own: remove it",
    errno.EISDIR: "A folder stands where this program wants a file of its own: move it away",
    errno.EEXIST: "Something stands where this program wants a file of its own: move it away",
    errno.ENOTDIR: "A file stands where this program wants a folder of its own: move it away",
    errno.ENAMETOOLONG: "Give shorter names",
    errno.EIO: "Look after the disk, or choose a folder on another",
}

# What a terminal would carry out, such as to rename its window, if a lot or a file had it in its name.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
CONTROLS |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}  # of names that are not Unicode


def printable(text: str) -> str:
    """A text with others' names in it, as it may be printed: control characters in words."""
    return text.translate(CONTROLS)


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


class DatabaseGoneError(RunError):
    """The database of a study has not answered for so long that nobody waits any more."""


class TrainingDivergedError(RunError):
    """The loss is no longer a number."""


class SearchFailedError(RunError):
    """A search without a single finished trial."""


class TrialFailedError(RuntimeError):
    """A trial that cannot give a value: its reason is kept, the study goes on."""


class SurplusTrialError(RuntimeError):
    """A trial more than wanted: another machine has started the last one at the same moment."""


def refused_by_the_machine(error: Exception) -> str | None:
    """What the machine refused and the remedy, if that is what an error is of: a full disk, rights, too many files."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}. {REMEDIES[error.errno]}"
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without what follows below; its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """PyTorch has an error of its own on a GPU; on a CPU it raises a plain RuntimeError."""
    of_a_gpu = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # without importing PyTorch
    words = ("not enough memory", "can't allocate memory", "alloc_cpu", "bad_alloc", "could not create a primitive")
    return of_a_gpu or isinstance(error, MemoryError) or any(word in str(error) for word in words)


def ends_one_model(error: BaseException) -> bool:
    """Whether an error is one model's own affair: it diverged, found nothing, had no memory or lacks a library."""
    if isinstance(error, DamagedFileError | DatabaseGoneError):  # somebody has to look at that first
        return False
    return isinstance(error, RunError | ImportError) or out_of_memory(error)


class WeightsUnavailableError(RuntimeError):
    """Pre-trained weights are neither in the cache nor to be had from their host in time."""


class RegistryError(RuntimeError):
    """The registry cannot be asked or refused; what it holds is then not known."""
