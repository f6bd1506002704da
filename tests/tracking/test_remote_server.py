"""Promises about a remote MLflow server: with a login, its own artifact store, a slow link, and a restart."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib import request
from urllib.error import HTTPError

import mlflow
import pytest
from made_up import Scripted, pipeline

from waferlab.tracking.registered import fetch_registered
from waferlab.tracking.runs import make_database

WAIT = 120  # seconds for what takes some on a quiet machine
LATENCY = 0.02  # seconds, each way
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a-long-password-1"}


class SlowLink:
    """Forwards connections to a port, each piece late; while nobody listens there, connections are refused."""

    def __init__(self, port):
        self._to = port
        self._listens = socket.create_server(("127.0.0.1", 0))
        self.port = self._listens.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listens.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                near.close()
                continue
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source, target):
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                time.sleep(LATENCY)
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listens.close()


class RemoteServer:
    """MLflow's server with its basic-auth app; it hands its artifacts out itself."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "grant_default_workspace_access = false\nauth_cache_ttl_seconds = 60\n"
        )
        make_database(folder / "server.db", files="mlflow-artifacts:/")
        self.link = SlowLink(self.port)
        self.uri = f"http://127.0.0.1:{self.link.port}"
        self.start()

    def start(self):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "s3cret",
            "MLFLOW_AUTH_ADMIN_PASSWORD": LOGIN["MLFLOW_TRACKING_PASSWORD"], "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        log = (self.folder / "server.log").open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
             "--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
             "--artifacts-destination", str(self.folder / "files"), "--serve-artifacts", "--workers", "1"],
            env=environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + WAIT
        while not self.answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)

    def answers(self):
        try:
            with request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return answer.status == 200
        except HTTPError:
            return True
        except OSError:
            return False

    def stop(self):
        os.killpg(self._process.pid, 9)
        self._process.wait()


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    server = RemoteServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()
    server.link.close()


@pytest.fixture
def server(remote, monkeypatch):
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    return remote


@pytest.mark.long
@pytest.mark.usefixtures("scripted")
def test_a_server_with_a_login_that_restarts_behind_a_slow_link_loses_nothing(server, tiny_npz, tmp_path, monkeypatch):
    start, restarted = Scripted.on_train_epoch_start, []

    def restart_once(self):
        if self.current_epoch == 1 and not self.to_go_on and not restarted:
            server.stop()
            threading.Timer(3.0, server.start).start()
            restarted.append(True)
        time.sleep(0.5)
        start(self)

    monkeypatch.setattr(Scripted, "on_train_epoch_start", restart_once)
    made = pipeline(
        tiny_npz, tmp_path, enable_mlflow=True, tracking_uri=server.uri, enable_optuna=True, num_optuna_trials=2,
        search_epochs=1, max_epochs=5,
    )  # fmt: skip
    warned = []
    made.terminal.warn = warned.append
    summary = made.run_complete_pipeline()
    assert restarted and summary["registered"]["alias"] == "champion", (summary["problems"], warned)

    client = mlflow.MlflowClient(server.uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("tiny").experiment_id])}
    assert runs.keys() == {"tiny", "scripted_optimized", "trial 0", "trial 1"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    of_model = runs["scripted_optimized"].info.run_id
    steps = [metric.step for metric in client.get_metric_history(of_model, "val_macro_f1")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5]
    kept = {file.path for file in client.list_artifacts(runs["tiny"].info.run_id)}
    assert {"report.html", "experiment_summary.json"} <= kept, kept
    fetched = fetch_registered(summary["registered"]["uri"], into=tmp_path / "fetched", tracking_uri=server.uri)
    assert fetched.file.read_bytes() == (tmp_path / "checkpoints/tiny/scripted/model.onnx").read_bytes()
    assert str(server.folder / "files") not in runs["tiny"].info.artifact_uri  # the server hands them out itself


def test_a_wrong_password_costs_a_warning_and_not_the_training(server, tiny_npz, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-long-password")
    made = pipeline(tiny_npz, tmp_path, enable_mlflow=True, tracking_uri=server.uri, model_type="lightning_cnn")
    warned = []
    made.terminal.warn = warned.append
    summary = made.run_complete_pipeline()
    assert summary["models"][0]["epochs"] > 0 and summary.get("registered") is None
    assert any(server.uri in line for line in warned), warned
    assert "another-long-password" not in " ".join(warned)
