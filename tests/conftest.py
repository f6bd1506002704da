import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run side by side; threads that wait for each other are slow
ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sys.path.insert(0, str(ROOT))

from waferlab.data.generator import generate_wafer_maps  # noqa: E402


def pytest_collection_modifyitems(items):
    """What needs an executed chapter of the guide, as the site does, takes long."""
    for item in items:
        if {"site", "executed_chapter"} & {*item.fixturenames}:
            item.add_marker("long")


@pytest.fixture(scope="session")
def tiny_maps():
    """40 generated maps a class."""
    from waferlab.data.maps import pack_maps

    drawn, labels, lots = generate_wafer_maps(40, seed=5)
    return pack_maps(drawn, labels, groups=lots, source="tiny")


@pytest.fixture(scope="session")
def tiny_arrays(tiny_maps):
    """The tiny maps in the arrays of the .npz layout."""
    from waferlab.data.maps import CLASS_NAMES

    maps = tiny_maps
    return {
        "maps_flat": maps.maps_flat,
        "offsets": maps.offsets,
        "shapes": maps.shapes.astype(np.int16),
        "labels": np.array(CLASS_NAMES)[maps.labels],
        "group": maps.groups.astype(np.int32),
    }


@pytest.fixture
def tiny_npz(tmp_path, tiny_arrays):
    path = tmp_path / "tiny.npz"
    np.savez(path, **tiny_arrays)
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_maps):
    """A function from a model type to the file of `test_onnx_export.model_of` and `decision_for`, for 32 pixels.

    Exporting takes longer than most tests, so all that run side by side share these files.
    """
    from deployment.test_onnx_export import decision_for, model_of
    from filelock import FileLock

    from waferlab.deployment.onnx_export import export_onnx

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)

    def export(model_type):
        file = folder / model_type / "model.onnx"
        with FileLock(folder / f"{model_type}.lock"):
            if not file.exists():
                model = model_of(model_type)
                export_onnx(model, file, image_size=32, decision=decision_for(model_type, model, tiny_maps))
            return file

    return export


@pytest.fixture(scope="session")
def executed_chapter(tmp_path_factory):
    """A function from a chapter of the guide to the notebook that it becomes, with all that it prints and draws.

    An error in a cell, a claim that does not hold for one, is raised. Those that run side by side share the notebooks.
    """
    from unittest import mock

    import nbformat
    import warm
    from filelock import FileLock
    from nbclient import NotebookClient

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "chapters"
    folder.mkdir(exist_ok=True)
    sys.path.append(str(ROOT / "docs"))
    from generated_pages import read_chapter

    def execute(chapter):
        file, work = folder / f"{chapter.stem}.ipynb", folder / chapter.stem
        with FileLock(folder / f"{chapter.stem}.lock"):
            if not file.exists():
                work.mkdir(exist_ok=True)
                notebook = read_chapter(chapter.read_text())
                client = NotebookClient(
                    notebook, timeout=240, resources={"metadata": {"path": work}},
                    extra_arguments=["--matplotlib=inline"],
                )  # fmt: skip
                with mock.patch("jupyter_client.launcher.Popen", warm.Popen):  # a real kernel, but a forked one
                    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
                nbformat.write(notebook, file)
        return file

    return execute


def tiny_settings(tiny_npz, tmp_path, **more):
    """The fields of a configuration whose training takes a second."""
    return {
        "experiment_name": "tiny",
        "model_type": "lightning_cnn",
        "use_pretrained": False,
        "max_epochs": 2,
        "search_epochs": 2,
        "num_optuna_trials": 3,
        "batch_size": 16,
        "image_size": 16,
        "data": str(tiny_npz),
        "output_dir": str(tmp_path),
        "precision": "32-true",
        "threads": 1,
        "workers": 1,
        "quiet": True,
    } | more


@pytest.fixture
def scripted(monkeypatch):
    """Registers the model "scripted", whose validation scores are those of `Scripted.scripts`."""
    from made_up import Scripted

    from waferlab.models.registry import MODEL_REGISTRY, ModelSpec

    spec = ModelSpec(Scripted, defaults={"learning_rate": 1e-3, "dropout": 0.1}, portfolio=())
    monkeypatch.setitem(MODEL_REGISTRY, "scripted", spec)
    monkeypatch.setattr(Scripted, "scripts", [])
    monkeypatch.setattr(Scripted, "seen", {})


@pytest.fixture(scope="session")
def trained(tiny_arrays, tmp_path_factory):
    """A small CNN trained for an epoch: its folder with the data, and its record."""
    from made_up import pipeline_in

    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    return folder, pipeline_in(folder).train_final_model("lightning_cnn")


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: pages are not looked at")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def postgres():
    from postgres import Postgres

    server = Postgres()
    yield server
    server.remove()
