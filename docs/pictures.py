"""Makes the pictures that show what one sees: MLflow's pages, a report, a search, the service's page.

In an empty folder, `demo.py` and then `quick_start.py` do what they do for anybody; a headless Chromium looks at what
they leave. It needs Chromium, no network, and five minutes:

    python docs/pictures.py
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/pictures"
COLOURS = 64  # of a picture: enough for pages and diagrams, at a third of the bytes
EXPERIMENT = "demo_ultra"
WIDTH = 1280
AS_SOMEBODY_LEFT_IT = {  # what MLflow's page keeps in a browser: the pages for training, no assistant beside them
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
}


def main() -> None:
    """Runs what is to be seen, and looks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="a folder in which both scripts have run; default: they run now")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        runs = arguments.runs or Path(empty)
        if arguments.runs is None:
            for command in (["demo.py", "time_limit=200"], ["quick_start.py"]):  # on a slow machine, too, with a search
                subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=runs, check=True)
        make_pictures(runs)


def make_pictures(runs: Path) -> None:
    """All of them, from the folder that the scripts have worked in."""
    FOLDER.mkdir(exist_ok=True)
    results = runs / "results"
    for kind in ("history", "slices"):
        for file in results.glob(f"{EXPERIMENT}/optuna_*_{kind}.png"):
            keep(file, f"search_{kind}")
    for name in ("confusion_matrix", "sample_predictions"):
        keep(results / "quick_start" / f"{name}.png", f"quick_start_{name}")
    with browser() as chromium:
        look_at_report(chromium, results / EXPERIMENT / "report.html")
        look_at_mlflow(chromium, runs)
        look_at_service(chromium, runs)


def look_at_report(chromium: Any, report: Path) -> None:
    """Its top, as wide as a screen."""
    page = chromium.new_page(viewport={"width": WIDTH, "height": 1400})
    page.goto(report.as_uri())
    photograph(page, "report")


def look_at_mlflow(chromium: Any, runs: Path) -> None:
    """The tree of runs, and the registry."""
    with served(["mlflow", "ui", "--workers", "1", "--port", "{port}"], runs) as url:
        number = experiment_id(runs)
        page = chromium.new_page(viewport={"width": WIDTH, "height": 640})
        page.add_init_script("".join(f"localStorage.setItem({k!r}, {v!r});" for k, v in AS_SOMEBODY_LEFT_IT.items()))
        page.goto(f"{url}/#/experiments/{number}/runs")
        for run in (EXPERIMENT, "lightning_cnn_optimized"):
            show_what_is_below(page, run)
        photograph(page, "mlflow_runs")
        page.goto(f"{url}/#/models/wafer_defect_classifier")
        page.wait_for_timeout(5000)
        photograph(page, "mlflow_registry")


def show_what_is_below(page: Any, run: str) -> None:
    """Clicks on the plus sign left of a run's name."""
    name = page.locator(".ag-row a", has_text=run).first
    name.wait_for(timeout=30_000)
    box = name.bounding_box()
    page.mouse.click(box["x"] - 32, box["y"] + box["height"] / 2)
    page.wait_for_timeout(2000)


def look_at_service(chromium: Any, runs: Path) -> None:
    """The service's page with three wafers on it."""
    from waferlab.data.generator import generate_wafer_maps

    maps, _, _ = generate_wafer_maps(1, seed=3)
    same = [one for one in maps if one.shape == maps[0].shape][:3]
    with served([sys.executable, "-u", str(ROOT / "predict.py"), "--serve", "--port", "{port}"], runs) as url:
        page = chromium.new_page(viewport={"width": 820, "height": 620})
        page.goto(url)
        np.save(runs / "dropped.npy", np.stack(same))
        page.set_input_files("#file", runs / "dropped.npy")
        page.wait_for_timeout(3000)
        photograph(page, "service")


def experiment_id(runs: Path) -> str:
    """The number that MLflow gave the experiment."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{runs / 'mlflow.db'}").get_experiment_by_name(EXPERIMENT).experiment_id


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise SystemExit("Chromium is not installed (Debian: apt install chromium).")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def served(command: list[str], folder: Path) -> Iterator[str]:
    """A server that is up, by its address on this machine; gone afterwards."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [re.sub(r"\{port\}", str(port), word) for word in command]
    if words[0] == "mlflow":
        words[0] = str(Path(sys.executable).with_name("mlflow"))
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def photograph(page: Any, name: str) -> None:
    """What the browser shows, kept small."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.png"
        page.screenshot(path=file)
        keep(file, name)


def keep(file: Path, name: str) -> None:
    """A picture in few colours, in the folder of pictures."""
    from PIL import Image

    with Image.open(file) as picture:
        picture.convert("RGB").quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)
    print(f"docs/pictures/{name}.png: {(FOLDER / f'{name}.png').stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
