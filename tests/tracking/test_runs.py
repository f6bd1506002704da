"""Promises about tracking: the tree of runs, their statuses, and that nothing depends on it."""

import contextlib
import dataclasses
import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
import warm
from conftest import tiny_settings
from unreliable_server import UnreliableServer

from integrated_pipeline import IntegratedMLPipeline
from waferlab.command_line import mlflow_page
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, RegistryError, ServerError
from waferlab.records import code_tags
from waferlab.tracking.line import in_a_line
from waferlab.tracking.processes import still_runs, this_process, where_numbers_hold
from waferlab.tracking.registry import may_pass
from waferlab.tracking.runs import NoRuns, RunTree, make_database
from waferlab.tracking.server import MlflowServer, _free_port
from waferlab.training.checkpoints import checkpoint_digest

ROOT = Path(__file__).resolve().parents[2]


def runs_of(tmp_path):
    """{name: run} of all runs in the store that a bare `mlflow ui` opens."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=100)}, client


def without_mlflows_settings():
    """The environment of a program that is started afresh: a tree that was made here has set some."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}


class PruneTheSecond(optuna.pruners.BasePruner):
    """Stops trial 1 at its first report."""

    def prune(self, study, trial):
        return trial.number == 1


@pytest.fixture(scope="module")
def tracked(tiny_arrays, tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("tracked")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    pipeline = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(folder / "tiny.npz", folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("waferlab.search.model_search.make_pruner", lambda *_, **__: PruneTheSecond())
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


def test_every_run_names_its_seed_and_every_training_the_weights_it_started_from(tracked):
    _, _, runs, _ = tracked
    for name, run in runs.items():
        assert "0" in (run.data.tags.get("seed"), run.data.params.get("seed"))
        assert name == "tiny" or run.data.tags["weights"] == "random (not asked for)"


def test_the_run_of_a_model_has_its_checkpoint_and_its_pictures(tracked):
    folder, summary, runs, client = tracked
    run_id = runs["lightning_cnn_optimized"].info.run_id
    files = {file.path for file in client.list_artifacts(run_id)}
    checkpoint = Path(summary["models"][0]["checkpoint"]).name
    assert {checkpoint, "confusion_matrix.png", "training_history.png", "per_class_lightning_cnn.csv"} <= files
    kept = Path(client.download_artifacts(run_id, checkpoint, str(folder)))
    assert checkpoint_digest(kept) == summary["models"][0]["checkpoint_sha256"]


def test_the_pipelines_run_names_the_version_of_every_library(tracked):
    _, _, runs, _ = tracked
    tags = runs["tiny"].data.tags
    for library in ("torch", "torchvision", "lightning", "optuna", "mlflow", "ultralytics"):
        assert tags[f"environment.{library}"] == version(library)


def test_runs_hold_what_the_summary_says(tracked):
    _, summary, runs, client = tracked
    (model,) = summary["models"]
    child = runs["lightning_cnn_optimized"]
    assert child.data.metrics["test_macro_f1"] == pytest.approx(model["test"]["macro_f1"])
    history = client.get_metric_history(child.info.run_id, "val_macro_f1")
    assert [point.value for point in history] == pytest.approx(model["history"]["val_macro_f1"])
    assert child.data.tags["weights"] == model["weights"]
    trial = model["search"]["trials"][0]
    assert {name: str(value) for name, value in trial["parameters"].items()}.items() <= runs[
        "trial 0"
    ].data.params.items()
    assert runs["trial 0"].data.params["num_classes"] == "9"  # what Lightning knows of the model is there, too


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


@pytest.mark.long
def test_without_tracking_mlflow_is_not_imported_and_leaves_nothing(tiny_npz, tmp_path):
    code = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()
assert not [name for name in sys.modules if name.split(".")[0] == "mlflow"]
"""
    config = tiny_settings(tiny_npz, tmp_path, enable_mlflow=False, enable_optuna=False, max_epochs=1)
    subprocess.run([sys.executable, "-c", code, json.dumps(config)], cwd=ROOT, check=True)
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
    assert (tmp_path / "checkpoints/tiny/lightning_cnn/model.onnx").is_file()


def test_a_server_that_is_down_costs_a_warning_and_not_the_training(tiny_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("waferlab.tracking.line.OUTAGE", 1.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    config = tiny_settings(tiny_npz, tmp_path, tracking_uri=f"http://127.0.0.1:{port}", enable_optuna=False)
    summary = IntegratedMLPipeline(ExperimentConfig(**config)).run_complete_pipeline()
    assert summary["models"][0]["epochs"] == 2
    printed = capsys.readouterr().err
    assert printed.count("goes on without MLflow") == 1


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{"error_code": "INTERNAL_ERROR", "message": "the disk is full"}', "the disk is full"),
        (200, b"<html>Please log in</html>", ""),  # of a proxy that stands before the server
        (200, b'{"experiment": 7}', ""),
    ],
)
def test_a_server_that_answers_wrongly_costs_a_warning_and_not_the_training(
    status, body, said, tiny_npz, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("waferlab.tracking.line.OUTAGE", 1.0)

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_port}"
        config = tiny_settings(tiny_npz, tmp_path, tracking_uri=uri, enable_optuna=False)
        IntegratedMLPipeline(ExperimentConfig(**config)).run_complete_pipeline()
    finally:
        server.shutdown()
        server.server_close()
    printed = capsys.readouterr().err
    assert printed.count("goes on without MLflow") == 1
    assert said in printed and "Traceback" not in printed


@pytest.mark.long
def test_a_full_disk_costs_a_warning_and_not_the_training(tiny_npz, tmp_path):
    code = """
import json, sys
import sqlalchemy
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
from waferlab.tracking import line

def fill_the_disk(connection, *_):
    connection.execute("PRAGMA max_page_count = 1")  # the database cannot grow any more

def fill_the_disk_and_train(*args, **kwargs):
    pipeline.runs.client()
    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "checkout", fill_the_disk)
    for number in range(200):  # more than has room in the space that is free in it
        pipeline.runs.note(pipeline.model_runs["lightning_cnn"], str(number) * 2000)
    return train(*args, **kwargs)

line.OUTAGE = 1.0
pipeline = IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1])))
train, pipeline.train_final_model = pipeline.train_final_model, fill_the_disk_and_train
assert pipeline.run_complete_pipeline()["models"][0]["epochs"] == 2
"""
    config = tiny_settings(tiny_npz, tmp_path, enable_optuna=False, registry_name=None)
    command = [sys.executable, "-c", code, json.dumps(config)]
    done = subprocess.run(command, cwd=ROOT, env=without_mlflows_settings(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert "goes on without MLflow" in warning and "disk is full" in warning


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    server = UnreliableServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def server(one_server, monkeypatch):
    monkeypatch.setattr("waferlab.tracking.line.FIRST_PAUSE", 0.05)
    one_server.set()
    return one_server


@pytest.fixture
def fresh_store(one_server, tmp_path):
    """A fresh database is there already: making it takes seconds."""
    shutil.copy(one_server.fresh, tmp_path / "mlflow.db")


def test_of_two_programs_that_make_an_experiment_at_the_same_moment_both_write_to_it(server, tmp_path, monkeypatch):
    experiment, answers = server.client.create_experiment("both"), [None]
    from mlflow import MlflowClient

    ask = MlflowClient.get_experiment_by_name
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda *args: answers.pop() if answers else ask(*args))
    writes = RunTree("both", uri=server.uri, folder=tmp_path, warn=pytest.fail)
    writes.end(writes.start("a run"))
    writes.close()
    assert [run.info.run_name for run in server.client.search_runs([experiment])] == ["a run"]


@pytest.mark.long
def test_three_503_answers_halfway_cost_neither_the_runs_nor_the_registration(tiny_npz, tmp_path, capsys, server):
    settings = {"experiment_name": "blip", "tracking_uri": server.uri, "enable_optuna": False, "max_epochs": 1}
    pipeline = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(tiny_npz, tmp_path, **settings)))
    train = pipeline.train_final_model

    def fail_and_train(*args, **kwargs):
        server.set(failures=3)
        return train(*args, **kwargs)

    pipeline.train_final_model = fail_and_train
    summary = pipeline.run_complete_pipeline()
    assert server.set()["failures"] == 0
    assert summary["registered"]["alias"] == "champion", summary
    runs = server.runs("blip")
    names = ("blip", "lightning_cnn_optimized")
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(names, "FINISHED")
    assert len(server.client.get_metric_history(runs[names[1]].info.run_id, "val_macro_f1")) == 1
    printed = capsys.readouterr()
    assert "warning" not in printed.err and "View run" not in printed.out


def test_an_outage_delays_what_is_written_and_if_the_store_stays_away_a_line_says_what_is_missing(
    tmp_path, monkeypatch, server
):
    monkeypatch.setattr("waferlab.tracking.line.OUTAGE", 0.3)
    warnings = []
    server.set(down=True)
    writes = RunTree("away", uri=server.uri, folder=tmp_path, warn=warnings.append)
    parent = writes.start("parent")
    child = writes.start("child", parent=parent)
    for step in range(3):
        writes.metrics(child, {"loss": step}, step=step)
    writes.end(child, "KILLED", reason="pruned")
    wait_for(lambda: warnings)
    server.set(down=False)
    writes.client()  # waits until all before is written
    runs = server.runs("away")
    assert {name: run.info.status for name, run in runs.items()} == {"parent": "RUNNING", "child": "KILLED"}
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
    points = server.client.get_metric_history(runs["child"].info.run_id, "loss")
    assert [point.value for point in points] == [0, 1, 2]
    assert len(warnings) == 1 and "until it takes what waits" in warnings[0] and "503" in warnings[0]

    server.set(down=True)
    writes.start("never opened")
    assert writes.client() is None and writes.broken
    asked = server.set(down=True)["requests"]
    writes.start("never tried")
    assert writes.experiment_id is None
    assert server.set(down=True)["requests"] == asked  # nobody waits again
    writes.close()
    assert len(warnings) == 2 and "nothing from" in warnings[1] and "503" in warnings[1]


@pytest.fixture(scope="module")
def troubled(one_server, tmp_path_factory):
    """What was said, the runs, and the experiment after all kinds of trouble that are no outage."""
    folder = tmp_path_factory.mktemp("troubled")
    experiment, said = one_server.client.create_experiment("troubled"), []
    one_server.client.delete_experiment(experiment)
    one_server.set(lost="runs/create")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("waferlab.tracking.line.FIRST_PAUSE", 0.05)
        writes = RunTree("troubled", uri=one_server.uri, folder=folder, warn=said.append)
        run = writes.start("a run")
        writes.params(run, rate=0.1, seed=0, long="x" * 10_000)
        writes.params(run, rate=0.2, seed=0, added=1)
        writes.metrics(run, {"not a name: \n?*": 1.0})
        writes.tags(run, **{"neither\n": "x"})
        writes.files(run, [folder / "no such file"])
        writes.metrics(run, {"nan": float("nan"), "infinite": float("inf"), "before": 0.5})
        writes.note(run, "the rest goes on")
        writes.client()  # waits until all before is written
        one_server.client.delete_experiment(experiment)
        writes.metrics(run, {"after": 0.5})
        writes.close()
    return said, one_server.client.search_runs([experiment]), writes


def test_a_run_whose_opening_was_answered_with_an_error_is_not_opened_twice(troubled):
    _, runs, _ = troubled
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_an_experiment_that_was_deleted_on_the_page_is_restored_and_a_line_says_so(troubled):
    said, (run,), _ = troubled
    line = "The experiment 'troubled' was deleted in MLflow; it is restored, with its runs."
    assert said.count(line) == 2
    assert run.data.metrics["before"] == run.data.metrics["after"] == 0.5


def test_what_the_store_refuses_costs_one_warning_and_the_rest_goes_on(troubled):
    said, (run,), writes = troubled
    (warning,) = (line for line in said if line.startswith("warning"))
    assert "did not take metrics" in warning and not writes.broken
    assert run.data.metrics["infinite"] > 1e300
    assert run.data.tags["mlflow.note.content"] == "the rest goes on"


def test_a_parameter_keeps_its_value_and_a_new_one_becomes_a_tag(troubled):
    _, (run,), _ = troubled
    assert {name: run.data.params[name] for name in ("rate", "seed", "added")} == {
        "rate": "0.1", "seed": "0", "added": "1",
    }  # fmt: skip
    assert run.data.params["long"].startswith("xxx")
    assert run.data.tags["resumed.rate"] == "0.2" and "resumed.seed" not in run.data.tags


def test_trouble_of_the_store_is_told_from_a_mistake():
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.protos.databricks_pb2 import REQUEST_LIMIT_EXCEEDED, TEMPORARILY_UNAVAILABLE

    passing = (
        MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE),
        MlflowException("slower", error_code=REQUEST_LIMIT_EXCEEDED),
        MlflowException("API request to http://127.0.0.1:1 failed with timeout exception"),
        RestException({"error_code": "INTERNAL_ERROR", "message": "the server's database is locked"}),
        ConnectionResetError(),
    )
    lasting = (
        MlflowException("a mistake of the caller's, to which MLflow gives no code"),
        RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "not a name"}),
        FileNotFoundError(),
        KeyError(1),
    )
    assert all(map(may_pass, passing)) and not any(map(may_pass, lasting))


def test_without_git_the_runs_have_no_commit_and_with_changed_files_they_say_so(monkeypatch):
    for code, tags in (
        ({"commit": None, "uncommitted_changes": None}, {}),
        (
            {"commit": "c" * 40, "uncommitted_changes": True},
            {"mlflow.source.git.commit": "c" * 40, "code.uncommitted_changes": "true"},
        ),
    ):
        monkeypatch.setattr("waferlab.records._commit_of_this_code", lambda code=code: code)
        assert code_tags() == tags


def test_one_object_runs_twice_and_resumes_under_another_spelling_of_its_folder(
    tiny_npz, tmp_path, fresh_store, capsys, monkeypatch
):
    """As in a notebook: Ctrl-C, then the same object again, with its folder as somebody else spells it."""
    settings = {"enable_optuna": False, "max_epochs": 1, "registry_name": None}
    config = ExperimentConfig(**tiny_settings(tiny_npz, tmp_path, **settings))
    pipeline = IntegratedMLPipeline(config)
    evaluate = pipeline.evaluate

    def interrupt(*args):
        raise KeyboardInterrupt

    pipeline.evaluate = interrupt
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_complete_pipeline()
    pipeline.evaluate = evaluate
    first, _ = runs_of(tmp_path)
    assert {run.info.status for run in first.values()} == {"KILLED"}

    monkeypatch.chdir(tmp_path.parent)
    pipeline.config = dataclasses.replace(config, output_dir=tmp_path.name, resume=True)
    pipeline.run_complete_pipeline()
    runs, _ = runs_of(tmp_path)
    assert {name: run.info.run_id for name, run in runs.items()} == {n: run.info.run_id for n, run in first.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "output_dir" not in runs["tiny"].data.params
    assert "warning" not in capsys.readouterr().err


def test_what_the_tracker_says_is_printed_as_it_is(tiny_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("integrated_pipeline.RunTree", lambda *args, **kwargs: SimpleNamespace(**kwargs))
    pipeline = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(tiny_npz, tmp_path)))
    line = "warning: goes on without MLflow at /lots[red]/of[/b]/:smile:/mlflow.db"
    pipeline.open_tracking().warn(line)
    assert capsys.readouterr().err == f"{line}\n"


CHILD = """
import json, sys
from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()
"""


def wait_for(condition, *, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def start_and_wait_for_trial(config, tmp_path, number, *, code=CHILD):
    child = warm.Popen(
        [sys.executable, "-c", code, json.dumps(config)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )

    def there():
        assert child.poll() is None, child.stderr.read().decode()
        return f"trial {number}" in names_of_runs(tmp_path / "mlflow.db")

    wait_for(there)
    return child


def ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def names_of_runs(database):
    """Looks without MLflow's client, which would itself set to making the tables of a fresh database."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM runs")}
    except sqlite3.OperationalError:  # not there yet, or being made
        return set()


@pytest.mark.long
def test_after_a_kill_the_next_start_closes_the_runs_and_resuming_goes_on(tiny_npz, tmp_path):
    config = tiny_settings(tiny_npz, tmp_path, search_epochs=5, pruner="none", registry_name=None)
    child = start_and_wait_for_trial(config, tmp_path, 1)
    child.kill()
    child.wait()
    child.stderr.close()
    before, _ = runs_of(tmp_path)
    assert before["tiny"].info.status == "RUNNING"

    summary = IntegratedMLPipeline(ExperimentConfig(**config, resume=True)).run_complete_pipeline()
    after, _ = runs_of(tmp_path)
    assert after["trial 1"].info.status == "KILLED"
    assert after["trial 1"].data.tags["reason"] == "its process was killed"
    assert after["tiny"].info.run_id == before["tiny"].info.run_id  # the same run went on
    statuses = {name: run.info.status for name, run in after.items() if name != "trial 1"}
    assert set(statuses.values()) == {"FINISHED"}, statuses
    assert "reason" not in after["tiny"].data.tags  # it did not stay killed
    trials = summary["models"][0]["search"]["trials"]
    (again,) = (trial for trial in trials if trial.get("again") == 1)
    assert again["parameters"] == trials[1]["parameters"]
    logged = after[f"trial {again['number']}"].data.params
    assert {k: str(v) for k, v in again["parameters"].items()}.items() <= logged.items()
    assert len(after) == 6


def test_a_store_that_hangs_does_not_hold_the_program_up(tmp_path, monkeypatch):
    monkeypatch.setattr("waferlab.tracking.line.STORE_WAIT", 0.5)
    monkeypatch.setattr("waferlab.tracking.line.STOP_WAIT", 0.1)
    warnings = []
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes what is sent and never answers
        writes = RunTree(
            "tiny", uri=f"http://127.0.0.1:{silent.getsockname()[1]}", folder=tmp_path, warn=warnings.append
        )
        run = writes.start("a run")
        with pytest.raises(RegistryError, match="could not be used"):
            writes.champion("nobody", into=tmp_path)
        assert writes.run_id(run) is None and writes.experiment_id is None  # nobody waits again
        writes.close()
    assert len(warnings) == 1 and "within 0.5 s" in warnings[0]


def test_a_large_file_on_its_way_to_the_registry_is_waited_for(tmp_path, monkeypatch, fresh_store):
    writes = RunTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    run = writes.start("a run")
    assert writes.run_id(run)
    monkeypatch.setattr("waferlab.tracking.line.STORE_WAIT", 0.2)
    monkeypatch.setattr(writes, "_versions", lambda name: time.sleep(1) or ["arrived"])
    assert writes.versions("a model") == ["arrived"]
    monkeypatch.setattr("waferlab.tracking.line.STORE_WAIT", 60.0)
    writes.end(run)
    writes.close()
    assert runs_of(tmp_path)[0]["a run"].info.status == "FINISHED"


@pytest.mark.long
def test_a_program_without_a_main_guard_tracks(tiny_npz, tmp_path):
    config = tiny_settings(tiny_npz, tmp_path, enable_optuna=False, max_epochs=1, registry_name=None)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv.append({json.dumps(config)!r})\n{CHILD}"
    )
    environment = without_mlflows_settings()
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert {run.info.status for run in runs_of(tmp_path)[0].values()} == {"FINISHED"}


def test_a_fresh_database_is_moved_into_place_whole_unless_another_program_was_first(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    database, files = tmp_path / "mlflow.db", (tmp_path / "mlruns").as_uri()
    link = os.link

    def come_second(whole, place):
        database.write_bytes(b"of another program")
        link(whole, place)

    with monkeypatch.context() as patch:
        patch.setattr("os.link", come_second)
        make_database(database, files=files)
    assert database.read_bytes() == b"of another program"
    make_database(database, files=files)  # there is one
    assert database.read_bytes() == b"of another program"
    database.unlink()
    make_database(database, files=files)
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]
    assert names_of_runs(database) == set()
    assert MlflowClient(f"sqlite:///{database}").get_experiment("0").artifact_location == f"{files}/0"
    (tmp_path / "plain").touch()
    assert database.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_program_that_is_killed_while_it_makes_a_database_leaves_none(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from waferlab.tracking.runs import make_database
def slow(*_):
    print("at work", flush=True)
    time.sleep(60)
os.link = slow  # all of it is written by then
make_database(Path(sys.argv[1]) / "mlflow.db", files="file:///files")
"""
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"at work\n"
    child.kill()
    child.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    make_database(tmp_path / "mlflow.db", files="file:///files")
    assert names_of_runs(tmp_path / "mlflow.db") == set()
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_ctrl_c_closes_the_runs_as_killed(tiny_npz, tmp_path, fresh_store):
    config = tiny_settings(tiny_npz, tmp_path, search_epochs=200, pruner="none")
    child = start_and_wait_for_trial(config, tmp_path, 0)
    child.send_signal(signal.SIGINT)
    child.wait(timeout=60)
    child.stderr.close()
    runs, _ = runs_of(tmp_path)
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert runs["tiny"].data.tags["reason"] == "interrupted"


SCRIPT = """
import json, sys
from waferlab import command_line

def work():
    from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline
    IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()

sys.exit(command_line.run(work))
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_script_like_ctrl_c_with_its_own_status(sent, status, tiny_npz, tmp_path, fresh_store):
    config = tiny_settings(tiny_npz, tmp_path, search_epochs=200, pruner="none")
    child = start_and_wait_for_trial(config, tmp_path, 0, code=SCRIPT)
    child.send_signal(sent)
    _, printed = child.communicate(timeout=60)
    assert child.returncode == status and b"To go on: python" in printed and b"--resume" in printed
    assert b"Traceback" not in printed
    runs, _ = runs_of(tmp_path)
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert runs["tiny"].data.tags["reason"] == "interrupted"


def test_a_program_that_ends_without_closing_the_tree_leaves_no_run_open(tmp_path, fresh_store):
    code = """
import sys
from importlib.metadata import version
from pathlib import Path
from waferlab.tracking.runs import RunTree
RunTree("tiny", uri=None, folder=Path(sys.argv[1]), warn=print).start("a run")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    run = runs_of(tmp_path)[0]["a run"]
    assert (run.info.status, run.data.tags["reason"]) == ("KILLED", "it was not closed")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", None),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (ValueError("no maps"), "FAILED", "ValueError: no maps"),
    ],
)
def test_a_tree_is_closed_by_what_becomes_of_the_block(tmp_path, fresh_store, error, status, reason):
    writes = RunTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), writes.closing():
        writes.start("a run")
        if error:
            raise error
    assert writes.closed
    run = runs_of(tmp_path)[0]["a run"]
    assert (run.info.status, run.data.tags.get("reason")) == (status, reason)


def test_without_tracking_the_same_calls_do_nothing_and_a_misspelt_one_is_an_error(tmp_path):
    nothing = NoRuns()
    writes = RunTree("tiny", uri=None, folder=tmp_path, warn=lambda line: None)
    writes.close()
    assert {name for name in dir(writes) if not name.startswith("_")} == {
        name for name in dir(nothing) if not name.startswith("_")
    }
    with nothing.closing():
        run = nothing.start("a run", parent=None, key="key")
        nothing.metrics(run, {"loss": 1.0}, step=1)
        assert nothing.logger(run) is False and nothing.run_link(run) is None
    with pytest.raises(AttributeError):
        nothing.metricss(run, {"loss": 1.0})
    with pytest.raises(RegistryError, match="nothing is tracked"):
        nothing.versions("a model")


@pytest.mark.parametrize(("ignored", "status"), [(False, 129), (True, 0)])
def test_a_terminal_that_closes_ends_a_script_unless_nohup_forbids_it(ignored, status):
    code = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "True" else signal.SIG_DFL)
from waferlab import command_line
sys.exit(command_line.run(lambda: signal.raise_signal(signal.SIGHUP)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(ignored)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("To go on" in done.stderr) == (not ignored)


def test_runs_of_a_process_that_still_lives_are_left_alone(tmp_path, fresh_store):
    first = RunTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    first.start("living")
    wait_for(lambda: names_of_runs(tmp_path / "mlflow.db") == {"living"})
    second = RunTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    second.close()
    assert runs_of(tmp_path)[0]["living"].info.status == "RUNNING"
    first.close()
    assert runs_of(tmp_path)[0]["living"].info.status == "FINISHED"


def test_a_process_is_known_by_more_than_its_number(monkeypatch):
    mine = this_process()
    host, number, started = mine.rsplit(" ", 2)
    assert still_runs(mine)
    assert not still_runs(f"{host} {number} 1{started}") and not still_runs(f"{host} {2**22 + 1} {started}")
    with monkeypatch.context() as patch:  # where there is no /proc
        patch.setattr("waferlab.tracking.processes.PROC", Path("/none"))
        assert still_runs(this_process()) and not still_runs(mine)
    assert still_runs(f"another-host {number} {started}")  # cannot know: leaves it alone


def test_of_a_container_that_has_this_hosts_name_one_cannot_know_which_processes_it_runs(monkeypatch):
    where_numbers_hold.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("waferlab.tracking.processes.PROC", Path("/none"))  # no namespace: as if there were another
        place = this_process().partition(" ")[0]
    where_numbers_hold.cache_clear()
    _, number, started = this_process().rsplit(" ", 2)
    assert place != this_process().partition(" ")[0] and still_runs(f"{place} {number} 1{started}")


# --- registry


@pytest.fixture(scope="module")
def registered(tiny_arrays, tmp_path_factory):
    """Three pipelines in one folder, without a search: a first one, a better one, a worse one.

    Each map is a lot of its own, so that the test part has lots enough for an interval.
    """
    import numpy as np

    folder = tmp_path_factory.mktemp("registered")
    np.savez(folder / "tiny.npz", **{name: array for name, array in tiny_arrays.items() if name != "group"})
    outcomes = []
    for name, epochs in (("first", 4), ("better", 25), ("worse", 1)):
        config = tiny_settings(
            folder / "tiny.npz", folder, enable_optuna=False, max_epochs=epochs, experiment_name=name
        )
        pipeline = IntegratedMLPipeline(ExperimentConfig(**config))
        outcomes.append((pipeline, pipeline.run_complete_pipeline()))
    return folder, outcomes


def test_only_a_better_model_becomes_champion_and_the_reason_is_written(registered):
    from mlflow import MlflowClient

    folder, outcomes = registered
    first, better, worse = (summary["registered"] for _, summary in outcomes)
    assert [r["alias"] for r in (first, better, worse)] == ["champion", "champion", "challenger"]
    assert better["comparison"]["interval"][0] > 0 > worse["comparison"]["difference"]
    assert better["maps_compared"] == sum(outcomes[1][1]["split"]["class_counts"]["test"].values())
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    name = better["name"]
    assert str(client.get_model_version_by_alias(name, "champion").version) == better["version"]
    challenger = client.get_model_version_by_alias(name, "challenger")
    assert "so it is challenger" in challenger.description
    assert f"version {better['version']}" in challenger.description
    assert "uint8 [N, rows, columns]" in client.get_registered_model(name).description


@pytest.mark.long
def test_a_run_that_is_resumed_after_it_registered_makes_no_second_version(registered):
    from mlflow import MlflowClient

    folder, outcomes = registered
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    name = outcomes[0][1]["registered"]["name"]
    before = {version.version: version.description for version in client.search_model_versions(f"name='{name}'")}
    assert len(before) == 3
    for (pipeline, summary), alias in zip(outcomes, (None, "champion", "challenger"), strict=True):
        again = IntegratedMLPipeline(dataclasses.replace(pipeline.config, resume=True)).run_complete_pipeline()
        assert again["registered"]["version"] == summary["registered"]["version"]
        assert again["registered"]["alias"] == alias
        assert f"before, as version {summary['registered']['version']}" in again["registered"]["verdict"]
    assert before == {v.version: v.description for v in client.search_model_versions(f"name='{name}'")}


def test_checkpoint_file_and_registered_model_agree(registered):
    import mlflow
    import numpy as np

    from waferlab.data.images import resize_maps
    from waferlab.deployment.promotion import MAX_DIFFERENCE
    from waferlab.evaluation.inference import predict_probabilities
    from waferlab.records import TrainingRecord
    from waferlab.tracking.registry import as_the_programs_own

    folder, outcomes = registered
    pipeline, summary = outcomes[1]
    (record,) = summary["models"]
    test_maps = pipeline.maps.select(pipeline.split.test)
    model = pipeline.load_model(TrainingRecord.from_json(record))
    expected = predict_probabilities(model, resize_maps(test_maps, 16))
    with as_the_programs_own(f"sqlite:///{folder / 'mlflow.db'}"):
        champion = mlflow.pyfunc.load_model(f"models:/{summary['registered']['name']}@champion")
    for i in range(len(test_maps)):
        answer = champion.predict({"maps": test_maps[i][None]})["probabilities"]
        # a pixel half-way between two grey levels may be rounded the other way
        np.testing.assert_allclose(answer[0], expected[i], atol=MAX_DIFFERENCE)
    assert summary["registered"]["largest_difference_to_checkpoint"] < MAX_DIFFERENCE


# --- the server


@pytest.mark.long
def test_the_page_is_up_on_this_machine_only_and_stops_without_leftovers(tmp_path):
    from urllib.request import urlopen

    writes = RunTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    run = writes.start("a run")
    experiment_id = writes.experiment_id
    server = MlflowServer(writes.uri, port=5123)
    try:
        server.wait_until_up()
        assert server.link(experiment_id).startswith("http://127.0.0.1:")
        assert server.link(experiment_id, run.id) == f"{server.url}/{writes.run_link(run)}"
        assert writes.run_link(run) == f"#/experiments/{experiment_id}/runs/{run.id}"
        with urlopen(server.url) as page:
            assert b"MLflow" in page.read()
        processes = [psutil.Process(server._process.pid)]
        processes += processes[0].children(recursive=True)
        listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
    finally:
        server.stop()
        writes.close()
    assert not any(process.is_running() for process in processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_server_goes_when_the_program_goes_however_it_goes(tmp_path, number):
    (tmp_path / "mlflow").mkdir()  # a small server in MLflow's place
    (tmp_path / "mlflow" / "__init__.py").touch()
    (tmp_path / "mlflow" / "__main__.py").write_text("""
import http.server, subprocess, sys

subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Page).serve_forever()
""")
    code = """
import signal, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have had it ignored
from waferlab.tracking.server import MlflowServer
server = MlflowServer("sqlite:///none.db", port=5240)
server.wait_until_up()
print("up", flush=True)
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    assert program.stdout.readline() == b"up\n"
    family = psutil.Process(program.pid).children(recursive=True)
    assert len(family) == 3  # who watches, the server, what it started
    program.send_signal(number)
    program.communicate()
    wait_for(lambda: all(map(ended, family)), seconds=30)


def test_a_taken_port_is_passed_over(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_port(port) != port


def test_a_warning_of_a_store_says_no_password(tmp_path, monkeypatch):
    monkeypatch.setattr("waferlab.tracking.line.STORE_WAIT", 0.5)
    monkeypatch.setattr("waferlab.tracking.line.STOP_WAIT", 0.1)
    warnings = []
    writes = RunTree("tiny", uri="http://me:s3cret@127.0.0.1:9", folder=tmp_path, warn=warnings.append)
    writes.start("a run")
    writes.close()
    assert warnings and "http://me@127.0.0.1:9" in " ".join(warnings) and "s3cret" not in " ".join(warnings)


def test_what_a_store_says_of_itself_is_repeated_without_its_password():
    error = ConnectionError("Max retries exceeded: http://me:s3cret@mlflow:5000/api/2.0/mlflow/runs/create")
    assert in_a_line(error) == "ConnectionError: Max retries exceeded: http://me@mlflow:5000/api/2.0/mlflow/runs/create"


def test_why_a_run_failed_is_kept_without_a_password(tmp_path, fresh_store):
    writes = RunTree("tiny", uri=None, folder=tmp_path, warn=pytest.fail)
    with pytest.raises(ValueError, match="s3cret"), writes.closing():
        writes.start("a run")
        raise ValueError("postgresql://me:s3cret@db is not there")
    reason = runs_of(tmp_path)[0]["a run"].data.tags["reason"]
    assert reason == "ValueError: postgresql://me@db is not there"


@pytest.mark.long
def test_the_page_of_a_program_that_took_the_port_first_is_not_taken_for_ours(tmp_path):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("waferlab.tracking.server._free_port", lambda port: other.server_port)
            server = MlflowServer(f"sqlite:///{tmp_path}/mlflow.db")
        with pytest.raises(ServerError, match=str(other.server_port)):
            server.wait_until_up()
        other.shutdown()


def test_the_page_of_mlflow_is_refused_where_runs_go_elsewhere(tiny_npz, tmp_path):
    pytest.importorskip("wandb")
    made = IntegratedMLPipeline(ExperimentConfig(**tiny_settings(tiny_npz, tmp_path, tracker="wandb")))
    with pytest.raises(ConfigError, match="not on MLflow's page"), mlflow_page(made, wanted=True):
        pytest.fail("it was shown")


def test_where_a_server_is_there_already_its_page_is_named_and_none_is_started(tmp_path, capsys):
    tracking = SimpleNamespace(uri="https://me:secret@mlflow.example.org", experiment_id="7")
    config = SimpleNamespace(enable_mlflow=True, tracker="mlflow", output_dir=tmp_path)
    with mlflow_page(SimpleNamespace(config=config, open_tracking=lambda: tracking), wanted=True):
        said = capsys.readouterr().out
    assert said.startswith("MLflow: https://me@mlflow.example.org/#/experiments/7/runs")
    config.output_dir = tmp_path / "file"
    config.output_dir.touch()
    with (
        pytest.raises(ConfigError, match="file cannot be written"),
        mlflow_page(SimpleNamespace(config=config, open_tracking=lambda: tracking), wanted=True),
    ):
        pytest.fail("it went on")
