"""Records in; pictures, tables and pages out.

A record is a plain dict, as it is read from JSON: of `run_experiment.py --mode comparison` or `ablation`, or the
summary of a pipeline (`experiment_summary.json`). Nothing here trains, loads data or computes a score; what a page says
is in the record.

    plot_seed_comparison(record, path=folder / "seed_comparison.png")
    write_report(record, folder=folder, pictures=["seed_comparison.png"], path=folder / "report.html")
    write_model_card(summary, folder=folder)

A page is first put together as `Page`: sections of paragraphs, lists, tables, pictures and code. One template turns any
of them into HTML, one function into Markdown, so that both say the same. The HTML needs nothing but itself: styles are
inside, pictures are inside as base64, there is no script, and a content security policy forbids every request.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from waferlab.records import write_atomically
from waferlab.reports.tables import (
    Items,
    Record,
    Table,
    classes_table,
    counts_table,
    decision_table,
    differences_table,
    effect_bars,
    effects_table,
    models_table,
    offsets_table,
    pipeline_table,
    plain_markdown,
    runs_table,
    scores_table,
    search_table,
    table_markdown,
    values_table,
    variants_table,
    weights_items,
    what_bars_join,
)

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    path: Path
    caption: str

    def base64(self) -> str:
        """The file's content, for a `data:` address."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines to type."""

    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it; folded, it opens with a click."""

    heading: str
    blocks: Sequence[str | Items | Table | Picture | Code]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """Title, the verdict as lead, a line of facts, sections."""

    title: str
    lead: str
    facts: Sequence[str]
    sections: Sequence[Section]

    def to_html(self) -> str:
        """One page that needs nothing else; all text is escaped by the template engine."""
        template = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
        return template.get_template("page.html").render(page=self)

    def to_markdown(self) -> str:
        """The same in GitHub's Markdown, pictures by their file names."""
        parts = [f"# {plain_markdown(self.title)}", plain_markdown(self.lead), plain_markdown(" · ".join(self.facts))]
        for section in self.sections:
            parts += [f"## {plain_markdown(section.heading)}", *map(_block_markdown, section.blocks)]
        return "\n\n".join(part for part in parts if part) + "\n"


def _block_markdown(block: str | Items | Table | Picture | Code) -> str:
    match block:
        case Items():
            return "\n".join(f"- {plain_markdown(entry)}" for entry in block.entries)
        case Table():
            return table_markdown(block)
        case Picture():
            return f"![{plain_markdown(block.caption)}]({block.path.name})"
        case Code():
            return textwrap.indent(block.text, "    ")  # by indentation, since a text may hold a fence
    return plain_markdown(block)


def write_report(
    record: Record,
    *,
    folder: str | os.PathLike[str],
    pictures: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
) -> Path:
    """Writes the page of a comparison, an ablation, or a pipeline's run (any other mode) as one HTML file.

    Args:
        record: with its `mode`; a summary without one is a pipeline's run.
        folder: where the pictures are.
        pictures: names of PNG files in the folder, in the order in which they are shown.
        path: the HTML file to write, whole or not at all.

    Raises:
        FileNotFoundError: a picture is not in the folder.
    """
    files = [Path(folder) / picture for picture in pictures]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. Draw it before the report, or leave it out of `pictures`.")
    pages = {"comparison": _comparison_page, "ablation": _ablation_page}
    page = pages.get(record.get("mode"), _pipeline_page)(record, files)
    return write_atomically(path, page.to_html().encode())


def _comparison_page(record: Record, files: Sequence[Path]) -> Page:
    n_models, n_seeds = len(record["models"]), len(record["seeds"])
    sections = [Section("Result", [models_table(record)]), Section("Pictures", pictures_of(record, files))]
    if record["differences"]:
        sections.append(Section("Differences", [differences_table(record)]))
    sections += [data_section(record), Section("Every run", [runs_table(record)], folded=True)]
    title = f"Comparison of {counted(n_models, 'model')} over {counted(n_seeds, 'seed')}"
    return Page(title, record["verdict"], _facts(record), sections + _how_it_was_made(record))


def _ablation_page(record: Record, files: Sequence[Path]) -> Page:
    sections = [Section("Result", [variants_table(record)]), Section("Pictures", pictures_of(record, files))]
    if record["effects"]:
        sections.append(Section("Effects", [effects_table(record)]))
    sections += [data_section(record), Section("Every seed", [scores_table(record)], folded=True)]
    title = f"What each component brings to {record['model_type']}"
    return Page(title, record["verdict"], _facts(record), sections + _how_it_was_made(record))


def _pipeline_page(record: Record, files: Sequence[Path]) -> Page:
    models, best = record["models"], best_model(record)
    of_search = [file for file in files if file.stem.startswith("optuna_")]
    sections = [Section("Result", [pipeline_table(record), weights_items(models), *_registered(record)])]
    sections.append(Section("Pictures", pictures_of(record, [file for file in files if file not in of_search])))
    sections.append(Section(f"{best['model_type']}, class by class", [classes_table(best)]))
    decided, searched = ([model for model in models if model.get(key)] for key in ("decision", "search"))
    if decided:
        sections.append(Section("Decision rule", [decision_table(decided), offsets_table(decided)]))
    if searched:
        sections.append(Section("Search", [search_table(searched), *pictures_of(record, of_search)], folded=True))
    time_spent = Table(
        ("Phase", "Seconds"), [(phase, f"{seconds:.1f}") for phase, seconds in record["seconds"].items()]
    )
    sections += [data_section(record), Section("Time spent", [time_spent], folded=True)]
    title = record["experiment_name"] + (f": {record['mode']} run" if "mode" in record else "")
    return Page(title, record.get("verdict", ""), _facts(record), sections + _how_it_was_made(record))


def best_model(record: Record) -> Record:
    return next(model for model in record["models"] if model["model_type"] == record["best_model"])


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _facts(record: Record) -> list[str]:
    data = record["data"]
    facts = [
        record["created"].replace("T", " "),
        f"{counted(data['maps'], 'map')} in {counted(data['lots'], 'lot')} from {data['source']}",
    ]
    if "seeds" in record:
        facts.append(f"{'seed' if len(record['seeds']) == 1 else 'seeds'} {', '.join(map(str, record['seeds']))}")
    return facts + ([record["budget"]] if record.get("budget") else [])


def _registered(record: Record) -> list[str]:
    registered = record.get("registered")
    if not registered:
        return []
    return [f"Registered as {registered['uri']}, version {registered['version']}. {registered['verdict']}"]


def pictures_of(record: Record, files: Sequence[Path]) -> list[Picture]:
    return [Picture(file, _caption(record, file.stem)) for file in files]


def _caption(record: Record, stem: str) -> str:
    """What a picture shows and what its bars are; of a picture that is not ours, its name."""
    bars = _bars(record)
    captions = {
        "seed_comparison": f"Test macro F1. Each dot is one seed, the diamond their mean. Bars: {bars}.",
        "critical_difference": f"Models by mean test macro F1; {what_bars_join(record)}."
        if "differences" in record
        else "",
        "trade_offs": f"Mean test macro F1 against what it costs; dashed: models that no other beats. Bars: {bars}.",
        "ablation": "Left: what each component changes, alone and left out. Right: the score of each variant. "
        f"Bars on the left: {effect_bars(record) if 'effects' in record else ''}; on the right: {bars}.",
        "model_comparison": f"Test macro F1 and what it costs. Error bars: {bars}.",
        "confusion_matrix": "Test maps by true (row) and predicted class (column): counts and shares of the class.",
        "sample_predictions": "Test maps that the best model got right, and its most confident errors.",
        "training_history": "Loss and macro F1 after each epoch of the final training; stars: the best epochs.",
    }
    if stem.startswith("optuna_"):
        return f"The search: {stem.removeprefix('optuna_').replace('_', ' ')}."
    return captions.get(stem) or stem.replace("_", " ")


def _bars(record: Record) -> str:
    """What the intervals of a record's scores are."""
    scored = record.get("models" if record.get("mode") == "comparison" else "variants")
    if "interval_method" not in record or scored is None:
        return best_model(record)["test"]["interval_method"]
    return record["interval_method"] if any(one["interval"] for one in scored) else "none, since it takes several seeds"


def data_section(record: Record) -> Section:
    data = record["data"]
    entries = [
        f"Source: {data['source']}",
        f"{counted(data['maps'], 'map')} in {counted(data['lots'], 'lot')}",
        *data["notes"],
    ]
    entries.append("No lot, and no exact copy of a map, is in two of the parts: training, validation and test.")
    entries.append("Validation steers training and choices; the test part is scored once, at the end.")
    if "split" not in record:
        return Section("Data and split", [Items(entries)])
    entries.append(f"Fingerprint of the split: {record['split']['fingerprint']}")
    return Section("Data and split", [Items(entries), counts_table(record)])


def _how_it_was_made(record: Record) -> list[Section]:
    blocks = [values_table(record["config"]), values_table(record["environment"])]
    folded = Section("Configuration and environment", blocks, folded=True)
    return [folded, *([Section("Make it again", [Code(record["command"])])] if "command" in record else [])]
