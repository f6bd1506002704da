"""The service's page without a service: a folder of files whose script answers in the browser, with onnxruntime-web.

    python -m waferlab.deployment.static_page --model models:/wafer_defect_classifier@champion --output site
    python -m http.server --directory site --bind 127.0.0.1

Any server of files will do. The maps that are dropped on the page leave it for nowhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from waferlab import command_line
from waferlab.deployment.page_policy import digest_of
from waferlab.errors import ConfigError

EXAMPLES = """\
  python -m waferlab.deployment.static_page
  python -m waferlab.deployment.static_page --model checkpoints/demo_ultra/lightning_cnn/model.onnx --output site
  python -m waferlab.deployment.static_page --onnxruntime-web node_modules/onnxruntime-web   # without npm"""
HERE = Path(__file__).parent
RUNTIME = "onnxruntime-web@1.30.0"
OF_A_PAGE = {"index.html", "answers.js", "about.json", "model.onnx", "onnxruntime"}
RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# What the page asks is answered by its script; WebAssembly is compiled, and nothing else is evaluated.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "script-src 'self' 'wasm-unsafe-eval' '{script}'; style-src '{style}'"
)


def main() -> int:
    """Builds the page with the command line's arguments and returns the exit status."""
    parser = command_line.Parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", default="models:/wafer_defect_classifier@champion", help="a .onnx file, or models:/name@alias")
    add("--tracking-uri", metavar="URI", help="of the registry (default: $MLFLOW_TRACKING_URI, else ./mlflow.db)")
    add("--output", type=Path, default=Path("site"), metavar="DIR", help="folder to write (default: site)")
    add("--coverage", type=float, default=0.9, help="that prediction sets promise, 0.50 to 0.99 (default 0.9)")
    add("--onnxruntime-web", type=Path, metavar="DIR", help=f"an unpacked package (default: npm fetches {RUNTIME})")
    arguments = parser.parse_args()
    return command_line.run(lambda: build(arguments), when_stopped="Nothing is half built: start it anew.")


def build(arguments: argparse.Namespace) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        ConfigError: the folder holds something else than an earlier page, which would be lost.
    """
    from waferlab.deployment.predictor import Predictor

    there = arguments.output.resolve()  # where a link leads to, the page is
    check_that_nothing_is_lost(there)
    predictor = Predictor.load(arguments.model, tracking_uri=arguments.tracking_uri)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "site"
        made.mkdir()
        copy_runtime(arguments.onnxruntime_web or fetch_runtime(Path(folder)), made / "onnxruntime")
        shutil.copyfile(predictor.path, made / "model.onnx")
        shutil.copyfile(HERE / "static_page.js", made / "answers.js")
        (made / "about.json").write_text(json.dumps(about(predictor, arguments.coverage), indent=1) + "\n")
        (made / "index.html").write_text(page())
        there.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{there.name}-", dir=there.parent) as beside:
            shutil.copytree(made, new := Path(beside) / "new")
            old = Path(beside) / "old"
            if there.exists():
                os.rename(there, old)
            try:
                os.rename(new, there)
            except BaseException:
                if not there.exists() and old.exists():
                    os.rename(old, there)
                raise
    size = sum(file.stat().st_size for file in arguments.output.rglob("*") if file.is_file())
    print(f"{predictor.name}, {size / 1e6:.1f} MB, in {arguments.output}")
    print(f"To look at it: python -m http.server --directory {arguments.output} --bind 127.0.0.1")


def check_that_nothing_is_lost(folder: Path) -> None:
    """Before a folder is replaced.

    Raises:
        ConfigError: it holds something else than an earlier page, or is the one that this program runs in.
    """
    if folder == Path.cwd():
        raise ConfigError(f"--output {folder} is the folder that this program runs in. Name a new one.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file, and is not replaced. Name a new folder.")
    inside = {file.name for file in folder.iterdir()}
    if inside and (inside - OF_A_PAGE or "answers.js" not in inside):
        other = min(inside - OF_A_PAGE, default="index.html")
        raise ConfigError(
            f"--output {folder} holds no page of this kind alone, but {other}, and is not replaced. Name a new folder."
        )


def fetch_runtime(folder: Path) -> Path:
    """onnxruntime-web, unpacked; npm checks its digest and runs nothing of it.

    Raises:
        ConfigError: there is no npm, or it cannot fetch the package.
    """
    remedy = "Unpack the package yourself and name its folder with --onnxruntime-web."
    try:
        done = subprocess.run(
            ["npm", "pack", RUNTIME, "--silent"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError(f"npm is not installed, which fetches {RUNTIME}. {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"npm did not fetch {RUNTIME} in {error.timeout:g} s. {remedy}") from error
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"npm could not fetch {RUNTIME} ({why}). {remedy}")
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package"


def copy_runtime(package: Path, folder: Path) -> None:
    """The three files that are needed.

    Raises:
        ConfigError: one is not there.
    """
    folder.mkdir()
    for name in RUNTIME_FILES:
        file = package / "dist" / name
        if not file.is_file():
            raise ConfigError(f"{package} has no dist/{name}: it is not {RUNTIME}. Give the folder of that package.")
        shutil.copyfile(file, folder / name)


def about(predictor, coverage: float) -> dict[str, object]:
    """What the script has to know of the model: its classes, and the least probabilities of its sets.

    Raises:
        ConfigError: the model has no sets of this coverage.
    """
    sets, promised = predictor.sets, []
    floors = None
    if sets is not None:
        try:
            floors, promised = sets.least_probabilities(coverage).tolist(), sets.promised(coverage).tolist()
        except ValueError as error:
            raise ConfigError(f"--coverage {coverage:g}: {error}") from error
    return {
        "model": {"name": predictor.name, "sha256": predictor.sha256},
        "class_names": predictor.class_names,
        "coverage": None if sets is None else coverage,
        "floors": floors,
        "no_promise_for": [name for name, kept in zip(predictor.class_names, promised, strict=False) if not kept],
    }


def page() -> str:
    """The service's page, with the script that answers before its own, and without what only a service has."""
    text = (HERE / "service.html").read_text()
    policy = POLICY.format(script=digest_of(text, "script"), style=digest_of(text, "style"))
    scripts = '<script src="onnxruntime/ort.wasm.min.js"></script>\n<script src="answers.js"></script>\n<script>\n"use'
    text = text.replace("<details>", "<details hidden>").replace('<script>\n"use', scripts, 1)
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return re.sub("(<meta charset.*?>)", rf"\1\n{meta}", text, count=1)


if __name__ == "__main__":
    sys.exit(main())
