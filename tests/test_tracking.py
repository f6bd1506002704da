"""Promises about tracking: the tree of runs, their statuses, and that nothing depends on it."""

import contextlib
import http.server
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
from tracking import MlflowServer, Tracking, _free_port, still_runs, this_process

ROOT = Path(__file__).resolve().parent.parent


def settings(tiny_npz, tmp_path, **more):
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
        "quiet": True,
    } | more


def runs_of(tmp_path):
    """{name: run} of all runs in the store that a bare `mlflow ui` opens."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=100)}, client


class PruneTheSecond(optuna.pruners.BasePruner):
    """Stops trial 1 at its first report."""

    def prune(self, study, trial):
        return trial.number == 1


@pytest.fixture(scope="module")
def tracked(tiny_arrays, tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("tracked")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    pipeline = IntegratedMLPipeline(ExperimentConfig(**settings(folder / "tiny.npz", folder)))
    pipeline._pruner = PruneTheSecond
    summary = pipeline.run_complete_pipeline()
    runs, client = runs_of(folder)
    return folder, summary, runs, client


def test_runs_form_a_tree_of_pipeline_models_and_trials(tracked):
    _, _, runs, _ = tracked
    parent, child = runs["tiny"], runs["lightning_cnn_optimized"]
    assert "mlflow.parentRunId" not in parent.data.tags
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for number in range(3):
        assert runs[f"trial {number}"].data.tags["mlflow.parentRunId"] == child.info.run_id
    assert len(runs) == 5


def test_every_run_ends_as_what_became_of_it(tracked):
    _, _, runs, _ = tracked
    assert runs["trial 1"].info.status == "KILLED"
    assert runs["trial 1"].data.tags["reason"].startswith("pruned")
    assert {run.info.status for name, run in runs.items() if name != "trial 1"} == {"FINISHED"}


def test_runs_hold_what_the_summary_says(tracked):
    _, summary, runs, client = tracked
    (model,) = summary["models"]
    child = runs["lightning_cnn_optimized"]
    assert child.data.metrics["test_macro_f1"] == pytest.approx(model["test"]["macro_f1"])
    history = client.get_metric_history(child.info.run_id, "val_macro_f1")
    assert [point.value for point in history] == pytest.approx(model["history"]["val_macro_f1"])
    assert child.data.tags["weights"] == model["weights"]
    trial = model["search"]["trials"][0]
    assert runs["trial 0"].data.params == {name: str(value) for name, value in trial["parameters"].items()}


def test_the_pipelines_run_names_data_split_seed_environment_code_and_pictures(tracked):
    folder, summary, runs, client = tracked
    parent = runs["tiny"]
    (data,) = parent.inputs.dataset_inputs
    assert data.dataset.digest == summary["split"]["fingerprint"]
    assert parent.data.params["seed"] == "0"
    assert parent.data.tags["environment.torch"] == summary["environment"]["torch"]
    assert "| lightning_cnn |" in parent.data.tags["mlflow.note.content"]
    files = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id)}
    assert {"confusion_matrix.png", "training_history.png", "experiment_summary.json"} <= files
    assert (folder / "mlruns").is_dir()


def test_without_tracking_mlflow_is_not_imported_and_leaves_nothing(tiny_npz, tmp_path):
    code = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()
assert not [name for name in sys.modules if name.split(".")[0] == "mlflow"]
"""
    config = settings(tiny_npz, tmp_path, enable_mlflow=False, enable_optuna=False, max_epochs=1)
    subprocess.run([sys.executable, "-c", code, json.dumps(config)], cwd=ROOT, check=True)
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


def test_a_server_that_is_down_costs_a_warning_and_not_the_training(tiny_npz, tmp_path, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    config = settings(tiny_npz, tmp_path, tracking_uri=f"http://127.0.0.1:{port}", enable_optuna=False)
    summary = IntegratedMLPipeline(ExperimentConfig(**config)).run_complete_pipeline()
    assert summary["models"][0]["test"]["macro_f1"] >= 0
    printed = capsys.readouterr().err
    assert printed.count("goes on without MLflow") == 1


def test_a_server_that_breaks_halfway_costs_a_warning_and_not_the_training(tiny_npz, tmp_path, capsys):
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error_code": "INTERNAL_ERROR", "message": "the disk is full"}')

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_port}"
        config = settings(tiny_npz, tmp_path, tracking_uri=uri, enable_optuna=False)
        IntegratedMLPipeline(ExperimentConfig(**config)).run_complete_pipeline()
    finally:
        server.shutdown()
        server.server_close()
    printed = capsys.readouterr().err
    assert printed.count("goes on without MLflow") == 1
    assert "the disk is full" in printed


CHILD = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()
"""


def start_and_wait_for_trial(config, tmp_path, number):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(config)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while f"trial {number}" not in names_of_runs(tmp_path / "mlflow.db"):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return child


def names_of_runs(database):
    """Looks without MLflow's client, which would itself set to making the tables of a fresh database."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM runs")}
    except sqlite3.OperationalError:  # not there yet, or being made
        return set()


def test_a_killed_pipelines_runs_are_closed_and_go_on_when_it_is_resumed(tiny_npz, tmp_path):
    config = settings(tiny_npz, tmp_path, search_epochs=10, pruner="none")
    child = start_and_wait_for_trial(config, tmp_path, 1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    before, _ = runs_of(tmp_path)
    assert before["tiny"].info.status == "RUNNING"

    IntegratedMLPipeline(ExperimentConfig(**config, resume=True)).run_complete_pipeline()
    after, _ = runs_of(tmp_path)
    assert after["trial 1"].info.status == "KILLED"
    assert after["trial 1"].data.tags["reason"] == "its process was killed"
    assert after["tiny"].info.run_id == before["tiny"].info.run_id  # the same run went on
    statuses = {name: run.info.status for name, run in after.items() if name != "trial 1"}
    assert set(statuses.values()) == {"FINISHED"}, statuses
    assert after["trial 2"].data.params == before["trial 1"].data.params
    assert len(after) == 6


def test_ctrl_c_closes_the_runs_as_killed(tiny_npz, tmp_path):
    config = settings(tiny_npz, tmp_path, search_epochs=200, pruner="none")
    child = start_and_wait_for_trial(config, tmp_path, 0)
    child.send_signal(signal.SIGINT)
    child.wait(timeout=60)
    child.stderr.close()
    runs, _ = runs_of(tmp_path)
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert runs["tiny"].data.tags["reason"] == "interrupted"


def test_runs_of_a_process_that_still_lives_are_left_alone(tmp_path):
    first = Tracking("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    first.start("living")
    first.call(lambda client: None).result()
    second = Tracking("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    second.close()
    assert runs_of(tmp_path)[0]["living"].info.status == "RUNNING"
    first.close()
    assert runs_of(tmp_path)[0]["living"].info.status == "FINISHED"


def test_a_process_is_known_by_more_than_its_number():
    mine = this_process()
    host, number, started = mine.rsplit(" ", 2)
    assert still_runs(mine)
    assert not still_runs(f"{host} {number} {int(started) - 1000}")
    assert still_runs(f"another-host {number} {started}")  # cannot know: leaves it alone


# --- registry


@pytest.fixture(scope="module")
def registered(tiny_arrays, tmp_path_factory):
    """Three pipelines in one folder, without a search: a first one, a better one, a worse one."""
    import numpy as np

    folder = tmp_path_factory.mktemp("registered")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    outcomes = []
    for name, epochs in (("first", 4), ("better", 25), ("worse", 1)):
        config = settings(folder / "tiny.npz", folder, enable_optuna=False, max_epochs=epochs, experiment_name=name)
        pipeline = IntegratedMLPipeline(ExperimentConfig(**config))
        outcomes.append((pipeline, pipeline.run_complete_pipeline()))
    return folder, outcomes


def test_only_a_better_model_becomes_champion_and_the_reason_is_written(registered):
    from mlflow import MlflowClient

    folder, outcomes = registered
    first, better, worse = (summary["registered"] for _, summary in outcomes)
    assert [r["alias"] for r in (first, better, worse)] == ["champion", "champion", "challenger"]
    assert better["comparison"]["new"] > better["comparison"]["old"]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    name = better["name"]
    assert str(client.get_model_version_by_alias(name, "champion").version) == better["version"]
    challenger = client.get_model_version_by_alias(name, "challenger")
    assert "So it is challenger" in challenger.description
    assert f"version {better['version']}" in challenger.description


def test_checkpoint_file_and_registered_model_agree(registered):
    import mlflow
    import numpy as np

    from integrated_pipeline import predict_probabilities
    from wafer_data import resize_maps

    folder, outcomes = registered
    pipeline, summary = outcomes[1]
    (record,) = summary["models"]
    test_maps = pipeline.maps.select(pipeline.split.test)
    expected = predict_probabilities(pipeline.load_model(record), resize_maps(test_maps, 16))
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    champion = mlflow.pyfunc.load_model(f"models:/{summary['registered']['name']}@champion")
    for i in range(len(test_maps)):
        answer = champion.predict({"maps": test_maps[i][None]})["probabilities"]
        np.testing.assert_allclose(answer[0], expected[i], atol=2e-4)
    assert summary["registered"]["largest_difference_to_checkpoint"] < 2e-4


# --- the server


def test_the_page_is_up_on_this_machine_only_and_stops_without_leftovers(tmp_path):
    from urllib.request import urlopen

    import psutil

    tracking = Tracking("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    tracking.start("a run")
    experiment_id = tracking.call(lambda client: tracking.experiment_id).result()
    server = MlflowServer(tracking.uri, port=5123)
    try:
        server.wait_until_up()
        assert server.link(experiment_id).startswith("http://127.0.0.1:")
        with urlopen(server.url) as page:
            assert b"MLflow" in page.read()
        processes = [psutil.Process(server._process.pid)]
        processes += processes[0].children(recursive=True)
        listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
    finally:
        server.stop()
        tracking.close()
    assert not any(process.is_running() for process in processes)


def test_a_taken_port_is_passed_over(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_port(port) != port
