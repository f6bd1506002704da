"""Published weights: fetched within a bounded time, read without running code, fitted to one-channel images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class WeightsUnavailableError(RuntimeError):
    """Pre-trained weights are neither in the cache nor to be had from their host in time."""


def within(seconds: float, function: Callable[[], Any], *, what: str) -> Any:
    """Runs `function` and gives up after `seconds`.

    A thread, because a name look-up or a firewall that swallows packets cannot be interrupted; it is a daemon, so it
    never keeps the program from ending.

    Raises:
        WeightsUnavailableError: no answer in time, or the function raised.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = function()
        except Exception as error:  # whatever went wrong, the run goes on without these weights and says so
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "value" in outcome:
        return outcome["value"]
    reason = f"{outcome['error']}" if "error" in outcome else f"no answer within {seconds:g} s"
    raise WeightsUnavailableError(f"{what}: {reason}")


def fetch_weights(url: str, file: Path, *, wait: float, hash_prefix: str | None = None) -> Path:
    """Returns `file`, downloading it from `url` when it is not there.

    Args:
        url: where it comes from.
        file: where it is kept.
        wait: seconds for the host to answer; once it does, the download itself may take two minutes.
        hash_prefix: beginning of the file's SHA-256, checked after the download.

    Raises:
        WeightsUnavailableError: not there and not to be had.
    """
    if file.exists():
        return file
    from urllib.request import Request, urlopen

    def host_answers() -> bool:
        with urlopen(Request(url, method="HEAD"), timeout=wait):
            return True

    def download() -> bool:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=hash_prefix, progress=False)
        return True

    within(wait, host_answers, what=f"{file.name} is not in the cache and its host does not answer")
    within(120, download, what=f"{file.name} could not be downloaded")
    return file


def sum_first_layer(weight: torch.Tensor) -> torch.Tensor:
    """A kernel [out, 3, k, k] for RGB to one [out, 1, k, k] for grey.

    Summing over RGB answers a grey map exactly as the old kernel answers that map repeated in three channels.
    """
    return weight.sum(1, keepdim=True)


def read_weights(file: Path, *, allowed: Sequence[type] = ()) -> Any:
    """Reads a weights file without running code from it: tensors, plain values and the `allowed` classes only.

    Raises:
        WeightsUnavailableError: the file is damaged or asks for anything else.
    """
    try:
        with torch.serialization.safe_globals([*allowed, set, torch.Size]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds; each means that this file is of no use
        reason = str(error).strip().splitlines()[0]
        raise WeightsUnavailableError(
            f"{file} cannot be loaded safely ({reason}); delete it to fetch it anew"
        ) from error
