"""Runs a command until our input ends, then ends it with all that it started; a script of its own, run by its path.

Must lead a process group. However the program at the other end of the pipe goes, by SIGKILL too, the pipe is closed
then.
"""

import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE = 5.0  # seconds between asking the group to end and ending it


def watch(command: list[str]) -> None:
    """Returns never: the group that it ends is its own."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the others of the group end first
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end_with_the_child() -> None:
        child.wait()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_the_child, daemon=True).start()
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)
    time.sleep(PATIENCE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.argv[1:])
