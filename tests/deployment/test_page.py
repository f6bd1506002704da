"""Promises about the service's page, in a browser: what is dropped on it is drawn and answered, or refused in words."""

import json

import numpy as np
import pytest
from made_up_model import served, wafer, write_model

COLOURS = """canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height), seen = {};
  for (let i = 0; i < data.length; i += 4) seen[data.slice(i, i + 3)] = (seen[data.slice(i, i + 3)] || 0) + 1;
  return seen;
}"""
PASS, FAIL = "185,203,221", "200,55,27"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(write_model(tmp_path_factory.mktemp("model") / "model.onnx")) as (_, url):
        yield url


@pytest.fixture
def page(browser, server):
    """The service's page at phone width, which asks nobody else and breaks none of its own rules."""
    page, wrong, asked = browser.new_page(viewport={"width": 390, "height": 800}), [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server)
    yield page
    assert [line for line in wrong if "status of 422" not in line] == []
    assert all(url.startswith((server, "data:")) for url in asked)
    page.close()


def drop(page, *files):
    """As a hand does it, again where the browser takes the drop for a leaving: on a busy machine it may lag behind."""
    browser = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    page.evaluate("window.dropped = false; addEventListener('drop', () => { window.dropped = true; }, true)")
    for _ in range(20):
        for kind in ("dragEnter", "dragOver", "drop"):
            browser.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
        for _ in range(20):
            if page.evaluate("window.dropped"):
                return
            page.wait_for_timeout(50)
    raise AssertionError("the browser does not let go of the files")


def failing(page, card):
    """The share of failing dies in a drawn map, by area."""
    seen = page.locator("#maps li canvas").nth(card).evaluate(COLOURS)
    return seen.get(FAIL, 0) / (seen.get(FAIL, 0) + seen.get(PASS, 0))


def write(folder, name, maps):
    """The maps in a file whose name says how."""
    file = folder / name
    if name.endswith(".json"):
        file.write_text(json.dumps({"maps": [one.tolist() for one in maps]}))
    else:
        np.save(file, np.asfortranarray(np.stack(maps)) if "columns_first" in name else np.stack(maps))
    return file


def test_what_is_dropped_is_drawn_and_answered(page, tmp_path):
    drop(page, write(tmp_path, "lot.json", [wafer(0), wafer(0.1), wafer(0.4), wafer(0.95)]))
    page.wait_for_selector("#maps li")
    cards = page.locator("#maps li").all_inner_texts()
    assert ["none" in cards[0], "Random" in cards[2], "Near-full" in cards[3]] == [True] * 3
    assert ["have a look" in card for card in cards] == [False, True, False, False]
    assert "May be" in cards[1] and "none" in cards[1] and "Random" in cards[1]
    assert "88%" in cards[0]
    np.testing.assert_allclose([failing(page, i) for i in range(4)], [0, 0.1, 0.4, 0.95], atol=0.02)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.get_by_role("button", name="have a look 1").click()
    assert len(page.locator("#maps li").all()) == 1


def test_maps_lie_as_in_the_file(page, tmp_path):
    one = np.ones((4, 6), np.uint8)
    one[0, 5] = 2  # first row, last column: on top, at the right
    one[3] = 0
    for name in ("lot.json", "lot.npy", "columns_first.npy"):
        page.set_input_files("#file", write(tmp_path, name, [wafer(0.4, (4, 6)), one]))
        page.locator("#maps li").nth(1).wait_for()
        colour = "(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)].join()"
        canvas = page.locator("#maps li canvas").nth(1)
        assert [canvas.evaluate(colour, place) for place in ([340, 50], [340, 150], [40, 50])] == [FAIL, PASS, PASS]
        assert canvas.evaluate(colour, [190, 330]) not in (FAIL, PASS)
        page.reload()


def test_what_is_refused_is_said_in_a_sentence_and_the_next_file_is_answered(page, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"maps": [[[1.5]]]}')
    drop(page, wrong)
    error = page.locator("#error")
    error.wait_for(state="visible")
    assert "wrong.json: map 0 has dies that are not whole numbers." in error.inner_text()
    drop(page, wrong, wrong)
    assert "one file at a time" in error.inner_text()
    page.set_input_files("#file", write(tmp_path, "lot.npy", [wafer(0.4)]))
    page.wait_for_selector("#maps li")
    assert not error.is_visible()


def test_the_page_tells_the_model_and_what_it_does_not_promise(page):
    page.get_by_text("model.onnx").wait_for()
    assert "90% of each class's maps (too few lots to promise it for Near-full)" in page.locator("#about").inner_text()


def test_the_page_may_run_and_load_nothing_but_its_own(browser, server):
    page, told = browser.new_page(), []
    page.on("console", lambda message: told.append(message.text))
    policy = page.goto(server).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    page.evaluate(
        """() => document.body.insertAdjacentHTML("beforeend", '<b id="b" onclick="document.title = 1">x</b>')"""
    )
    page.locator("#b").click()
    assert page.title() == "Wafer maps"
    assert any("Content Security Policy" in line for line in told)
