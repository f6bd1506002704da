"""Processes by a name that no other ever has."""

from __future__ import annotations

import os
import platform


def this_process() -> str:
    """Host, process number and start time: a number alone may belong to another process tomorrow."""
    import psutil

    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.0f}"


def still_runs(process: str) -> bool:
    """Whether a process that `this_process` named may still run; of other hosts one cannot know, so it may."""
    import psutil

    host, number, started = process.rsplit(" ", 2)
    if host != platform.node():
        return True
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" == started
    except psutil.NoSuchProcess:
        return False
