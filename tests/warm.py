"""Programs for tests that begin in a moment: `run` and `Popen` are those of `subprocess`, and fork what they start.

They take commands that begin with `sys.executable`; see `benchmarks/faults/forking.py`. A test about what a program
imports, or how soon it answers, starts a real one.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_parent = None  # of all programs of this process: a socket to it


class Popen(subprocess.Popen):
    """A program that is forked, and asked after through the process that forked it."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest):  # fmt: skip
        assert os.fspath(args[0]) == sys.executable and preexec_fn is None and not shell and not pass_fds, args
        if env is not None:
            env = {os.fspath(name): os.fspath(value) for name, value in env.items()}
        files = [fd if fd != -1 else own for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        of_session = bool(rest[-2])
        self.pid = _ask({
            "args": [os.fspath(one) for one in args[1:]], "folder": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ) if env is None else env, "session": of_session,
        }, files)["pid"]  # fmt: skip
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags):
        while True:
            status = _ask({"status_of": self.pid})["status"]
            if status is not None or wait_flags & os.WNOHANG:
                return (0, 0) if status is None else (self.pid, status)
            threading.Event().wait(0.01)

    def _internal_poll(self, _deadstate=None, *_):
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                self._handle_exitstatus(status)
        return self.returncode


def run(args, *, capture_output=False, check=False, timeout=None, input=None, **more):
    """As `subprocess.run`."""
    if capture_output:
        more |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        more["stdin"] = subprocess.PIPE
    with Popen(args, **more) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, args, out, err)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


_lock = threading.Lock()


def _ask(question, files=()):
    """The answer of the process that forks; it is started at the first question."""
    global _parent
    with _lock:
        if _parent is None:
            _parent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
            )  # fmt: skip
            theirs.close()
        socket.send_fds(_parent, [json.dumps(question).encode()], files)
        answer = _parent.recv(2**16)
    assert answer, "the process that forks programs has ended"
    return json.loads(answer)


# --------------------------------------------------------------------------------- in the process that forks


def serve(asked):
    """Forks what it is asked for and says how it ended, until nobody asks any more."""
    sys.path.insert(0, str(ROOT / "benchmarks/faults"))
    from forking import fork, import_everything

    sys.path.pop(0)
    import_everything()
    ended = {}
    while True:
        question, files, _, _ = socket.recv_fds(asked, 2**20, 3)
        if not question:
            return
        question = json.loads(question)
        if "status_of" in question:
            pid = question["status_of"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = status
            answer = {"status": ended.get(pid)}
        else:
            answer = {"pid": fork(files=files, first=asked.close, **question)}
        for file in files:
            os.close(file)
        asked.send(json.dumps(answer).encode())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
