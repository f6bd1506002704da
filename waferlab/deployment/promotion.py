"""Which model `models:/<name>@champion` names: the gate between a trained model and the registry.

A trained model becomes a file; the file must answer as the checkpoint did that was scored; then it is registered. It
becomes champion only if it beats the present one on test maps that neither of the two was trained or tuned on, by the
lower bound of an interval. Else it is challenger, and the reason stands in the version's description.

For this each version keeps digests of the maps that it has seen (`MapsSeen`). `judge` is the rule alone and needs no
registry; `promote` does the whole.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from waferlab.data.maps import WaferMaps, pack_maps
from waferlab.data.npz import read_npz
from waferlab.data.splitting import Split
from waferlab.deployment.predictor import Predictor
from waferlab.evaluation.metrics import compare_macro_f1, compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.tracking.registry import Champion, ModelVersion
from waferlab.tracking.runs import Run, RunTree

FEWEST_LOTS = 6  # the fewest at which benchmarks/interval_coverage.py has measured the paired interval
# Between the file's probabilities and the checkpoint's: two ways to compute one network, whose preprocessing is exact,
# differ by some 1e-6.
MAX_DIFFERENCE = 1e-4
MAPS_SEEN = "maps_seen.npz"  # beside the model, in the version's folder `extra_files`
MAX_DIGESTS = 20_000_000  # in such a file; WM-811K has 811,457 maps


@dataclass(frozen=True)
class Promotion:
    """A model that is in the registry.

    Attributes:
        name: of the registered model.
        version: its number there.
        alias: "champion" or "challenger"; None for a version that was registered before and has neither any more.
        uri: by which MLflow loads it.
        verdict: why it is what it is, in sentences.
        comparison: with the champion, as `compare_macro_f1` gives it; None if there was none.
        maps_compared: maps on which the comparison was made.
        test_macro_f1: of the file, on the whole test part.
        largest_difference_to_checkpoint: between the file's probabilities and the checkpoint's, over the test part.
    """

    name: str
    version: str
    alias: str | None
    uri: str
    verdict: str
    comparison: dict[str, Any] | None
    maps_compared: int
    test_macro_f1: float
    largest_difference_to_checkpoint: float

    def in_summary(self) -> dict[str, Any]:
        """What a run's summary says of it."""
        return {"registered": asdict(self), "not_registered_because": None}

    def __str__(self) -> str:
        return f"Registered as {self.uri}, version {self.version}. {self.verdict}"


@dataclass(frozen=True)
class NotRegistered:
    """Nothing was registered.

    Attributes:
        reason: why.
        file: of the exported model, if it answers as the checkpoint does.
    """

    reason: str
    file: Path | None = None

    def in_summary(self) -> dict[str, Any]:
        """What a run's summary says of it; the file is named as it is called beside the checkpoint."""
        name = None if self.file is None else self.file.name
        return {"registered": None, "not_registered_because": self.reason, "model_file": name}

    def __str__(self) -> str:
        return f"Not registered: {self.reason}" + (f". The exported file: {self.file}" if self.file else "")


@dataclass(frozen=True)
class MapsSeen:
    """Digests, uint64 [N], of the maps behind a version; they tell whether a map is among them and nothing else.

    Attributes:
        fitted: of the maps that it was trained and tuned on: the training and the validation part.
        tested: of its test part.
    """

    fitted: np.ndarray
    tested: np.ndarray

    @classmethod
    def of(cls, maps: WaferMaps, split: Split) -> MapsSeen:
        """Those of a model that was trained on this split."""
        digests = maps.digests()
        return cls(np.unique(digests[np.concatenate([split.train, split.validation])]), np.unique(digests[split.test]))

    @property
    def test_part(self) -> str:
        """A fingerprint of the test part, the same for the same maps in any order."""
        return hashlib.sha256(self.tested.astype("<u8").tobytes()).hexdigest()[:16]

    def save(self, path: Path) -> Path:
        """Writes an .npz; with it the digest of a known map, which shows whether both were made in the same way."""
        np.savez(path, fitted=self.fitted, tested=self.tested, probe=_probe())
        return path

    @classmethod
    def load(cls, path: Path) -> MapsSeen:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is damaged, too large, or its digests are not of today's kind.
        """
        try:
            with zipfile.ZipFile(path) as members:
                if sum(member.file_size for member in members.infolist()) > 8 * MAX_DIGESTS:
                    raise ValueError(f"it has more than {MAX_DIGESTS:,} digests")
            found = read_npz(path, ("fitted", "tested", "probe"))
            arrays = {name: found[name] for name in ("fitted", "tested", "probe")}
        except Exception as error:  # zipfile has kinds of its own for a damaged file
            raise ValueError(f"{path.name} cannot be read ({_in_a_line(error)})") from error
        if any(array.dtype != np.uint64 or array.ndim != 1 for array in arrays.values()):
            raise ValueError(f"{path.name} holds no digests, uint64 [N]")
        if not np.array_equal(arrays["probe"], _probe()):
            raise ValueError(f"{path.name} was written when digests of maps were made in another way")
        return cls(arrays["fitted"], arrays["tested"])


@cache
def _probe() -> np.ndarray:
    return pack_maps([np.array([[0, 1, 2], [1, 1, 0]], dtype=np.uint8)], np.zeros(1, int), source="probe").digests()


@dataclass(frozen=True)
class Judgement:
    """What a new model becomes, why, and the comparison that says so (None where none could be made)."""

    alias: str
    because: str
    comparison: dict[str, Any] | None = None
    maps_compared: int = 0


class CannotCompareError(ValueError):
    """A new model cannot be compared with the champion."""


def judge(new: Predictions, old: Predictions, *, fair: np.ndarray, champion: str, looks: int = 0) -> Judgement:
    """Champion or challenger: the new model must beat the old one by the lower bound of the 95% interval.

    Args:
        new: the new file's answers on its test part.
        old: the champion's, on the same maps.
        fair: bool [N], True for the maps that neither of the two was trained or tuned on; only they count.
        champion: the champion's version.
        looks: how many earlier versions were compared on this test part. Each look makes a win by chance likelier.

    Raises:
        CannotCompareError: too few lots are left, or a class of the test part has no map among those left.
    """
    lots = len(np.unique(new.groups[fair]))
    neither = "test maps that neither was trained or tuned on"
    if lots < FEWEST_LOTS:
        raise CannotCompareError(
            f"only {int(fair.sum()):,} of {len(fair):,} are {neither}, from {lots} lots, and an interval needs "
            f"{FEWEST_LOTS} lots"
        )
    gone = [new.class_names[label] for label in np.setdiff1d(new.labels, new.labels[fair])]
    if gone:
        raise CannotCompareError(f"no map of {', '.join(gone)} is among the {int(fair.sum()):,} {neither}")
    comparison = compare_macro_f1(_of(new, fair), _of(old, fair))
    low, high = comparison["interval"]
    alias, how = ("champion", "is above") if low > 0 else ("challenger", "is not above")
    because = (
        f"On {int(fair.sum()):,} {neither}, of {lots} lots, it reaches macro F1 {comparison['new']:.4f} against "
        f"{comparison['old']:.4f} of version {champion}, the champion until then: {comparison['difference']:+.4f} (95% "
        f"interval {low:+.4f} to {high:+.4f}, paired over lots). {_asked(looks)} The lower bound {how} 0, so it is "
        f"{alias}."
    )
    return Judgement(alias, because, comparison, int(fair.sum()))


def _of(predictions: Predictions, chosen: np.ndarray) -> Predictions:
    return replace(
        predictions,
        probabilities=predictions.probabilities[chosen],
        labels=predictions.labels[chosen],
        groups=predictions.groups[chosen],
    )


def _asked(looks: int) -> str:
    if looks == 0:
        return "This test part has not decided before."
    return f"This test part has decided {looks} time{'s' if looks > 1 else ''} before: a win by chance gets likelier."


class _RefusedError(Exception):
    """Nothing will be registered; the message says why."""


@contextmanager
def _or_refuse(step: str) -> Iterator[None]:
    """Whatever goes wrong in a step becomes the reason why nothing is registered, by its kind and its message."""
    try:
        yield
    except _RefusedError:
        raise
    except Exception as error:
        raise _RefusedError(f"{step} failed ({_in_a_line(error)})") from error


@dataclass(frozen=True)
class _Candidate:
    """An exported file that answers as its checkpoint does, and what it answers on the test part."""

    file: Path
    beside: list[Path]
    sha256: str
    answers: Predictions
    test_macro_f1: float
    largest_difference_to_checkpoint: float

    def figures(self) -> dict[str, float]:
        return {
            "test_macro_f1": self.test_macro_f1,
            "largest_difference_to_checkpoint": self.largest_difference_to_checkpoint,
        }


def promote(
    export: Callable[[], Sequence[Path]],
    *,
    checkpoint: Predictions,
    maps: WaferMaps,
    split: Split,
    model_type: str,
    name: str,
    tracking: RunTree,
    run: Run | None,
    run_key: str,
    only_exported_because: str | None = None,
) -> Promotion | NotRegistered:
    """Exports a model, checks the file against the checkpoint and registers it as champion or challenger.

    A file that is registered already is not registered again, as when a run is resumed.

    Args:
        export: writes the model as an ONNX file (`deployment.export_onnx`) and what shall be kept beside it; returns
            their paths, that of the model first.
        checkpoint: what the checkpoint answers on the test part.
        maps: all maps of the run.
        split: its three parts.
        model_type: what the model is called.
        name: of the registered model.
        tracking: with the registry.
        run: that the model was trained in; still open.
        run_key: by which a resumed run is known.
        only_exported_because: why it shall not be registered, if so.

    Returns:
        What it became; or, whatever failed, a sentence that says why it is not registered.
    """
    test_maps, candidate = [maps[i] for i in split.test], None
    try:
        candidate = _export_and_check(export, checkpoint, test_maps)
        if only_exported_because:
            raise _RefusedError(only_exported_because)
        with _or_refuse("asking the registry"):
            versions = tracking.versions(name)
        for one in reversed(versions):
            if one.tags.get("file_sha256") == candidate.sha256 and one.is_whole:
                return _registered_before(one, name, candidate)
        with _or_refuse("the comparison with the champion"), tempfile.TemporaryDirectory() as folder:
            seen = MapsSeen.of(maps, split)
            champion = tracking.champion(name, into=Path(folder))
            judgement = _judge(
                candidate.answers, champion, test_maps, maps.digests()[split.test], seen,
                looks=_looks_at(seen.test_part, versions),
            )  # fmt: skip
        verdict = f"{model_type}: this file reaches test macro F1 {candidate.test_macro_f1:.4f} on {len(test_maps):,} "
        verdict += f"maps. {judgement.because}"
        with _or_refuse("the registration"), tempfile.TemporaryDirectory() as folder:
            version, alias, verdict = tracking.register(
                run,
                candidate.file,
                name=name,
                about=_about(checkpoint.class_names),
                alias=judgement.alias,
                description=verdict,
                tags={
                    "file_sha256": candidate.sha256,
                    "test_part": seen.test_part,
                    "maps_compared": str(judgement.maps_compared),
                    "run_key": run_key,
                },
                beside=[seen.save(Path(folder) / MAPS_SEEN), *candidate.beside],
                example=test_maps[0][None],
                classes=len(checkpoint.class_names),
                instead_of=champion and champion.version,
            )
    except _RefusedError as refused:
        return NotRegistered(str(refused), candidate and candidate.file)
    if alias == "challenger" and (judgement.comparison is None or judgement.alias == "champion"):
        verdict += f" To make it champion all the same: {_by_hand(name, version)}"
    return Promotion(
        name=name,
        version=version,
        alias=alias,
        uri=f"models:/{name}@{alias}",
        verdict=verdict,
        comparison=judgement.comparison,
        maps_compared=judgement.maps_compared,
        **candidate.figures(),
    )


def _export_and_check(
    export: Callable[[], Sequence[Path]], checkpoint: Predictions, test_maps: list[np.ndarray]
) -> _Candidate:
    with _or_refuse("the export"):
        file, *beside = export()
    with _or_refuse("running the exported file on the test maps"):
        classifier = Predictor(file)
        if classifier.class_names != checkpoint.class_names:
            raise _RefusedError(
                f"the exported file names the classes {', '.join(classifier.class_names)}, the checkpoint "
                f"{', '.join(checkpoint.class_names)}"
            )
        answers = replace(checkpoint, probabilities=classifier.probabilities(test_maps))
        apart = _difference(answers, checkpoint, test_maps)
        score = compute_metrics(answers)["macro_f1"]
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return _Candidate(file, beside, sha256, answers, score, apart)


def _difference(answers: Predictions, checkpoint: Predictions, test_maps: list[np.ndarray]) -> float:
    """The largest between the file's probabilities and the checkpoint's; refuses more than `MAX_DIFFERENCE`.

    Within that, the two name different classes only for a map whose likeliest classes tie.
    """
    differences = np.abs(answers.probabilities - checkpoint.probabilities).max(1)
    worst = int(differences.argmax())
    if differences[worst] <= MAX_DIFFERENCE:
        return float(differences[worst])
    moved = int((answers.predicted != checkpoint.predicted).sum())
    rows, columns = test_maps[worst].shape
    raise _RefusedError(
        f"the exported file does not answer as its checkpoint. Probabilities differ by up to {differences[worst]:.2g}, "
        f"on test map {worst} ({rows}x{columns} dies); {MAX_DIFFERENCE:g} is allowed. {moved:,} of {len(test_maps):,} "
        "test maps get another class. The checkpoint is as good as reported; do not use the file"
    )


def _looks_at(test_part: str, versions: list[ModelVersion]) -> int:
    return sum(v.tags.get("test_part") == test_part and v.tags.get("maps_compared", "0") != "0" for v in versions)


def _judge(
    new: Predictions,
    champion: Champion | None,
    test_maps: list[np.ndarray],
    digests: np.ndarray,
    seen: MapsSeen,
    *,
    looks: int,
) -> Judgement:
    """`judge` with the champion as it lies in its folder; whatever stands against a comparison makes a challenger."""
    if champion is None:
        return Judgement("champion", "There was no champion, so it is champion.")
    try:
        old, theirs = _champions_answers(champion, new, test_maps)
        fair = ~np.isin(digests, np.concatenate([seen.fitted, theirs.fitted]))
        return judge(new, old, fair=fair, champion=champion.version, looks=looks)
    except CannotCompareError as error:
        return Judgement(
            "challenger",
            f"It cannot be compared with version {champion.version}, the champion: {error}. So it is challenger.",
        )


def _champions_answers(
    champion: Champion, new: Predictions, test_maps: list[np.ndarray]
) -> tuple[Predictions, MapsSeen]:
    """What the champion answers on the new model's test maps, and which maps it has seen."""
    if champion.problem:
        raise CannotCompareError(f"its files cannot be had ({champion.problem})")
    file, kept = next(champion.folder.glob("*.onnx"), None), champion.folder / "extra_files" / MAPS_SEEN
    if file is None:
        raise CannotCompareError("it has no ONNX file")
    if not kept.exists():
        raise CannotCompareError("it does not say which maps it was trained on")
    try:
        seen = MapsSeen.load(kept)
        classifier = Predictor(file)
        if classifier.class_names != new.class_names:
            raise ValueError(f"it tells {', '.join(classifier.class_names)} from each other")
        return replace(new, probabilities=classifier.probabilities(test_maps)), seen
    except Exception as error:  # a file of somebody else's: ONNX Runtime may refuse it, or our maps, in its own ways
        raise CannotCompareError(_in_a_line(error)) from error


def _registered_before(version: ModelVersion, name: str, candidate: _Candidate) -> Promotion:
    alias = next((alias for alias in ("champion", "challenger") if alias in version.aliases), None)
    verdict = f"This very file was registered before, as version {version.version}, and is not registered again."
    if alias is None:
        verdict += f" That version has neither alias. To make it champion: {_by_hand(name, version.version)}"
    return Promotion(
        name=name,
        version=version.version,
        alias=alias,
        uri=f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}",
        verdict=verdict,
        comparison=None,
        maps_compared=0,
        **candidate.figures(),
    )


def _by_hand(name: str, version: str) -> str:
    return f'mlflow.MlflowClient().set_registered_model_alias("{name}", "champion", "{version}")'


def _about(class_names: tuple[str, ...]) -> str:
    """What the registered model does, for its page."""
    return (
        "Names the defect pattern of wafer maps. In: `maps`, uint8 [N, rows, columns] of any size, 0 no die, 1 pass, 2 "
        f"fail. Out: `probabilities`, float32 [N, {len(class_names)}], of {', '.join(class_names)}."
    )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
