"""A real PostgreSQL server on 127.0.0.1, of the programs that are installed."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


class Postgres:
    """A server that is started, and can be restarted.

    Attributes:
        url: for SQLAlchemy.
    """

    def __init__(self):
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("initdb") or "").parent]
        if not (programs[-1] / "initdb").exists():
            pytest.skip("PostgreSQL is not installed")
        pytest.importorskip("psycopg")
        self._folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: the path of a socket has a limit
        self._user = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            shutil.chown(self._folder, "nobody", "nogroup")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._options = f"-p {port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._control = [programs[-1] / "pg_ctl", "-D", self._folder / "data", "-w"]
        self._run(programs[-1] / "initdb", "-D", self._folder / "data", "-U", "optuna", "-A", "trust", "-N")
        self.start()
        self.url = f"postgresql+psycopg://optuna@127.0.0.1:{port}/postgres"

    def _run(self, *command):
        subprocess.run([*self._user, *command], stdout=subprocess.DEVNULL, cwd=self._folder, check=True)

    def start(self):
        self._run(*self._control, "-l", self._folder / "log", "-o", self._options, "start")

    def stop(self, how="fast"):
        """Ends all connections, finished or not."""
        self._run(*self._control, "-m", how, "stop")

    def remove(self):
        self.stop("immediate")
        shutil.rmtree(self._folder)
