"""A batch of maps from a file to a verdict: answered, compared with the validation part, written down."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waferlab.data.streaming import stream_wafer_maps
from waferlab.errors import ModelError
from waferlab.monitoring.class_mix import mix_with_intervals
from waferlab.monitoring.drift import ALARM, NO_ALARM, PERMUTATIONS, Drift, compare
from waferlab.monitoring.page import write_batch_page
from waferlab.monitoring.reference import Reference, Sample, at_most
from waferlab.records import code_tags
from waferlab.reports.tables import p_value
from waferlab.tracking.addresses import command_line_used
from waferlab.tracking.runs import RunTree

if TYPE_CHECKING:
    from waferlab.deployment.predictor import Predictor

MOST_MAPS = 20_000  # of a batch that are compared


@dataclass(frozen=True, eq=False)
class Batch:
    """Maps that were answered.

    Attributes:
        sample: at most `MOST_MAPS` of them, of all lots while these are no more.
        lot_names: of the lots 0, 1, ..., those that are not in the sample among them.
        maps: how many there were.
        source: where they come from, for people.
    """

    sample: Sample
    lot_names: tuple[str, ...]
    maps: int
    source: str


def monitor_batch(
    predictor: Predictor, source: str, *, output_dir: Path, tracking_uri: str | None, say: Callable[[str], None],
    image_levels: str = "auto",
) -> Path:  # fmt: skip
    """Says whether a batch is like what the model was validated on: printed, as an HTML page, as an MLflow run.

    Args:
        predictor: with a `reference.npz` beside its file.
        source: of maps, with lots or without; labels are not looked at.
        output_dir: where `monitoring_<source>.html` goes.
        tracking_uri: of MLflow; None for `mlflow.db` in `output_dir`.
        say: prints a line.
        image_levels: how images are read, see `stream_wafer_maps`.

    Returns:
        The page.

    Raises:
        DataError: the maps cannot be read.
        ModelError: the model has no reference, or its file does not say where its features are.
    """
    reference = Reference.beside(predictor)
    batch = read_batch(predictor, source, image_levels=image_levels)
    record = batch_record(predictor, reference, batch, compare(reference, batch.sample))
    for line in in_lines(record):
        say(line)
    page = output_dir / f"monitoring_{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(batch.source).stem) or 'batch'}.html"
    write_batch_page(record, reference, batch.sample, path=page)
    say(f"Page: {page}")
    _track(record, page, folder=output_dir, uri=tracking_uri, say=say)
    return page


def read_batch(predictor: Predictor, source: str, *, image_levels: str = "auto") -> Batch:
    """Answers the maps of a source, a chunk at a time; of all chunks alike, some are kept.

    Raises:
        DataError: the maps cannot be read.
        ModelError: the model's file does not say where its features are.
    """
    rng = np.random.default_rng(0)
    numbers: dict[str, int] = {}
    names: list[str] = []
    kept: Sample | None = None
    places, total = np.empty(0, np.int64), 0  # where those that are kept stood among all
    keys, lots_of_all = [], []
    for maps, lots in _chunks(source, image_levels):
        try:
            some = Sample.of(predictor, maps, _numbered(lots, numbers, names))
        except ValueError as error:
            raise ModelError(str(error)) from error
        kept = some if kept is None else Sample.joined([kept, some])
        places, total = np.append(places, total + np.arange(len(maps))), total + len(maps)
        keys.append(rng.random(len(maps)))
        lots_of_all.append(some.lots)
        if len(kept) > 2 * MOST_MAPS:
            left = np.isin(places, at_most(np.concatenate(lots_of_all), MOST_MAPS, np.concatenate(keys)))
            kept, places = kept.select(left), places[left]
    assert kept is not None  # a source without a map is refused where it is read
    every_lot = np.concatenate(lots_of_all)
    kept = kept.select(np.isin(places, at_most(every_lot, MOST_MAPS, np.concatenate(keys)))).standing_for(every_lot)
    return Batch(kept, tuple(names), total, Path(source).name)


def _chunks(source: str, image_levels: str) -> Iterator[tuple[Sequence[np.ndarray], Sequence[str]]]:
    """Maps, each uint8 [rows, columns], and the name of each one's lot, "" where it is not known."""
    for chunk in stream_wafer_maps(source, image_levels=image_levels):
        if chunk.maps:
            yield chunk.maps, chunk.lots


def _numbered(lots: Sequence[str], numbers: dict[str, int], names: list[str]) -> np.ndarray:
    """int64 [N], a number for each lot, its place in `names`; a map of unknown lot is a lot of its own."""
    found = np.empty(len(lots), dtype=np.int64)
    for i, lot in enumerate(lots):
        if not lot or lot not in numbers:
            numbers[lot] = len(names)
            names.append(lot or "unknown")
        found[i] = numbers[lot]
    return found


# What is found, as a record


def batch_record(predictor: Predictor, reference: Reference, batch: Batch, drift: Drift) -> dict[str, Any]:
    """What page, run and terminal say, as plain values."""
    sample, kept = batch.sample, reference.sample
    likelihoods = reference.calibration.likelihoods(sample.probabilities)
    mix, bounds = mix_with_intervals(likelihoods, sample.lots, sample.weights)
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_line_used(),
        "model": {"name": predictor.name, "kind": _kind(predictor), "sha256": predictor.sha256},
        "data": {"source": batch.source, "maps": batch.maps, "compared": len(sample), "lots": len(batch.lot_names)},
        "reference": {"maps": len(kept), "lots": drift.reference_lots},
        "permutations": PERMUTATIONS,
        "verdict": drift.verdict,
        "headline": _headline(drift, batch),
        "caveats": list(drift.caveats),
        "signals": [asdict(one) | {"name": one.name, "alarms": one.alarms} for one in drift.signals],
        "columns": [asdict(one) | {"name": one.key, "alarms": one.alarms} for one in drift.columns],
        "mix": [
            {"name": name, "reference": float(share), "estimated": float(mix[i]),
             "interval": None if bounds is None else bounds[i].tolist()}
            for i, (name, share) in enumerate(zip(reference.class_names, reference.shares, strict=True))
        ],
        "density": {"batch": sample.median_density(), "reference": kept.median_density()},
        "new_grids": _new_grids(kept, batch),
        "odd_lots": [
            {"lot": batch.lot_names[lot], "maps": round(float(sample.weights[sample.lots == lot].sum())),
             "distance": far, "beyond": share}
            for lot, far, share in drift.odd_lots
        ],
    }  # fmt: skip


def _kind(predictor: Predictor) -> str:
    """What all versions of a model are called; names the experiment."""
    registered = predictor.name.split(" version ")[0]
    return predictor.about.get("model_type", "model") if registered.endswith(".onnx") else registered


def _headline(drift: Drift, batch: Batch) -> str:
    lots = len(batch.lot_names)
    what = f"{batch.maps:,} maps of {lots:,} lot{'' if lots == 1 else 's'}"
    if drift.verdict == ALARM:
        why = [f"{one.name.lower()} (p {_as_p(one.p_corrected)})" for one in drift.signals if one.alarms]
        differs = f"What differs: {', '.join(why)}."
        return f"Alarm: these {what} are not like the maps that the model was validated on. {differs}"
    if drift.verdict == NO_ALARM:
        return f"No alarm: nothing tells these {what} from the maps that the model was validated on."
    return f"No verdict on these {what}: too few lots to tell a change from the difference between any two lots."


def _as_p(p: float | None) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _new_grids(reference: Sample, batch: Batch, *, most: int = 8) -> list[str]:
    """Die grids of the batch that no map of the reference has, the commonest first, with their number of maps."""
    known, sample = set(map(tuple, reference.grids.tolist())), batch.sample
    weights = sample.weights * (batch.maps / sample.weights.sum())  # of lots that were given up, too
    counts: Counter[tuple[int, int]] = Counter()
    for grid, weight in zip(map(tuple, sample.grids.tolist()), weights.tolist(), strict=True):
        if grid not in known:
            counts[grid] += weight
    rest = f"{len(counts) - most} more" if len(counts) > most else ""
    listed = [f"{rows} x {columns} ({n:,.0f})" for (rows, columns), n in counts.most_common(most)]
    return [*listed, *([rest] if rest else [])]


def in_lines(record: dict[str, Any]) -> list[str]:
    """The verdict for a terminal."""
    lines = [record["headline"]]
    for one in record["signals"]:
        mark = "ALARM" if one["alarms"] else "ok" if one["p"] is not None else "-"
        usual = (
            ""
            if one["usual"] is None
            else f", usual up to {one['usual']:.3f}, corrected p {p_value(one['p_corrected'])}"
        )
        lines.append(f"  {mark:<6}{one['name']}: {one['effect']:.3f}{usual}")
    shares = sorted(record["mix"], key=lambda one: -one["estimated"])[:3]
    text = ", ".join(f"{one['name']} {one['estimated']:.1%} (validation {one['reference']:.1%})" for one in shares)
    return [*lines, f"  Estimated class mix: {text}", *(f"  {caveat}" for caveat in record["caveats"])]


def _track(record: dict[str, Any], page: Path, *, folder: Path, uri: str | None, say: Callable[[str], None]) -> None:
    """One run in an experiment of its own."""
    data, model = record["data"], record["model"]
    runs = RunTree(
        f"{model['kind']}_monitoring", uri=uri, folder=folder, warn=say,
        tags={"mlflow.source.name": "predict.py", **code_tags()},
    )  # fmt: skip
    with runs.closing():
        run = runs.start(data["source"], tags={"verdict": record["verdict"], "model": model["name"]})
        runs.params(
            run, source=data["source"], maps=data["maps"], lots=data["lots"], model=model["name"],
            model_sha256=model["sha256"], reference_maps=record["reference"]["maps"],
            reference_lots=record["reference"]["lots"],
        )  # fmt: skip
        values = {
            f"{one['key']}.{what}": one[what] for one in record["signals"] for what in ("effect", "p", "p_corrected")
        }
        values |= {f"mix.{one['name']}": one["estimated"] for one in record["mix"]}
        values["alarm"] = float(record["verdict"] == ALARM)
        runs.metrics(run, {name: value for name, value in values.items() if value is not None})
        runs.note(run, record["headline"])
        runs.files(run, [page])
