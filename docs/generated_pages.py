"""What the site is made of beside its pages: chapters as notebooks, deploy/, the options and the API from the code."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHAPTERS = sorted(f"guide/{file.stem}" for kind in ("py", "ipynb") for file in HERE.glob(f"guide/[0-9]*.{kind}"))
ROOMS = {  # folder of waferlab/: what is in it
    "data": "sources, splits, images, batches; the generator",
    "models": "what all networks share, and their registry",
    "training": "callbacks, checkpoints, devices, threads",
    "search": "studies, trials, budgets, workers",
    "tracking": "the tree of runs",
    "evaluation": "answers, decisions, scores with intervals",
    "deployment": "the exported file: checked, registered, run",
    "monitoring": "whether new maps are like the old",
    "experiments": "comparison and ablation",
    "reports": "pictures, tables, pages",
}
TOP = ("config", "records", "errors", "terminal", "command_line")  # modules of waferlab/ that are in no folder
DEPLOY = {"README.md": "index", "kubernetes/README.md": "kubernetes", "tensorrt.md": "tensorrt"}  # in deploy/: its page


def read_chapter(text: str) -> Any:
    """A chapter as a notebook, which says that it is Python before it is run as well."""
    import jupytext

    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def setup(app: Any) -> dict[str, bool]:
    """For Sphinx: the pages are written before it looks which there are."""
    app.connect("builder-inited", lambda _: write_pages(HERE))
    app.connect("html-page-context", lambda app, page, template, context, tree: context.update(chapters=CHAPTERS))
    app.connect("build-finished", copy_notebooks)
    return {"parallel_read_safe": True}


def copy_notebooks(app: Any, error: Exception | None) -> None:
    """Puts each chapter as a notebook, with its output, beside its page."""
    made = Path(app.outdir).parent / "jupyter_execute"  # where MyST-NB leaves what it has run
    for chapter in CHAPTERS if error is None and app.builder.format == "html" else []:
        shutil.copy(made / f"{chapter}.ipynb", app.outdir / f"{chapter}.ipynb")


def write_pages(folder: Path) -> None:
    """Writes _generated/, api/ and deploy/; what has not changed is left alone, so that it is not built again."""
    pages = {
        "_generated/fields.md": all_fields(),
        "_generated/licences.md": all_licences(),
        "api/index.md": api_index(),
    }
    pages |= {f"api/{room}.md": api_of(room) for room in ROOMS}
    pages["api/top.md"] = "# What is in no folder\n\n" + blocks_of(f"waferlab.{name}" for name in TOP)
    pages |= {f"deploy/{name}.md": deploy_page(file) for file, name in DEPLOY.items()}
    for name, text in pages.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


# ---------------------------------------------------------------------------------------------------- configuration


def all_fields() -> str:
    """Every field of `ExperimentConfig`: default, what is allowed, and what it means."""
    from integrated_pipeline import ExperimentConfig

    meanings = meanings_of(ExperimentConfig)
    rows = [
        f"| `{one.name}` | `{default_of(one)}` | {allowed(one)} | {meanings[one.name]} |"
        for one in fields(ExperimentConfig)
    ]
    return "\n".join(["| field | default | allowed | what it is |", "|---|---|---|---|", *rows, ""])


def meanings_of(kind: type) -> dict[str, str]:
    """The text of each attribute in a class's docstring, in one line, ready for a table."""
    text = inspect.getdoc(kind).partition("Attributes:\n")[2]
    entries = re.split(r"^    (\w+): ", text, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(meaning.split()).replace("|", "\\|")
        for name, meaning in zip(entries[::2], entries[1::2], strict=True)
    }


def default_of(one: Any) -> str:
    """As one would write it."""
    return repr(one.default if one.default_factory is MISSING else one.default_factory())


def allowed(one: Any) -> str:
    """From the checks that the field carries."""
    said = one.metadata
    if "choices" in said:
        return ", ".join(f"`{choice}`" for choice in said["choices"])
    if "low" in said:
        return f"{said['low']:,} to {said['high']:,}"
    return "`True`, `False`" if one.type == "bool" else f"`{one.type}`".replace("|", "\\|")


# --------------------------------------------------------------------------------------------------------- dependencies


def all_licences() -> str:
    """What an installation of requirements.txt brings here, with version and licence, as pip-licenses finds them."""
    names = sorted(brought_by((HERE.parent / "requirements.txt").read_text().splitlines()))
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--format=markdown", "--packages", *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def brought_by(requirements: Iterable[str]) -> set[str]:
    """The names of what is required, of what that requires, and so on, as far as it is installed here."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    left = [(line, "") for line in requirements]
    while left:
        line, extra = left.pop()
        one = Requirement(line)
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(one.name)
        try:
            theirs = requires(name) or []
        except PackageNotFoundError:
            continue
        if name not in found or one.extras:
            found.add(name)
            left += [(line, extra) for line in theirs for extra in ("", *one.extras)]
    return found


# ---------------------------------------------------------------------------------------------------------------- API


def api_index() -> str:
    """What one imports most, and a page for each room."""
    rooms = "\n".join(["top", *ROOMS])
    return f"""# Reference of the API

What most programs need is one call:

```{{eval-rst}}
.. autoclass:: integrated_pipeline.IntegratedMLPipeline
   :members: run_complete_pipeline, prepare_data, data_module, create_model, fit, search, go_on, evaluate, register_best
.. autofunction:: integrated_pipeline.suggest_parameters
.. autoclass:: simple_model.LightningCNN
```

How it is done, a folder a concern:

```{{toctree}}
{rooms}
```
"""


def api_of(room: str) -> str:
    """All modules of a room with what they offer."""
    files = sorted((HERE.parent / "waferlab" / room).glob("*.py"))
    modules = [f"waferlab.{room}.{file.stem}" for file in files if file.stem != "__init__"]
    return f"# {room}: {ROOMS[room]}\n\n{blocks_of(modules)}"


def blocks_of(modules: Iterable[str]) -> str:
    """What Sphinx makes of each module's docstrings."""
    return "\n".join(
        f"## {name.rpartition('.')[2]}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
        for name in modules
    )


# --------------------------------------------------------------------------------------------------------- deployment


def deploy_page(file: str) -> str:
    """A page of deploy/, which is read there as well; its links lead to pages of the site, or give the file."""

    def target(link: re.Match[str]) -> str:
        path, _, place = link[1].partition("#")
        path = os.path.normpath(Path("deploy", file).parent / path)
        if path == "benchmarks/README.md":
            return f"](../results.md#{place})"
        if path.startswith("docs/"):
            return f"](../{path.removeprefix('docs/')})"
        page = DEPLOY.get(path.removeprefix("deploy/"))
        return f"]({page}.md)" if page else f"](../../{path})"

    return re.sub(r"\]\(([^):]+)\)", target, (HERE.parent / "deploy" / file).read_text())
