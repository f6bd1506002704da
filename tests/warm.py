"""Programs for tests that begin in a moment: each is forked from a process that has imported what all of them import.

To import PyTorch, Lightning, scikit-learn and MLflow takes longer than most of what tests let programs do. `run` and
`Popen` are those of `subprocess`, for commands that begin with `sys.executable`: the program is a process of its own,
with the environment, folder, files and signals that it is given, and can be killed like any other. A test about what a
program imports, or how soon it answers, starts a real one.
"""

import json
import os
import signal
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
            "args": [os.fspath(one) for one in args[1:]], "cwd": os.fspath(cwd or os.getcwd()),
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
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                asked.close()
                become(files, question)
        for file in files:
            os.close(file)
        asked.send(json.dumps(answer).encode())


def import_everything():
    import lightning.pytorch  # noqa: F401
    import mlflow.pyfunc  # noqa: F401
    import onnxruntime  # noqa: F401
    import optuna  # noqa: F401
    import torchvision.models  # noqa: F401

    import integrated_pipeline  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()


def become(files, question):
    """The program that was asked for; does not return."""
    import atexit
    import gc

    status = 70
    try:
        atexit._clear()
        if question["session"]:
            os.setsid()
        for number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        os.chdir(question["cwd"])
        os.environ.clear()
        os.environ.update(question["env"])
        gc.freeze()
        status = as_program(question["args"])
    finally:
        os._exit(status)


def as_program(args):
    """Runs `-c code`, `-m module` or a script as Python would, and gives its exit status."""
    import atexit
    import runpy

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    while args[0] == "-u":
        args = args[1:]
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    try:
        if args[0] == "-c":
            sys.argv, sys.path[:0] = ["-c", *args[2:]], [""]
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(args[1], "<string>", "exec"), main.__dict__)
        elif args[0] == "-m":
            sys.argv, sys.path[:0] = [args[1], *args[2:]], [""]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = args, [os.path.dirname(os.path.abspath(args[0]))]
            runpy.run_path(args[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:  # as Python itself ends then
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
