"""Processes by a name that no other ever has, and the cores that they may use."""

from __future__ import annotations

import os
import platform
import zlib
from functools import cache
from pathlib import Path

PROC = Path("/proc")  # of Linux


@cache
def where_numbers_hold() -> str:
    """Eight hex digits: this host, and within it the container, as each counts its own processes."""
    try:
        namespace = (PROC / "self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


def this_process() -> str:
    """Host and container, process number and start: a number alone may belong to another process tomorrow."""
    return f"{platform.node()}/{where_numbers_hold()} {os.getpid()} {_start(os.getpid())}"


def still_runs(process: str) -> bool:
    """Whether a process that `this_process` named may still run; one cannot know elsewhere, so there it may.

    Containers of one host may have its name, and see only their own processes.
    """
    where, number, started = process.rsplit(" ", 2)
    return where.rpartition("/")[2] != where_numbers_hold() or _start(int(number)) == started


def is_gone(number: int) -> bool:
    """Whether there is no process of that number on this machine."""
    return _start(number) is None


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(number: int) -> str | None:
    """When a process was started, in a word without spaces; None if there is none.

    On Linux counted from the start of the machine: a time of day would be another one once the clock is set.
    """
    if (PROC / "self/stat").exists():
        try:
            ticks = (PROC / f"{number}/stat").read_text().rpartition(")")[2].split()[19]
            return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()}+{ticks}"
        except OSError:
            return None
    import psutil

    try:
        return f"{psutil.Process(number).create_time():.0f}"
    except psutil.NoSuchProcess:
        return None
