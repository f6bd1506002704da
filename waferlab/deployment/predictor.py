"""Answers of an exported file: ONNX Runtime on raw die maps, without PyTorch. All that answers goes through here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waferlab.errors import ModelError
from waferlab.evaluation.conformal import DEFAULT_COVERAGE, PredictionSets, answered_alone
from waferlab.tracking.processes import usable_cores

if TYPE_CHECKING:
    import onnx

REGISTERED = "models:/"
DEFAULT_MODEL = "models:/wafer_defect_classifier@champion"
PROVIDERS = {  # of ONNX Runtime, by the word on the command line; what the first cannot do, the next does
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
DIES_AT_ONCE = 2**20  # of the maps that are answered in one call of ONNX Runtime, which bounds the memory it takes


@dataclass(frozen=True)
class Answers:
    """What a model says of N maps.

    Attributes:
        class_names: C names, in the order of the columns.
        probabilities: float32 [N, C], rows sum to 1.
        sets: bool [N, C], the classes that are in each map's set at `coverage`; None if the file has no sets.
        coverage: that the sets promise, 0..1.
    """

    class_names: tuple[str, ...]
    probabilities: np.ndarray
    sets: np.ndarray | None
    coverage: float

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def predicted(self) -> np.ndarray:
        """int64 [N], the column of each map's likeliest class."""
        return self.probabilities.argmax(axis=1)

    @property
    def classes(self) -> list[str]:
        """The name of each map's likeliest class."""
        return [self.class_names[column] for column in self.predicted]

    @cached_property
    def abstains(self) -> np.ndarray:
        """Bool [N], True where the set does not leave the likeliest class alone: somebody should look at the map."""
        if self.sets is None:
            return np.zeros(len(self), dtype=bool)
        return ~answered_alone(self.sets, self.predicted)

    def set_names(self) -> list[tuple[str, ...]]:
        """The classes in each map's set, the likeliest first."""
        if self.sets is None:
            return [()] * len(self)
        order = np.argsort(-self.probabilities, axis=1, kind="stable")
        return [
            tuple(self.class_names[column] for column in columns if held[column])
            for columns, held in zip(order, self.sets, strict=True)
        ]


class Predictor:
    """Runs an exported file with ONNX Runtime, on the CPU unless another provider is asked for.

    Attributes:
        class_names: what the columns of the probabilities mean.
        about: what the file says of itself: model_type, image_size, contract, split.
        name: of the model, for people: the file, or the registered model and version.
        sets: its prediction sets; None for a file that was exported without.
        folder: that the file lies in, with what is kept beside it.

    Args:
        path: of the file.
        threads: that one call may use; None for one a core.
        name: None for that of the file.
        provider: what computes, of `PROVIDERS`; never another one in its place.

    Raises:
        ModelError: the provider is not there, or does not start.
        ValueError: the file is no exported classifier, or its answer has other columns than it has class names.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, name: str | None = None,
        provider: str = "cpu",
    ) -> None:  # fmt: skip
        self.path = Path(path)
        self.name = name or self.path.name
        self._threads, self._provider = threads, provider
        self._session = self.open(self.path)
        about = self._session.get_modelmeta().custom_metadata_map
        try:
            self.class_names = _distinct_names(json.loads(about["class_names"]))
            text = about.get("prediction_sets")
            self.sets = None if text is None else PredictionSets.from_text(text)
            if self.sets is not None and self.sets.class_names != self.class_names:
                raise ValueError("its prediction sets are of other classes")
        except (KeyError, ValueError, TypeError, RecursionError, OverflowError) as error:
            raise self._unusable(error) from error
        self.about: Mapping[str, str] = {k: v for k, v in about.items() if k not in ("class_names", "prediction_sets")}
        shape = next((output.shape for output in self._session.get_outputs()), ())  # a graph may have none
        if len(shape) != 2 or shape[1] != len(self.class_names):
            raise ValueError(
                f"{path} answers {shape or 'nothing'} for the {len(self.class_names)} classes that it names. Wanted: "
                f"[maps, {len(self.class_names)}]. Export the model anew."
            )

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] = DEFAULT_MODEL, *, threads: int | None = None,
        tracking_uri: str | None = None, provider: str = "cpu",
    ) -> Predictor:  # fmt: skip
        """A predictor of a file or of a registered model.

        Args:
            source: a .onnx file; or "models:/<name>@<alias>", "models:/<name>/<version>".
            threads: that one call may use; None for one a core.
            tracking_uri: of the registry; None for MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in this folder.
            provider: what computes, of `PROVIDERS`.

        Raises:
            ModelError: there is no such model, its file cannot be used, or the provider is not there.
        """
        text, folder = os.fspath(source), None
        try:
            if not text.startswith(REGISTERED):
                if not Path(text).is_file():
                    raise ModelError(
                        f"--model {text}: no such file. Give a .onnx file, or models:/<name>@champion; training leaves "
                        "the file at checkpoints/<experiment>/<model>/model.onnx."
                    )
                return cls(text, threads=threads, provider=provider)
            from waferlab.tracking.registered import fetch_registered

            folder = tempfile.TemporaryDirectory(prefix="wafer-model-")
            registered = fetch_registered(text, into=Path(folder.name), tracking_uri=tracking_uri)
            name = f"{registered.name} version {registered.version}"
            predictor = cls(registered.file, threads=threads, name=name, provider=provider)
        except ValueError as error:
            raise error if isinstance(error, ModelError) else ModelError(str(error)) from error
        predictor._keep = folder  # the files stay as long as the predictor
        return predictor

    @property
    def folder(self) -> Path:
        """Where the file lies, and what is kept beside it."""
        return self.path.parent

    @cached_property
    def sha256(self) -> str:
        """The file's digest, by which a model is known for sure."""
        with self.path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def predict(self, maps: Sequence[np.ndarray], *, coverage: float = DEFAULT_COVERAGE) -> Answers:
        """Class, probabilities and prediction set of raw die maps, each uint8 [rows, columns]; sizes may differ.

        Args:
            maps: with 0 no die, 1 pass, 2 fail.
            coverage: how often the sets shall hold the true class, 0.50 to 0.99.

        Raises:
            ModelError: the file can be opened but gives no answer.
            ValueError: a map is empty, not uint8, not two-dimensional, or has values other than 0, 1 and 2; or there
                are no sets of this coverage.
        """
        probabilities = self.probabilities(maps)
        sets = None if self.sets is None else self.sets.sets(probabilities, coverage)
        return Answers(self.class_names, probabilities, sets, coverage)

    def probabilities(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """Class probabilities float32 [N, C] alone; see `predict`."""
        out = np.empty((len(maps), len(self.class_names)), dtype=np.float32)
        for some, batch in batches_of_one_size(maps):
            out[some] = self._checked(self._run(self._session, ["probabilities"], batch)[0], batch)
        return out

    def outputs(self, maps: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 [N, C] and the network's features float32 [N, F], before its last layer.

        Raises:
            ValueError: as `predict`; or the file does not say where its features are.
        """
        probabilities, features = np.empty((len(maps), len(self.class_names)), dtype=np.float32), None
        for some, batch in batches_of_one_size(maps):
            answer, found = self._run(self._with_features, None, batch)
            probabilities[some] = self._checked(answer, batch)
            features = np.empty((len(maps), found.shape[1]), dtype=np.float32) if features is None else features
            features[some] = found
        return probabilities, np.empty((0, 0), np.float32) if features is None else features

    @cached_property
    def _with_features(self) -> Any:
        """A session whose second output is the tensor that the file names as its features."""
        import onnx

        if "features" not in self.about:
            raise ValueError(f"{self.path} does not say where its features are. Export the model anew.")
        model = self.graph()
        model.graph.output.append(onnx.ValueInfoProto(name=self.about["features"]))
        return self.open(model.SerializeToString())

    def graph(self) -> onnx.ModelProto:
        """The file's graph, to be looked into or changed.

        Raises:
            ModelError: the file is in ONNX Runtime's own format, which nobody else reads.
        """
        import onnx

        if self.path.suffix == ".ort":
            raise ModelError(f"{self.path} gives answers alone; to look into a model takes its .onnx file.")
        return onnx.load(self.path)

    def open(self, model: Path | bytes) -> Any:
        """A session of ONNX Runtime with this predictor's threads, of a file or a graph made of it.

        Raises:
            ModelError: the provider is not there, or does not start.
            ValueError: ONNX Runtime does not take it.
        """
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its Linux builds would collect, too
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads or usable_cores()
        options.log_severity_level = 3  # its warnings are for those who write graphs
        wanted, there = PROVIDERS[self._provider], onnxruntime.get_available_providers()
        if wanted[0] not in there:
            raise ModelError(
                f"--provider {self._provider}: this ONNX Runtime has {', '.join(there)}. Install onnxruntime-gpu in "
                "its place, with the CUDA that it was made for, or leave the flag out."
            )
        try:
            session = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=wanted
            )
        except Exception as error:  # ONNX Runtime has many kinds; each means that this file cannot be used
            raise self._unusable(error) from error
        if (took := session.get_providers()[0]) != wanted[0]:  # it falls back without a word
            raise ModelError(
                f"--provider {self._provider} does not start here: ONNX Runtime took {took} in its place. Look whether "
                "the driver and the libraries are those it was made for, or leave the flag out."
            )
        return session

    def _run(self, session: Any, outputs: Sequence[str] | None, batch: np.ndarray) -> Any:
        """Raises ModelError where a file that could be opened cannot answer: others may have made it, for mischief."""
        try:
            return session.run(outputs, {"maps": batch})
        except Exception as error:  # of the many kinds that ONNX Runtime has
            raise ModelError(
                f"{self.path} gives no answer to {len(batch)} maps of {batch.shape[1]}x{batch.shape[2]} "
                f"({_reason(error)}). Export the model anew, or make room in the memory."
            ) from error

    def _checked(self, answer: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Raises ModelError unless each map of a batch has a probability for each class."""
        wanted = (len(batch), len(self.class_names))
        if answer.shape != wanted or not np.isfinite(answer).all():
            what = f"{answer.shape}" if answer.shape != wanted else "no numbers"
            raise ModelError(
                f"{self.path} answers {what} to {len(batch)} maps, where {wanted} probabilities are wanted. Export the "
                "model anew."
            )
        return answer

    def _unusable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} is no exported classifier ({_reason(error)}). Export the model anew.")


def _distinct_names(names: Any) -> tuple[str, ...]:
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and len({*names}) == len(names)):
        raise ValueError("its classes have no names of their own")
    return tuple(names)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_map(one: np.ndarray, what: str) -> None:
    """Raises ValueError, which calls the map `what`, unless it is uint8 [rows, columns] of 0, 1 and 2."""
    if 0 in one.shape:
        raise ValueError(f"{what} is {one.shape}, without a die. Wanted: at least one row and one column.")
    if one.ndim != 2 or one.dtype != np.uint8 or one.max(initial=0) > 2:
        raise ValueError(
            f"{what} is {one.dtype} {one.shape} with values up to {one.max(initial=0)}. Wanted: uint8 [rows, columns] "
            "with 0 no die, 1 pass, 2 fail."
        )


def batches_of_one_size(maps: Sequence[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray]]:
    """The places of maps of one size and the maps, uint8 [n, rows, columns], as many as are answered together."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(maps):
        check_map(one, f"map {i}")
        by_size.setdefault(one.shape, []).append(i)
    for (rows, columns), members in by_size.items():
        at_once = max(1, min(256, DIES_AT_ONCE // (rows * columns)))
        for start in range(0, len(members), at_once):
            some = members[start : start + at_once]
            yield some, np.stack([maps[i] for i in some])
