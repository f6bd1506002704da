"""MLflow's own server on a fresh database, which answers 503 when told to: a line of JSON in, a line of JSON out.

Imported, it is the class that starts this file as a program. A program of its own, since the server sets MLflow's
addresses for the whole program and for all that it starts.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server


class UnreliableServer:
    """The server, and a client that looks into its database.

    Attributes:
        uri: where it listens.
        fresh: a copy of its database from before the first request.
    """

    def __init__(self, folder: Path):
        import warm
        from mlflow import MlflowClient

        self._process = warm.Popen(
            [sys.executable, __file__, folder], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.uri = f"http://127.0.0.1:{self._process.stdout.readline().strip()}"  # by then the database is made
        self.client, self.fresh = MlflowClient(f"sqlite:///{folder / 'server.db'}"), folder / "fresh.db"

    def set(self, *, down: bool = False, failures: int = 0, lost: str | None = None) -> dict:
        """Sets what goes wrong and returns what was left of it, and the number of `requests` until now.

        Args:
            down: every request is answered with 503.
            failures: so many of the next requests are.
            lost: the next request for this is carried out and answered with 503.
        """
        print(json.dumps({"down": down, "failures": failures, "lost": lost}), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def runs(self, experiment_name: str) -> dict:
        experiment = self.client.get_experiment_by_name(experiment_name)
        return {run.info.run_name: run for run in self.client.search_runs([experiment.experiment_id])}

    def stop(self) -> None:
        self._process.communicate()


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_):
        pass


def serve(folder: Path) -> None:
    import shutil

    from mlflow.server import app
    from mlflow.server.handlers import initialize_backend_stores

    from waferlab.tracking.runs import make_database

    uri = f"sqlite:///{folder / 'server.db'}"
    make_database(folder / "server.db", files=str(folder / "files"))
    initialize_backend_stores(uri, uri, default_artifact_root=str(folder / "files"))
    shutil.copy(folder / "server.db", folder / "fresh.db")
    state = {"down": False, "failures": 0, "lost": None, "requests": 0}

    def answer(environ, start_response):
        state["requests"] += 1
        fails = state["down"]
        if state["failures"]:
            fails, state["failures"] = True, state["failures"] - 1
        if state["lost"] and environ["PATH_INFO"].endswith(state["lost"]):
            fails, state["lost"] = True, None
            list(app(environ, lambda *_: None))
        if not fails:
            return app(environ, start_response)
        start_response("503 Service Unavailable", [])
        return [b""]

    server = make_server("127.0.0.1", 0, answer, handler_class=QuietHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    for line in sys.stdin:
        print(json.dumps(state), flush=True)
        state |= json.loads(line)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
