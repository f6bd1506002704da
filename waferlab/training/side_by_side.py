"""Work that processes of one thread each do side by side, and what they tell the one that started them.

Two trainings with one thread each get more done than one after the other with two: small steps leave a second thread
waiting, and beside any other busy program it waits nearly always. The processes are forked, so they have the maps, the
models and whatever a user's script has registered, at once and without a copy; but no threads, so trackers, terminal
and database connections stay behind: what is to be printed or tracked is told to this process, which does it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

Tell = Callable[..., None]
KILLED = "its process was killed"
LAST_WORDS = 20.0  # seconds that processes have to end when they are interrupted


def side_by_side(work: Callable[[int, Tell], None], *, workers: int, hear: Callable[..., None]) -> None:
    """Runs `work(number, tell)` in so many processes and hands what they tell to `hear(number, what, *content)`.

    What becomes of a process that was killed is heard as "killed", with how in words; the others go on.

    Raises:
        What `work` raised, of the first that did; the others are interrupted.
        KeyboardInterrupt: this process was interrupted, and has interrupted the others, which have ended.
    """
    crew: Crew = []
    try:
        for number in range(workers):
            crew.append(_start(work, number))
        _hear_out(crew, hear)
    except BaseException:
        for process, _ in crew:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        _hear_out(crew, hear, until=time.monotonic() + LAST_WORDS, raises=False)
        raise
    finally:
        for process, _ in crew:
            process.kill()
            process.join()


Crew = list[tuple[BaseProcess, Connection]]


def _start(work: Callable[[int, Tell], None], number: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, number, theirs, os.getpid()), daemon=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # one that comes before the work begins would be lost
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()
    return process, ours


def _work(work: Callable[[int, Tell], None], number: int, connection: Connection, parent: int) -> None:
    """What a forked process does; Ctrl-C in the terminal reaches only the one that forked it, which passes it on."""
    os.setpgrp()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)

    def tell(what: str, *content: Any) -> None:
        connection.send((what, *content))

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background may ignore it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work(number, tell)
    except BaseException as error:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what it raised is on its way
        tell("raised", _as_it_can_be_sent(error))


def _end_with(parent: int) -> None:
    """Nobody works for a program that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _as_it_can_be_sent(error: BaseException) -> BaseException:
    """The error, or its words where it cannot be made again from what it holds; it never leaves these processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _hear_out(crew: Crew, hear: Callable[..., None], *, until: float | None = None, raises: bool = True) -> None:
    """Until all have ended, or have been heard for long enough."""
    talking = {connection: (number, process) for number, (process, connection) in enumerate(crew)}
    while talking and (until is None or time.monotonic() < until):
        for connection in wait(list(talking), timeout=0.5):
            number, process = talking[connection]
            try:
                what, *content = connection.recv()
            except EOFError:
                del talking[connection]
                process.join()
                if process.exitcode:
                    hear(number, "killed", how_it_ended(process.exitcode))
                continue
            if what != "raised":
                hear(number, what, *content)
            elif raises:
                raise content[0]


def how_it_ended(status: int) -> str:
    """In words, of a process that did not end by itself."""
    if status == -signal.SIGKILL:
        return f"{KILLED}, most likely because the memory did not suffice for as many side by side"
    return f"its process ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"
