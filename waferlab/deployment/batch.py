"""Many maps: they stream in, rows stream out, and in the end stand counts, pictures and, with labels, scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from waferlab.data.streaming import MapChunk, MapStream, stream_wafer_maps
from waferlab.deployment.answer_files import answer_file, check_name
from waferlab.deployment.predictor import Answers, Predictor
from waferlab.deployment.progress import counting
from waferlab.deployment.tallies import Example, Tallies
from waferlab.errors import DataError, UserError, printable

FLATTERED = "On maps that the model was trained or tuned on, these figures flatter it: only lots new to it tell."


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What shall be made of the answers.

    Attributes:
        output: .csv, .parquet or .jsonl; all else is written beside it.
        coverage: that the prediction sets promise, 0.50 to 0.99.
        image_levels: as in `reading.load_wafer_maps`.
        report: compare with the labels.
        explain: draw what the model looked at.
        monitor: say whether the maps are like those that the model was validated on.
        tracking_uri: where the monitor keeps its figures.
    """

    output: Path
    coverage: float = 0.9
    image_levels: str = "auto"
    report: bool = False
    explain: bool = False
    monitor: bool = False
    tracking_uri: str | None = None

    def beside(self, ending: str) -> Path:
        """The path of another file about the same answers."""
        return self.output.with_name(f"{self.output.stem}_{ending}")


def check_coverage(predictor: Predictor, coverage: float) -> None:
    """Raises UserError if the model's sets cannot promise this."""
    try:
        if predictor.sets is not None:
            predictor.sets.floors_at(coverage)
    except ValueError as error:
        raise UserError(f"--coverage: {error}") from error


def answer_maps(predictor: Predictor, source: str, *, options: BatchOptions, console: Console, quiet: bool) -> None:
    """Answers all maps of a source, writes rows, summary and pictures, and prints what there is to know.

    Args:
        predictor: that answers.
        source: as `stream_wafer_maps` takes it.
        options: what shall be made of the answers.
        console: where to print.
        quiet: the outcome only.

    Raises:
        UserError, RunError: a file cannot be read or written; rows written so far are kept as `<output>.partial`.
    """

    def show(text: str) -> None:
        console.print(printable(text), soft_wrap=True, markup=False, emoji=False)

    def say(text: str) -> None:
        if not quiet:
            show(text)

    check_name(options.output)
    check_coverage(predictor, options.coverage)
    stream = stream_wafer_maps(source, image_levels=options.image_levels, say=say)
    if options.report:
        _check_labels(stream, predictor)
    _check_model(predictor, options)
    say(f"{stream.source}: {stream.total:,} maps, answered by {predictor.name}")
    for note in (*stream.notes, *([] if predictor.sets else ["The model has no prediction sets: none are given."])):
        say(f"  {note}")
    started = time.monotonic()
    tallies = stream_answers(predictor, stream, options=options, console=console, say=say, quiet=quiet)
    seconds = time.monotonic() - started
    summary = _summary(predictor, stream, tallies, options=options, seconds=seconds)
    predictions = tallies.predictions() if options.report else None
    if options.report and predictions is None:
        show("No labelled map was answered: there is no report.")
    if predictions is not None:
        summary["report"] = _scores(predictor, predictions, options.coverage)
    written = _write(summary, tallies.least_certain, predictions, options)
    _print(summary, console)
    if options.explain:
        from waferlab.deployment.explain import explain_maps

        some = tallies.examples()
        written += explain_maps(
            predictor, [one.wafer_map for one in some], names=[f"map {one.title}" for one in some],
            folder=options.beside("explained"),
        )  # fmt: skip
    if options.monitor:
        from waferlab.monitoring.batch import monitor_batch

        folder, uri = options.output.parent, options.tracking_uri  # its verdict is an outcome, quiet or not
        levels = options.image_levels
        written.append(
            monitor_batch(predictor, source, output_dir=folder, tracking_uri=uri, say=show, image_levels=levels)
        )
    show(f"Written: {', '.join(map(str, written))}")


def stream_answers(
    predictor: Predictor,
    stream: MapStream,
    *,
    options: BatchOptions,
    console: Console,
    say: Callable[[str], None],
    quiet: bool = False,
) -> Tallies:
    """Writes a row for each map and says the first answer as soon as it is there; returns the counts."""
    tallies = Tallies(predictor.class_names, labelled=options.report)
    with answer_file(options.output, predictor.class_names) as file:
        answered = _answered(predictor, stream, options.coverage)
        first = _until_an_answer(answered)
        if not len(first[-1][1]):
            raise DataError(f"{stream.source}: no map of it can be answered: all have values other than 0 to 2.")
        say(_in_words(*first[-1]))
        with counting(console, stream.total, quiet=quiet) as done:
            for chunk, answers in chain(first, answered):
                file.write(chunk, answers)
                tallies.add(chunk, answers)
                done(tallies.maps + tallies.left_out)
    return tallies


def _answered(predictor: Predictor, stream: MapStream, coverage: float) -> Iterator[tuple[MapChunk, Answers]]:
    for chunk in stream:
        yield chunk, predictor.predict(chunk.maps, coverage=coverage)


def _until_an_answer(answered: Iterator[tuple[MapChunk, Answers]]) -> list[tuple[MapChunk, Answers]]:
    """The first chunks, up to one that holds a map: a reader may have left out all maps of a chunk."""
    first = [next(answered)]
    while not len(first[-1][1]) and (more := next(answered, None)):
        first.append(more)
    return first


def _in_words(chunk: MapChunk, answers: Answers) -> str:
    """The answer to the first of some maps."""
    lot, among = f" of lot {chunk.lots[0]}" if chunk.lots[0] else "", answers.set_names()[0]
    text = f"First answer: map {chunk.ids[0]}{lot} is {answers.classes[0]} ({answers.probabilities[0].max():.0%})"
    if answers.sets is None:
        return text
    return f"{text}, set at {answers.coverage:.0%} coverage: {'|'.join(among) or 'empty'}"


def _check_model(predictor: Predictor, options: BatchOptions) -> None:
    """Raises ModelError if it has not what monitor and explain need, before hours of answers."""
    if options.monitor:
        from waferlab.monitoring.reference import Reference

        Reference.beside(predictor)
    if options.explain:
        from waferlab.deployment.explain import Explainer

        Explainer(predictor)


def _check_labels(stream: MapStream, predictor: Predictor) -> None:
    """Raises DataError if a report cannot be made."""
    names = stream.label_names()
    unknown = sorted({*names} - {*predictor.class_names})
    if not names:
        raise DataError(f"--report: {stream.source} has no labels to compare with. Leave out --report.")
    if unknown:
        raise DataError(
            f"--report: label {unknown[0]!r} of {stream.source} is no class of the model, which knows "
            f"{', '.join(predictor.class_names)}. Rename it in the file, or leave out --report."
        )


def _summary(
    predictor: Predictor, stream: MapStream, tallies: Tallies, *, options: BatchOptions, seconds: float
) -> dict[str, Any]:
    return {
        "source": stream.source,
        "notes": stream.notes,
        "model": {"name": predictor.name, "sha256": predictor.sha256},
        "coverage": None if predictor.sets is None else options.coverage,
        "answers": options.output.name,
        "maps": tallies.maps,
        "left_out": tallies.left_out,
        "seconds": seconds,
        "maps_per_second": tallies.maps / seconds,
        "classes": tallies.by_class(),
        "by_lot": tallies.by_lot(),
        "least_certain": [one.as_json() for one in tallies.least_certain],
    }


def _scores(predictor: Predictor, predictions: Any, coverage: float) -> dict[str, Any]:
    from waferlab.evaluation.conformal import evaluate_sets
    from waferlab.evaluation.metrics import compute_metrics

    sets = None if predictor.sets is None else evaluate_sets(predictor.sets, predictions, coverage)
    return {"note": FLATTERED, **compute_metrics(predictions), "sets": sets}


def _write(
    summary: dict[str, Any], least_certain: Sequence[Example], predictions: Any, options: BatchOptions
) -> list[Path]:
    """Writes the summary and the pictures; matplotlib is imported here, long after the first answer."""
    from waferlab.records import write_summary
    from waferlab.reports.run_figures import plot_confusion_matrix, plot_least_certain
    from waferlab.reports.tables import write_per_class_table

    has_sets = summary["coverage"] is not None
    captions = [(one.title, one.called, one.probability, one.set_text if has_sets else "") for one in least_certain]
    maps = [one.wafer_map for one in least_certain]
    written = [options.output, write_summary(options.beside("summary.json"), summary)]
    written.append(plot_least_certain(maps, captions, path=options.beside("least_certain.png")))
    if predictions is not None:
        written.append(plot_confusion_matrix(predictions, path=options.beside("confusion_matrix.png")))
        written.append(write_per_class_table(summary["report"], path=options.beside("per_class.csv")))
    return written


def _print(summary: dict[str, Any], console: Console) -> None:
    from waferlab.reports.batch_tables import class_table, lot_table, report_tables
    from waferlab.reports.columns import InColumns

    def say(text: str) -> None:
        console.print(printable(text), soft_wrap=True, markup=False, emoji=False)

    left = f", {summary['left_out']:,} left out for die values other than 0 to 2" if summary["left_out"] else ""
    say(f"{summary['maps']:,} maps in {summary['seconds']:.1f} s, {summary['maps_per_second']:,.0f} maps/s{left}")
    tables = [class_table(summary), *([lot_table(summary)] if summary["by_lot"]["lots"] else [])]
    for table in [*tables, *(report_tables(summary) if "report" in summary else [])]:
        console.print()
        console.print(InColumns(table))
        if table.note:
            say(table.note)
