"""Records in; pages out.

A record is a plain dict, as it is read from JSON: of `run_experiment.py --mode comparison` or `ablation`, or the
summary of a pipeline (`experiment_summary.json`). Nothing here trains, loads data or computes a score; what a page says
is in the record.

    plot_seed_comparison(record, path=folder / "seed_comparison.png")
    write_report(record, folder=folder, pictures=["seed_comparison.png"], path=folder / "report.html")
    write_model_card(summary, folder=folder)

A template (`templates/*.md.j2`) makes Markdown of the record, and markdown-it makes HTML of that, so that both say the
same. The HTML needs nothing but itself: styles are inside, pictures are inside as base64, there is no script, and a
content security policy forbids every request.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markupsafe import Markup

from waferlab.reports.tables import Record
from waferlab.reports.templating import fill_in, templates
from waferlab.tracking.whole_files import write_atomically

FOLDED = "▸ "  # begins the heading of a section that opens with a click


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
    files = [Path(picture) for picture in pictures]
    for file in (Path(folder) / file for file in files):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. Draw it before the report, or leave it out of `pictures`.")
    template = record.get("mode") if record.get("mode") in ("comparison", "ablation") else "run"
    searches = [file for file in files if template == "run" and file.stem.startswith("optuna_")]
    others = [file for file in files if file not in searches]
    page = fill_in(template, record=record, pictures=others, searches=searches)
    return write_atomically(path, to_html(page, folder=folder).encode(errors="backslashreplace"))


def to_html(markdown: str, *, folder: str | os.PathLike[str]) -> str:
    """One page that needs nothing else: tags in the Markdown are shown, not obeyed.

    Args:
        markdown: a title, what is to be said first, and sections (`## `), folded where the heading begins with `▸`.
        folder: where its pictures are.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    environment: dict[str, Any] = {"folder": Path(folder)}
    tokens = parser.parse(markdown, environment)
    for before, inline, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if [child.type for child in inline.children or ()] == ["image"]:
            before.tag = after.tag = "figure"

    def render(start: int, end: int) -> Markup:
        return Markup(parser.renderer.render(tokens[start:end], parser.options, environment))

    headings = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    sections = [
        {
            "heading": render(start + 1, start + 2).removeprefix(FOLDED),
            "folded": tokens[start + 1].content.startswith(FOLDED),
            "body": render(start + 3, end),
        }
        for start, end in pairwise([*headings, len(tokens)])
    ]
    shell, title = templates().get_template("page.html"), render(1, 2).striptags()
    return shell.render(title=title, header=render(0, headings[0]), sections=sections)


class _Renderer(RendererHTML):
    """Tables scroll, pictures are inside the page, and a name may break after an underscore."""

    def table_open(self, *_: Any) -> str:
        return '<div class="scroll" tabindex="0"><table>\n'

    def table_close(self, *_: Any) -> str:
        return "</table></div>\n"

    def text(self, tokens: Any, index: int, *_: Any) -> str:
        return escapeHtml(tokens[index].content).replace("_", "_<wbr>")

    def image(self, tokens: Any, index: int, options: Any, env: Any) -> str:
        caption = escapeHtml(self.renderInlineAsText(tokens[index].children, options, env))
        name = unquote(tokens[index].attrs["src"])
        if name != Path(name).name or not (env["folder"] / name).is_file():  # somebody's text, and not our picture
            return caption
        content = base64.b64encode((env["folder"] / name).read_bytes()).decode()
        return f'<img src="data:image/png;base64,{content}" alt="{caption}"><figcaption>{caption}</figcaption>'
