"""Promises of `--monitor`: from a file of maps to a verdict, a page that needs nothing else, and a finished run."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_network import write_model

from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.data.splitting import split_by_lot
from waferlab.deployment.predictor import Predictor
from waferlab.errors import ModelError
from waferlab.monitoring import batch as monitoring
from waferlab.monitoring import reference as module
from waferlab.monitoring.batch import batch_record, in_lines, monitor_batch, read_batch
from waferlab.monitoring.drift import compare
from waferlab.monitoring.reference import NO_LABEL, Reference, at_most

ROOT = Path(__file__).resolve().parents[2]


def write(path, maps, labels, groups):
    shapes = np.array([one.shape for one in maps])
    np.savez(
        path, maps_flat=np.concatenate([one.ravel() for one in maps]), labels=labels, group=groups,
        offsets=np.concatenate([[0], np.cumsum(shapes.prod(axis=1))]), shapes=shapes.astype(np.int16),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_arrays, tmp_path_factory):
    """A folder with a model, its reference, and batches of the test part: as they are, and on new die grids."""
    folder = tmp_path_factory.mktemp("monitored")
    write_model(folder / "model.onnx")
    lots = np.random.default_rng(0).permutation(len(tiny_arrays["labels"])) % 60
    np.savez(folder / "tiny.npz", **(tiny_arrays | {"group": lots}))
    maps = load_wafer_maps(folder / "tiny.npz")
    split = split_by_lot(maps)
    Reference.of(Predictor(folder / "model.onnx"), maps, split).save(folder / "reference.npz")
    names, part = np.array(CLASS_NAMES)[maps.labels[split.test]], split.test
    write(folder / "alike.npz", [maps[i] for i in part], names, maps.groups[part])
    write(folder / "new<grid>.npz", [np.repeat(maps[i], 2, axis=0) for i in part], names, maps.groups[part])
    return folder


@pytest.fixture(scope="module")
def monitored(model, tmp_path_factory):
    """What is said of both batches, and where."""
    folder, said = tmp_path_factory.mktemp("out"), {}
    predictor = Predictor(model / "model.onnx", threads=1)
    pages = {}
    for name in ("alike", "new<grid>"):
        lines = said[name] = []
        pages[name] = monitor_batch(
            predictor, str(model / f"{name}.npz"), output_dir=folder, tracking_uri=None, say=lines.append
        )
    return folder, {name: page.read_text() for name, page in pages.items()}, said


def test_the_reference_is_the_validation_part_as_the_model_answers_it(model):
    maps, predictor = load_wafer_maps(model / "tiny.npz"), Predictor(model / "model.onnx")
    split, reference = split_by_lot(maps), Reference.beside(predictor)
    np.testing.assert_array_equal(
        reference.sample.probabilities, predictor.probabilities([maps[i] for i in split.validation])
    )
    np.testing.assert_array_equal(reference.labels, maps.labels[split.validation])
    np.testing.assert_array_equal(reference.sample.grids, maps.shapes[split.validation])
    np.testing.assert_array_equal(reference.training_counts, np.bincount(maps.labels[split.train], minlength=9))
    one = maps[split.validation[0]]
    assert reference.sample.density[0] == pytest.approx((one == 2).sum() / (one > 0).sum())
    assert NO_LABEL not in reference.labels


def test_the_verdict_is_said_and_heads_the_page(monitored):
    _, pages, said = monitored
    assert said["alike"][0].startswith("No alarm:") and said["new<grid>"][0].startswith("Alarm:")
    assert "new die grids" in said["new<grid>"][0]
    assert any(line.startswith("  ALARM New die grids") for line in said["new<grid>"])
    for name, page in pages.items():
        quote = re.search(r"<blockquote>(.*?)</blockquote>", page, re.S)[1]
        assert said[name][0].split(":")[0] in quote
        assert page.index("<blockquote>") < page.index("<table>") < page.index("<img")
    assert "New die grids." in pages["new<grid>"] and "Go on." in pages["alike"]


def test_the_page_asks_nothing_of_the_network_and_shows_names_as_they_are(monitored):
    for page in monitored[1].values():
        assert "default-src 'none'" in page and "<script" not in page
        assert not re.search(r"(?:src|href)=\"(?!data:)", page)
        assert len(re.findall(r'<img src="data:image/png;base64', page)) >= 2
    assert "new&lt;grid&gt;.npz" in monitored[1]["new<grid>"]


def test_each_batch_is_a_finished_run_with_figures_verdict_and_page(monitored):
    from mlflow import MlflowClient

    folder, pages, _ = monitored
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lightning_cnn_monitoring")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"alike.npz", "new<grid>.npz"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    alarm = runs["new<grid>.npz"].data
    assert alarm.tags["verdict"] == "alarm" and runs["alike.npz"].data.tags["verdict"] == "no alarm"
    assert alarm.metrics["alarm"] == 1 and alarm.metrics["new_grids.effect"] == pytest.approx(1)
    assert alarm.metrics["new_grids.p_corrected"] < 0.05
    assert sum(value for name, value in alarm.metrics.items() if name.startswith("mix.")) == pytest.approx(1)
    (page,) = client.list_artifacts(runs["alike.npz"].info.run_id)
    assert page.path == "monitoring_alike.html"
    assert (folder / "mlruns").is_dir() and len(pages) == 2


def test_a_model_without_a_reference_or_with_anothers_is_named(model, tmp_path):
    (tmp_path / "model.onnx").write_bytes((model / "model.onnx").read_bytes())
    predictor = Predictor(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"has no reference\.npz"):
        monitor_batch(predictor, "synthetic", output_dir=tmp_path, tracking_uri=None, say=print)
    other = Reference.load(model / "reference.npz")
    names = ("Donut", *other.class_names[1:])
    Reference(other.sample, other.labels, names, other.training_counts).save(tmp_path / "reference.npz")
    with pytest.raises(ModelError, match="is about the classes Donut"):
        monitor_batch(predictor, "synthetic", output_dir=tmp_path, tracking_uri=None, say=print)
    narrower = replace(other.sample, features=other.sample.features[:, 1:])
    Reference(narrower, other.labels, other.class_names, other.training_counts).save(tmp_path / "reference.npz")
    with pytest.raises(ModelError, match=r"features of each map, .* gives .*: it is another model's"):
        monitor_batch(predictor, "synthetic", output_dir=tmp_path, tracking_uri=None, say=print)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.onnx", "reference.npz"]


def test_a_model_that_does_not_give_its_features_is_named_before_any_map_is_answered(model):
    predictor = Predictor(model / "model.onnx")
    predictor.about.pop("features")
    with pytest.raises(ModelError, match="does not say where its features are"):
        Reference.beside(predictor)


def test_of_more_lots_than_are_kept_the_figures_are_of_all(model, monkeypatch):
    predictor, reference = Predictor(model / "model.onnx", threads=1), Reference.load(model / "reference.npz")
    whole = read_batch(predictor, str(model / "new<grid>.npz"))
    lots = len(np.unique(whole.sample.lots))
    monkeypatch.setattr(monitoring, "MOST_MAPS", lots - 2)
    batch = read_batch(predictor, str(model / "new<grid>.npz"))
    assert len(batch.sample) == lots - 2 and 0.5 < batch.sample.weights.sum() / whole.maps < 1
    record = batch_record(predictor, reference, batch, compare(reference, batch.sample))
    assert f"{whole.maps} maps of {lots} lots" in record["headline"] and record["data"]["lots"] == lots
    counted = sum(float(text.partition("(")[2].rstrip(")")) for text in record["new_grids"])
    assert counted == pytest.approx(whole.maps, abs=len(record["new_grids"]))


def test_a_page_shows_the_command_as_text_whatever_is_in_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("waferlab.monitoring.batch.command_line_used", lambda: "predict.py '![x](%2Fetc%2Fpasswd).npz'")
    predictor = Predictor(model / "model.onnx", threads=1)
    page = monitor_batch(predictor, str(model / "alike.npz"), output_dir=tmp_path, tracking_uri=None, say=print)
    assert "![x](%2Fetc%2Fpasswd).npz" in page.read_text()


def test_a_large_batch_is_thinned_by_lot_and_counted_whole(model, monkeypatch):
    monkeypatch.setattr("waferlab.monitoring.batch.MOST_MAPS", 20)
    predictor = Predictor(model / "model.onnx", threads=1)
    batch = read_batch(predictor, str(model / "alike.npz"))
    whole = load_wafer_maps(model / "alike.npz")
    assert batch.maps == len(whole) and len(batch.sample) <= 20
    assert len(batch.lot_names) == whole.n_lots


@pytest.mark.parametrize("lots", [1, 30, 130, 150, 199, 3000])
def test_of_a_stream_the_same_maps_are_kept_as_of_all_at_once_and_they_stand_for_all(model, monkeypatch, lots):
    order = np.random.default_rng(1).permutation(3000)
    of_maps, ones = np.arange(3000) % lots, [np.ones((4, 5), np.uint8)] * 100

    def chunks(source, image_levels):
        for start in range(0, 3000, 100):
            yield ones, [str(of_maps[i]) for i in order[start : start + 100]]

    monkeypatch.setattr(monitoring, "_chunks", chunks)
    keys = np.random.default_rng(0).random(3000)
    predictor, numbered = Predictor(model / "model.onnx", threads=1), {}
    in_order = np.array([numbered.setdefault(lot, len(numbered)) for lot in of_maps[order]])
    monkeypatch.setattr(monitoring, "MOST_MAPS", 200)
    batch = read_batch(predictor, "a stream")
    expected = at_most(in_order, 200, keys)
    assert batch.sample.lots.tolist() == in_order[expected].tolist()
    halves = np.histogram(expected, bins=[0, 1500, 3000])[0]
    assert batch.maps == 3000 and abs(halves[0] - halves[1]) < 60
    if lots < 200:
        assert batch.sample.weights.sum() == pytest.approx(3000, rel=1e-3)


def test_a_part_with_the_shares_of_the_validation_part_is_shown_with_them_however_large_its_lots_are(
    model, monkeypatch
):
    monkeypatch.setattr(module, "MOST_MAPS", 61)
    maps = load_wafer_maps(model / "tiny.npz")
    labels = maps.labels.copy()
    maps.groups[:] = np.where(labels == 8, 1000, maps.groups)  # one large lot of one class
    split = split_by_lot(maps)
    everything = replace(split, validation=np.arange(len(maps)))
    thinned = Reference.of(Predictor(model / "model.onnx", threads=1), maps, everything)
    true = (labels == 8).mean()
    assert len(thinned.labels) <= 61 and thinned.shares[8] == pytest.approx(true, abs=0.01)
    assert abs(thinned.calibration.prior[8] - true) > 0.05


def test_images_are_read_for_the_monitor_as_for_the_answers(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        monitoring, "stream_wafer_maps", lambda source, *, image_levels: asked.append(image_levels) or iter(())
    )
    with pytest.raises(AssertionError):
        monitor_batch(
            Predictor(model / "model.onnx"),
            "x",
            output_dir=tmp_path,
            tracking_uri=None,
            say=print,
            image_levels="binary",
        )
    assert asked == ["binary"]


def test_monitoring_loads_no_torch():
    code = "import sys, waferlab.monitoring.batch; "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'mlflow')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_lines_say_what_was_not_tested():
    signal = {"alarms": False, "p": None, "p_corrected": None, "usual": None, "name": "Fail density", "effect": 0.2}
    mix = [{"name": "none", "estimated": 0.5, "reference": 0.4}]
    lines = in_lines({"headline": "No verdict", "signals": [signal], "mix": mix, "caveats": ["Not enough lots."]})
    assert lines[1].split() == ["-", "Fail", "density:", "0.200"] and "Not enough lots." in lines[-1]
