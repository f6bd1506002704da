"""Promises about predict.py: one command from maps to answers, mistakes in a sentence, the first answer at once."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_up_models import SETS, write_file
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from PIL import Image

import predict
from waferlab import command_line
from waferlab.data.image_files import IMAGE_LEVELS
from waferlab.data.reading import load_wafer_maps
from waferlab.deployment.predictor import DEFAULT_MODEL, Predictor
from waferlab.errors import ModelError
from waferlab.tracking.registered import fetch_registered
from waferlab.tracking.runs import make_database

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("model") / "model.onnx", scale=200.0, prediction_sets=SETS.as_text())


def start(*arguments, folder, code=None, **more):
    """Starts the script as a user does; with `code`, that is run before it in the same process."""
    script = str(ROOT / "predict.py")
    first = (
        [script]
        if code is None
        else ["-c", f"import runpy, sys\n{code}\nrunpy.run_path({script!r}, run_name='__main__')"]
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *first, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **more
    )


def run(*arguments, folder, status=0, **how):
    """What the script prints, and what it prints of errors."""
    started = start(*arguments, folder=folder, **how)
    out, errors = started.communicate(timeout=120)
    assert started.returncode == status, errors
    assert "Traceback" not in errors
    return out, errors


def rows(path):
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_help_shows_all_flags_and_examples_and_loads_nothing_heavy(tmp_path):
    out, errors = run("--help", folder=tmp_path)
    flags, _, examples = out.partition("examples:")
    for flag in ("--model", "--output", "--coverage", "--report", "--explain", "--monitor", "--serve", "--shadow"):
        assert flag in flags
    assert "python predict.py" in examples and errors == ""
    heavy = "import sys, predict; print(*{'numpy', 'rich', 'onnxruntime', 'waferlab.data'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_the_script_repeats_so_as_not_to_import_it_is_still_so():
    parser = predict.make_parser()
    assert parser.get_default("model") == DEFAULT_MODEL
    assert next(a.choices for a in parser._actions if a.dest == "image_levels") == IMAGE_LEVELS


NOTHING_HEAVY = """
import sys
from waferlab.deployment import batch
told = batch._in_words
def tell(*first):
    heavy = ("torch", "lightning", "mlflow", "pandas", "matplotlib", "scipy", "sklearn", "onnx", "pyarrow")
    return f"{told(*first)} LOADED {[name for name in heavy if name in sys.modules]}"
batch._in_words = tell
"""


def test_a_file_and_a_model_become_rows_a_summary_and_a_picture(model, tiny_npz, tmp_path):
    folder = tmp_path / "new"
    out, errors = run(
        tiny_npz, "--model", model, "--output-dir", folder, "--coverage", "0.8", folder=tmp_path, code=NOTHING_HEAVY
    )
    assert errors == "" and "LOADED []" in out
    assert {path.name for path in folder.iterdir()} == {
        "predictions.csv", "predictions_summary.json", "predictions_least_certain.png",
    }  # fmt: skip
    whole = load_wafer_maps(tiny_npz)
    expected = Predictor(model).predict([whole[i] for i in range(len(whole))], coverage=0.8)
    assert [row["class"] for row in rows(folder / "predictions.csv")] == expected.classes
    assert [row["set"] for row in rows(folder / "predictions.csv")] == ["|".join(s) for s in expected.set_names()]


@pytest.mark.parametrize(
    ("error", "retries", "calls"),
    [
        (ConnectionError("reset"), "0", 2),
        (ConnectionError("reset"), "7", 1),  # MLflow has tried again itself
        (MlflowException("no such model", RESOURCE_DOES_NOT_EXIST), "0", 1),
    ],
)
def test_a_registry_is_asked_twice_only_if_a_connection_broke_and_mlflow_does_not_do_so(
    error, retries, calls, tmp_path, monkeypatch
):
    asked = []

    class Broken:
        def __init__(self, *addresses):
            pass

        def get_model_version_by_alias(self, name, alias):
            asked.append(name)
            raise error

    monkeypatch.setattr("mlflow.MlflowClient", Broken)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
    with pytest.raises(ModelError, match=r"cannot be had from http://127\.0\.0\.1:9"):
        fetch_registered("models:/m@champion", into=tmp_path, tracking_uri="http://127.0.0.1:9")
    assert len(asked) == calls


def test_the_registered_champion_answers_where_the_training_ran(model, tmp_path):
    make_database(tmp_path / "mlflow.db", files=str(tmp_path / "mlruns"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "model.onnx").write_bytes(model.read_bytes())
    client.create_registered_model("wafer_defect_classifier")
    client.create_model_version("wafer_defect_classifier", str(kept))
    client.set_registered_model_alias("wafer_defect_classifier", "champion", "1")
    Image.fromarray(np.tile(np.array([0, 128, 255], np.uint8), (9, 4))).save(tmp_path / "one.png")
    out, errors = run("one.png", "--output", "one.jsonl", folder=tmp_path, code=NOTHING_HEAVY)
    assert errors == "" and "LOADED []" in out
    assert "wafer_defect_classifier version 1" in out and "First answer: map one.png is" in out
    assert '"id": "one.png"' in (tmp_path / "one.jsonl").read_text()


def call(*arguments):
    """The exit status, with the script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        return predict.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give MAPS to classify, or --serve"),
        (("--serve", "maps.npz"), "leave out maps.npz"),
        (("--serve", "--report"), "--report does not go with --serve"),
        (("--serve", "--image-levels", "binary"), "--image-levels does not go with --serve"),
        (("--serve", "--quiet"), "--quiet does not go with --serve"),
        (("--serve", "--output", "x.csv"), "--output does not go with --serve"),
        (("maps.npz", "--port", "8001"), "--port is for --serve alone"),
        (("maps.npz", "--shadow", "a.onnx"), "--shadow is for --serve alone"),
        (("--serve", "--port", "70000"), "--port 70000: allowed"),
        (("maps.npz", "--threads", "0"), "--threads 0: allowed are 1 to 1024"),
        (("maps.npz", "--coverage", "high"), "invalid float value: 'high'"),
    ],
)
def test_flags_that_do_not_go_together_are_named_before_anything_is_loaded(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_mistakes_get_a_sentence_and_status_2(model, tiny_npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.npz").write_bytes(tiny_npz.read_bytes()[:5000])
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((tiny_npz, "--model", "no.onnx"), "no.onnx: no such file"),
        ((tiny_npz, "--model", tiny_npz), "is no exported classifier"),
        ((tiny_npz,), "there is no mlflow.db here"),
        (("no.npz", "--model", model), "no.npz: no such file or folder"),
        (("damaged.npz", "--model", model), "damaged.npz: cannot be read"),
        ((tiny_npz, "--model", model, "--output", "x.xls"), "unknown kind of file '.xls'"),
        ((tiny_npz, "--model", model, "--output-dir", "file"), "cannot be written"),
        ((tiny_npz, "--model", model, "--coverage", "0.905"), "--coverage: coverage=0.905"),
    ):
        assert call(*arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert not list(tmp_path.glob("*predictions*"))


def test_ctrl_c_keeps_the_answers_so_far_and_says_so(model, tmp_path):
    np.savez(tmp_path / "many.npz", maps=np.random.default_rng(0).integers(0, 3, (50_000, 40, 40), np.uint8))
    started = start("many.npz", "--model", model, "--threads", "1", folder=tmp_path)
    assert "many.npz" in started.stdout.readline() and "First answer" in started.stdout.readline()
    time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130 and "Traceback" not in errors and "--resume" not in errors
    assert "Stopped. The answers to the first" in errors and "predictions.csv.partial" in errors
    assert 1 <= len(rows(tmp_path / "predictions.csv.partial")) < 50_000
    assert not (tmp_path / "predictions.csv").exists()


def test_the_hint_to_resume_stays_with_trainings(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py"])

    def stop():
        raise KeyboardInterrupt

    assert command_line.run(stop) == 130 and "demo.py --resume" in capsys.readouterr().err
    assert command_line.run(stop, when_stopped="Begin anew.") == 130
    assert capsys.readouterr().err == "\nStopped. Begin anew.\n"


def test_a_connection_that_breaks_while_a_model_is_fetched_is_tried_once_more(tmp_path, monkeypatch):
    tries = []

    class Client:
        def __init__(self, *_):
            pass

        def get_model_version_download_uri(self, name, version):
            return "mlflow-artifacts:/model"

    def download(files, *, dst_path, tracking_uri):
        tries.append(files)
        if len(tries) == 1:
            raise ConnectionError("Remote end closed connection without response")
        (Path(dst_path) / "model.onnx").touch()
        return dst_path

    monkeypatch.setattr("mlflow.MlflowClient", Client)
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # as where a run is tracked
    found = fetch_registered("models:/wafer/3", into=tmp_path, tracking_uri="http://127.0.0.1:1")
    assert (found.version, found.file, len(tries)) == ("3", tmp_path / "model.onnx", 2)
