"""The MLflow page on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from waferlab.errors import ServerError

WATCH = Path(__file__).with_name("watch.py")
QUIET_SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class MlflowServer:
    """`mlflow ui` on 127.0.0.1, stopped with all processes that it started, at the latest when this program is gone.

    Args:
        uri: the store that it shows; it must exist, since several processes making a fresh database get in each
            other's way.
        port: tried first; the next free one is taken.

    Raises:
        ServerError: it did not come up within a minute.
    """

    def __init__(self, uri: str, *, port: int = 5000) -> None:
        self.port = _free_port(port)
        self.url = f"http://127.0.0.1:{self.port}"
        # One worker and no job processes: half the start-up time, a tenth of the memory, and nothing left behind.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WATCH), sys.executable, "-m", "mlflow", "ui",
             "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"],
            # Everybody on the machine may read the arguments of a program, and an address may hold a password.
            env=os.environ | QUIET_SERVER | {"MLFLOW_BACKEND_STORE_URI": uri},
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until_up(self, seconds: float = 60.0) -> None:
        """Returns as soon as the server answers."""
        from urllib.error import URLError
        from urllib.request import urlopen

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urlopen(f"{self.url}/health", timeout=2):
                    if self._listens():
                        return
            except (URLError, OSError):
                pass
            time.sleep(0.2)
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        self.stop()
        raise ServerError(f"The MLflow server did not start on {self.url}: {' '.join(last) or 'no answer'}")

    def _listens(self) -> bool:
        """Whether it is this server that answers, not one that another program has started at the same moment."""
        import psutil

        with suppress(psutil.Error):
            ours = psutil.Process(self._process.pid)
            for process in (ours, *ours.children(recursive=True)):
                with suppress(psutil.Error):
                    if any(one.laddr and one.laddr.port == self.port for one in process.net_connections("tcp4")):
                        return True
        return False

    def link(self, experiment_id: str, run_id: str | None = None) -> str:
        """The page of a run, or with all runs of the experiment."""
        return f"{self.url}/{page_of(experiment_id, run_id)}"

    def stop(self) -> None:
        """Ends the server and all processes that it started."""
        self._process.stdin.close()  # what `watch.py` waits for
        self._process.wait()
        self._log.close()


def page_of(experiment_id: str, run_id: str | None = None) -> str:
    """What follows a server's address for the page of a run, or with all runs of the experiment."""
    runs = f"#/experiments/{experiment_id}/runs"
    return f"{runs}?workflowType=machine_learning" if run_id is None else f"{runs}/{run_id}"


def _free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given back is free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"No free port from {first} to {first + 99}. Stop a server that runs there.")
