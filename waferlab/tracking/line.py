"""A line of calls to a store that may be slow, refuse some, or be away for a while."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  for MLflow: a program that is ending cannot import it any more
import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, wait
from enum import Enum, auto
from functools import partial, wraps
from typing import Any, NamedTuple

from waferlab.tracking.addresses import without_password

STORE_WAIT = 60.0  # seconds that the end of a program, or one who needs an answer, waits for what is to be written
OUTAGE = 30.0  # seconds of failed tries after which nobody waits for the store any longer
FIRST_PAUSE = 0.5  # seconds before the second try; each further pause is twice as long, up to OUTAGE
STOP_WAIT = 5.0  # seconds that the thread has to end


class Trouble(Enum):
    """What a failed call may hope for: nothing; a later try; or a later try, when other calls succeed again too."""

    LASTING, PASSING, AWAY = auto(), auto(), auto()


def in_line(method: Callable[..., Any]) -> Callable[..., None]:
    """Whoever calls the method goes on at once; it is carried out after all that was called before."""

    @wraps(method)
    def later(self: Line, *arguments: Any, **named: Any) -> None:
        self._later(partial(method, self, *arguments, **named), method.__name__.strip("_"))

    return later


class Line(ABC):
    """Carries out calls in order, in a thread of its own, so that nobody who works waits for the store.

    What fails because the store is away is tried again, and all that comes after it waits in line. What the store
    refuses is left out, and the rest goes on. A subclass says how to `_open` the store and how to `_judge` an error.

    Attributes:
        broken: an answer could not be had, so no other is waited for.

    Args:
        store: what the warnings call it.
        warn: called with a line at the first trouble, and if the store stays away until the end; from the thread.
    """

    def __init__(self, store: str, warn: Callable[[str], None]) -> None:
        self._store, self._print = store, warn
        self.broken = self._given_up = self._somebody_waits = False
        self._warned_of: Exception | None = None
        self._failing_since: float | None = None
        self._carried_out: Future | None = None  # the answer of the call that is
        self._given = 0  # when the call that is carried out was made, in milliseconds since 1970
        self._try_now = threading.Event()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._opened = self._later(self._open, "open")
        self._thread = threading.Thread(target=self._carry_out_all, name="tracking", daemon=True)
        self._thread.start()

    @abstractmethod
    def _open(self) -> Any:
        """Connects to the store; without that, nothing else can be done."""

    @abstractmethod
    def _judge(self, error: Exception) -> Trouble:
        """What a call that raised this error may hope for."""

    def _later(self, do: Callable[[], Any], name: str) -> Future:
        """Has a call carried out after all before it; the future holds the answer, or None if the line is given up.

        If the store refuses it, there is a warning with its name, once; without a name, whoever waits is told.
        """
        call = _Call(do, name, int(time.time() * 1000), Future())
        if self._given_up:
            call.answer.set_result(None)
        else:
            self._calls.put(call)
        return call.answer

    def _wait(self, answer: Future) -> Any:
        """An answer, or None if it cannot be had; then no other is waited for."""
        return None if self.broken else self._answer(answer)

    def _answer(self, answer: Future) -> Any:
        try:
            return self._result(answer)
        except Exception as error:
            self.broken = True
            if error is not self._warned_of:
                self._say(f"warning: no answer from {self._store} ({in_a_line(error)})")

    def _result(self, answer: Future, *, patient: bool = False) -> Any:
        """An answer, or None if the line is given up; raises what the call raised.

        Who is patient waits longer for a call that is being carried out without an error: a large file takes its time,
        and nobody could say afterwards whether it has arrived.
        """
        self._somebody_waits = True
        self._try_now.set()
        try:
            wait([answer], timeout=STORE_WAIT)
            while patient and self._carried_out is answer and not (answer.done() or self._failing_since):
                wait([answer], timeout=1.0)
        finally:
            self._somebody_waits = False
        if answer.done():
            return answer.result()
        return self._give_up(f"it did not take everything within {STORE_WAIT:g} s")

    def _stop(self) -> None:
        """Waits until everything is carried out, or cannot be, and ends the thread."""
        try:
            self._answer(self._later(time.time, "close"))
        finally:
            self._given_up = True
            self._try_now.set()
            self._calls.put(None)
            self._thread.join(STOP_WAIT)

    def _carry_out_all(self) -> None:
        while (call := self._calls.get()) is not None:
            self._carried_out = call.answer
            try:
                call.answer.set_result(self._carry_out(call))
            except Exception as error:  # for whoever waits for the answer
                call.answer.set_exception(error)

    def _carry_out(self, call: _Call) -> Any:
        """Tries until the store takes a call, or refuses it, or fails for `OUTAGE` although it answers."""
        pause = FIRST_PAUSE
        while not self._given_up:
            self._given = call.given
            try:
                answer = call.do()
            except Exception as error:  # whatever MLflow, a server or a disk does
                trouble = self._judge(error)
                if trouble is Trouble.LASTING:
                    return self._refused(call, error)
                self._failing_since = self._failing_since or time.monotonic()
                left = self._failing_since + OUTAGE - time.monotonic()
                if left <= 0:
                    if trouble is Trouble.AWAY and self._somebody_waits:
                        return self._give_up(in_a_line(error))
                    self._warn_once(f"goes on without {self._store} until it takes what waits", error)
                    if trouble is Trouble.PASSING:
                        raise
                self._try_now.wait(pause if left <= 0 else min(pause, left))
                self._try_now.clear()
                pause = min(2 * pause, OUTAGE)
            else:
                self._failing_since = None
                return answer
        return None

    def _refused(self, call: _Call, error: Exception) -> None:
        if call.answer is self._opened:
            return self._give_up(in_a_line(error))
        if call.name:
            self._failing_since = None
            self._warn_once(f"the rest goes on; {self._store} did not take {call.name}", error)
        raise error

    def _give_up(self, reason: str) -> None:
        """Nothing is carried out any more, and nobody waits."""
        if not self._given_up:
            self._given_up = self.broken = True
            since = time.strftime("%H:%M:%S", time.localtime(self._given / 1000))
            what = f"nothing from {since} on was written to" if self._warned_of else "goes on without"
            self._say(f"warning: {what} {self._store} ({reason})")

    def _warn_once(self, line: str, error: Exception) -> None:
        if self._warned_of is None:
            self._warned_of = error
            self._say(f"warning: {line} ({in_a_line(error)})")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._print(line)


class _Call(NamedTuple):
    do: Callable[[], Any]
    name: str
    given: int
    answer: Future


def in_a_line(error: Exception) -> str:
    """Kind and first line of an error, shortened in its middle: where it was is said first, what was wrong last.

    An address in it loses its password.
    """
    line = without_password((str(error).strip().splitlines() or [""])[0])
    return f"{type(error).__name__}: {line if len(line) <= 200 else f'{line[:98]} ... {line[-98:]}'}"
