"""Weights to start from: published ones, fetched within a bounded time, and our own, made on generated wafer maps.

Both are read without running code.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from waferlab.errors import WeightsUnavailableError
from waferlab.models.classifier import WaferClassifier
from waferlab.records import StartingWeights
from waferlab.tracking.whole_files import write_atomically

ASK_AGAIN = 600.0  # seconds: a host that does not answer costs its wait once, not at the start of every training
_in_vain: dict[str, tuple[float, WeightsUnavailableError]] = {}  # when an address was asked, and what became of it


def start_from(
    model: WaferClassifier,
    *,
    model_type: str,
    source: str,
    wait: float,
    folder: Path,
    image_size: int,
) -> StartingWeights:
    """Loads the weights that a network is to start from, and says what came of it.

    Args:
        model: filled in place, or left as it is where there are none.
        model_type: a registered name.
        source: "imagenet" (published ones), "wafer" (made on generated maps) or "auto": published ones where they can
            be had, else generated ones.
        wait: seconds for the host of published ones to answer.
        folder: of the generated ones.
        image_size: side in pixels that generated ones must have been trained on.
    """
    reasons = []
    if source != "wafer":
        try:
            return StartingWeights("published", model.load_published(wait))
        except WeightsUnavailableError as error:
            publishes = type(model).load_published is not WaferClassifier.load_published
            reasons += [str(error)] if publishes or source == "imagenet" else []
    if source != "imagenet":
        try:
            name = load_generated_weights(folder, model.network, model_type=model_type, image_size=image_size)
            return StartingWeights("generated", name)
        except WeightsUnavailableError as error:
            reasons.append(str(error))
    return StartingWeights("random", reason="; ".join(reasons))


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
            outcome["error"] = getattr(error, "reason", error)  # what urllib wraps says more, in fewer words

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

    if url in _in_vain and time.monotonic() - _in_vain[url][0] < ASK_AGAIN:
        raise _in_vain[url][1]
    try:
        within(wait, host_answers, what=f"{file.name} is not in the cache and its host does not answer")
    except WeightsUnavailableError as error:
        _in_vain[url] = time.monotonic(), error
        raise
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


def network_digest(network: nn.Module) -> str:
    """Eight hex digits that change with the name or shape of any tensor of the network."""
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in network.state_dict().items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]


def write_generated_weights(file: Path, network: nn.Module, *, header: dict[str, Any]) -> None:
    """Writes a network's tensors as safetensors, whole or not at all.

    Args:
        file: where to.
        network: all of its parameters and buffers are written.
        header: what the weights are and come from; kept as text in the file's header. `load_generated_weights` looks
            for image_size and validation_macro_f1.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    header = {**header, "network": network_digest(network), "sha256": _tensors_digest(tensors)}
    write_atomically(file, save(tensors, metadata={key: str(value) for key, value in header.items()}))


def load_generated_weights(folder: Path, network: nn.Module, *, model_type: str, image_size: int) -> str:
    """Loads all tensors of a network, the head's too, from weights that `pretrain` made.

    Of several files that fit (other seeds, other lengths of training), the one with the best macro F1 on the generated
    maps that are held out for this.

    Args:
        folder: where the files are.
        network: filled in place, or left as it is when this raises.
        model_type: the beginning of the file's name.
        image_size: side in pixels of the images that the weights must have been trained on.

    Returns:
        The name of the weights, for people.

    Raises:
        WeightsUnavailableError: there are none, or none that fits and is whole.
    """
    fitting, wrong = [], []
    for file in sorted(Path(folder).glob(f"{model_type}-*.safetensors")):
        try:
            header = read_header(file)
            if header["network"] != network_digest(network) or int(header["image_size"]) != image_size:
                wrong.append(f"{file.name} is for another size of the network or of the images")
            else:
                fitting.append((float(header["validation_macro_f1"]), file))
        except WeightsUnavailableError as error:
            wrong.append(str(error))
        except (KeyError, ValueError):
            wrong.append(f"{file.name} does not say what it was trained on")
    for _, file in sorted(fitting, reverse=True):
        try:
            network.load_state_dict(_read_tensors(file))
        except WeightsUnavailableError as error:
            wrong.append(str(error))
        else:
            return f"generated wafer maps ({file.name})"
    found = "; ".join(wrong) if wrong else f"none on generated maps in {folder}"
    raise WeightsUnavailableError(
        f"{found}. To make them: python run_experiment.py --mode pretrain --models {model_type} "
        f"--image-size {image_size}"
    )


def read_header(file: Path) -> dict[str, str]:
    """What a file of generated weights says of itself: model type, seed, maps seen, seconds, validation macro F1, ...

    Raises:
        WeightsUnavailableError: not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsUnavailableError(f"{file.name} is damaged ({error}); delete it") from error


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsUnavailableError(f"{file.name} is damaged ({error}); delete it") from error
    if _tensors_digest(tensors) != read_header(file).get("sha256"):
        raise WeightsUnavailableError(
            f"{file.name} is damaged (its tensors are not those that were written); delete it"
        )
    return tensors


def _tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, kinds, shapes and values: the format itself would not notice a changed byte."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
