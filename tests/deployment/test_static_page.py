"""Promises about the page without a service: in a browser it answers as the file does, and asks nobody."""

import functools
import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_model import wafer, write_model
from test_page import drop, write

from waferlab.data.maps import CLASS_NAMES
from waferlab.deployment import static_page
from waferlab.deployment.predictor import Predictor
from waferlab.errors import ConfigError


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    try:
        return static_page.fetch_runtime(tmp_path_factory.mktemp("npm"))
    except ConfigError as error:
        pytest.skip(str(error))


def built(folder, runtime, model, *more):
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--model", str(model), "--output", str(folder / "site"), "--onnxruntime-web", str(runtime), *more]
        patch.setattr(sys, "argv", ["static_page", *flags])
        assert static_page.main() == 0
    return folder / "site"


@pytest.fixture
def open_page(browser):
    """Serves a folder and opens its page; nothing else may be asked, and nothing may go wrong."""
    servers, wrong, asked = [], [], []

    def show(folder, width):
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{servers[-1].server_port}/")
        return page

    yield show
    assert wrong == []
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in asked)
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1280])
def test_dropped_maps_are_answered_in_the_browser(width, runtime, tmp_path, open_page):
    site = built(tmp_path, runtime, write_model(tmp_path / "model.onnx"))
    page = open_page(site, width)
    page.get_by_text("model.onnx").wait_for()
    assert "90% of each class's maps (too few lots to promise it for Near-full)" in page.locator("#about").inner_text()
    drop(page, write(tmp_path, "lot.json", [wafer(0), wafer(0.1), wafer(0.4, (7, 9)), wafer(0.95)]))
    page.wait_for_selector("#maps li")
    cards = page.locator("#maps li").all_inner_texts()
    assert ["none" in cards[0], "Random" in cards[2], "Near-full" in cards[3]] == [True] * 3
    assert ["have a look" in card for card in cards] == [False, True, False, False]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert not page.get_by_text("From a program").is_visible()  # nothing answers programs here


def test_an_exported_network_answers_there_as_it_does_here(exported, tiny_maps, runtime, tmp_path, open_page):
    file = exported("lightning_cnn")
    page = open_page(built(tmp_path, runtime, file), 800)
    maps = [tiny_maps[i] for i in range(0, len(tiny_maps), 29)]
    lot = write(tmp_path, "lot.json", maps)
    found = page.evaluate(
        """async text => (await (await fetch("/predict", {method: "POST",
           body: new File([text], "lot.json")})).json()).answers""", lot.read_text(),
    )  # fmt: skip
    answers = Predictor(file).predict(maps)
    there = np.array([[one["probabilities"][name] for name in CLASS_NAMES] for one in found])
    np.testing.assert_allclose(there, answers.probabilities, atol=2e-4)
    assert [one["class"] for one in found] == answers.classes


UNANSWERABLE = [
    ("a.json", b"{", "This is no JSON."),
    ("a.json", b"[]", "This has no maps."),
    ("a.json", b'{"maps": []}', "0 maps. Allowed: 1 to 1024."),
    ("a.json", b'{"maps": [[[0, 1], [1]]]}', "map 0 has no rows of one length."),
    ("a.json", b'{"maps": [[[0, 7]]]}', "map 0 has other values than 0 no die, 1 pass, 2 fail."),
    ("a.npy", b"rubbish", "This is no .npy file."),
    ("a.npy", "float", "Wanted: uint8"),
    ("a.npy", "cut", "The file ends after"),
]


def test_what_cannot_be_answered_is_a_sentence(runtime, tmp_path, open_page):
    page = open_page(built(tmp_path, runtime, write_model(tmp_path / "model.onnx")), 600)
    for name, content, said in UNANSWERABLE:
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.save(file, np.ones((3, 4), np.float64 if content == "float" else np.uint8))
            if content == "cut":
                file.write_bytes(file.read_bytes()[:-2])
        page.reload()
        page.set_input_files("#file", file)
        error = page.locator("#error")
        error.wait_for(state="visible")
        assert f"{name}: " in error.inner_text() and said in error.inner_text()


def test_a_package_that_is_another_one_is_named_and_what_was_there_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("before")
    (tmp_path / "site/answers.js").write_text("before")
    model = write_model(tmp_path / "model.onnx")
    flags = ["--model", str(model), "--output", str(tmp_path / "site"), "--onnxruntime-web", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["static_page", *flags])
    assert static_page.main() == 2
    assert "has no dist/ort.wasm.min.js" in capsys.readouterr().err
    assert (tmp_path / "site/index.html").read_text() == "before"


def test_a_folder_of_something_else_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("three years")
    model = write_model(tmp_path / "model.onnx")
    monkeypatch.setattr(sys, "argv", ["static_page", "--model", str(model), "--output", str(tmp_path)])
    assert static_page.main() == 2
    assert "holds no page of this kind alone, but " in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "three years"


@pytest.fixture
def package(tmp_path):
    """Files that are called as those of onnxruntime-web, for tests in which they are not run."""
    for name in static_page.RUNTIME_FILES:
        (tmp_path / "package/dist").mkdir(parents=True, exist_ok=True)
        (tmp_path / "package/dist" / name).touch()
    return tmp_path / "package"


def test_what_somebody_has_put_beside_a_page_is_not_lost(package, tmp_path, monkeypatch):
    site, model = built(tmp_path, package, write_model(tmp_path / "model.onnx")), tmp_path / "model.onnx"
    (site / "CNAME").write_text("wafers.example")
    arguments = SimpleNamespace(model=str(model), output=site, tracking_uri=None, coverage=0.9, onnxruntime_web=package)
    with pytest.raises(ConfigError, match="alone, but CNAME, and is not replaced"):
        static_page.build(arguments)
    (site / "CNAME").unlink()
    (tmp_path / "answers.js").write_text("mine")
    with pytest.raises(ConfigError, match=r"answers\.js is a file, and is not replaced"):
        static_page.build(SimpleNamespace(**vars(arguments) | {"output": tmp_path / "answers.js"}))
    assert (tmp_path / "answers.js").read_text() == "mine"
    (tmp_path / "link").symlink_to(site)
    before = (site / "index.html").stat().st_ino
    static_page.build(SimpleNamespace(**vars(arguments) | {"output": tmp_path / "link"}))
    assert (tmp_path / "link").is_symlink() and (site / "index.html").stat().st_ino != before
    monkeypatch.chdir(site)
    with pytest.raises(ConfigError, match="is the folder that this program runs in"):
        static_page.build(SimpleNamespace(**vars(arguments) | {"output": Path(".")}))


def test_where_the_new_page_cannot_take_its_place_the_old_one_stays(package, tmp_path, monkeypatch):
    site, rename = built(tmp_path, package, write_model(tmp_path / "model.onnx")), os.rename
    before = (site / "index.html").stat().st_ino

    def interrupted(source, place):
        if Path(source).name == "new":
            raise KeyboardInterrupt
        rename(source, place)

    monkeypatch.setattr(os, "rename", interrupted)
    arguments = SimpleNamespace(
        model=str(tmp_path / "model.onnx"), output=site, tracking_uri=None, coverage=0.9, onnxruntime_web=package
    )
    with pytest.raises(KeyboardInterrupt):
        static_page.build(arguments)
    assert (site / "index.html").stat().st_ino == before


def test_without_npm_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"npm is not installed, .* --onnxruntime-web"):
        static_page.fetch_runtime(tmp_path)


def test_what_the_page_knows_of_the_model_is_what_the_file_says(runtime, tmp_path):
    site = built(tmp_path, runtime, write_model(tmp_path / "model.onnx"), "--coverage", "0.8")
    told = json.loads((site / "about.json").read_text())
    sets = Predictor(tmp_path / "model.onnx").sets
    assert told["floors"] == sets.least_probabilities(0.8).tolist() and told["coverage"] == 0.8
    assert shutil.which("python") and (site / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
