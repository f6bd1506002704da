"""Kills a program at each of its writes: before a file is opened to write, replaced or removed, or a folder made.

The program is run once to number the calls; then once for each of them, killed just before it and, of a file that is
opened, also as it is there and still empty. So the moments between any two calls are all tried, that between the
writing of a file and its renaming among them. After each it goes on with `--resume` and has to end as in `kills.py`.
What SQLite writes is not seen from here: `kills.py` meets that.

    python benchmarks/faults/writes.py --program demo --output benchmarks/results/writes.json

Calls from the same line of the same file are one place; by default each place dies at its first and its last call, with
`--all` at each. A call with the same output file goes on.
"""

from __future__ import annotations

import argparse
import builtins
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from campaign import Lives, with_output
from forking import import_everything
from kills import epochs_of, live_unbroken
from programs import PROGRAMS, ROOT, count_epochs, make_data, start, wait
from whole import outcome, problems

CALLS = ("replace", "rename", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate")  # of os
INSIDE = (str(ROOT / "benchmarks/faults"), "/lib/python", "<frozen", "contextlib", "pathlib", "shutil", "tempfile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="demo", choices=PROGRAMS)
    parser.add_argument("--all", action="store_true", help="die at each call, not at the first and last of a place")
    arguments = with_output(parser).parse_args()

    lives = Lives("writes", output=arguments.output, keep=arguments.keep)
    done = {(life["program"], life["call"]) for life in lives}
    import_everything()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = make_data(work / "tiny.npz")
        unbroken = live_unbroken(arguments.program, {"data": data}, work / "unbroken")
        calls = calls_of(arguments.program, data, work / "counted")
        chosen = range(len(calls)) if arguments.all else firsts_and_lasts(calls)
        print(f"{len(calls)} calls at {len({*calls})} places, {len([*chosen])} to die at", flush=True)
        for number in chosen:
            if (arguments.program, number) in done:
                continue
            life = die_at(number, arguments.program, data, work / "life", unbroken)
            lives.add({"program": arguments.program, "call": number, "place": calls[number], **life}, work / "life")
    wrong = [life for life in lives if life["problems"]]
    print(f"{len(lives)} kills at {len({life['place'] for life in lives})} places, {len(wrong)} with a problem")


def firsts_and_lasts(calls: list[str]) -> list[int]:
    """Of each place the number of its first and of its last call."""
    first, last = {}, {}
    for number, place in enumerate(calls):
        first.setdefault(place, number)
        last[place] = number
    return sorted({*first.values(), *last.values()})


def calls_of(name: str, data: Path, folder: Path) -> list[str]:
    """The place of each call of a life that nobody ends."""
    folder.mkdir()
    notes = folder.with_suffix(".calls")

    def first() -> None:
        file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        before_each_write(lambda place: os.write(file, f"{place}\n".encode()))

    if status := wait(start(PROGRAMS[name].command(data), folder, folder / "log.txt", first=first)):
        raise SystemExit(f"{name}: status {status}\n{(folder / 'log.txt').read_text()[-2000:]}")
    return notes.read_text().splitlines()


def die_at(number: int, name: str, data: Path, folder: Path, unbroken: dict[str, Any]) -> dict[str, Any]:
    """A life that ends just before its call of that number, and goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command, left = PROGRAMS[name].command(data), [number]

    def die(place: str) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def first() -> None:
        count_epochs(folder / "epochs")()
        before_each_write(die)

    killed = wait(start(command, folder, folder / "log.txt", first=first), 600) == 128 + signal.SIGKILL
    child = start([*command, "--resume"], folder, folder / "log.txt", first=count_epochs(folder / "epochs"))
    status = wait(child, 600)
    found = problems(folder)
    if status != 0:
        found.insert(0, f"status {status}: {(folder / 'log.txt').read_text()[-600:]}")
    elif PROGRAMS[name].same_weights:
        if (again := epochs_of(folder) - unbroken["epochs"]) > 1:
            found.append(f"{again} epochs were trained again")
        mine = outcome(folder)
        found += [f"{key} is another one" for key, value in unbroken["outcome"].items() if mine.get(key) != value]
    return {"killed": killed, "problems": found}


def before_each_write(say: Callable[[str], None]) -> None:
    """Calls `say` with the place of each call that changes files, before it is made; in this process from now on."""
    for name in CALLS:
        setattr(os, name, _said_first(getattr(os, name), say, lambda *_, **__: True))
    builtins.open = _said_first(builtins.open, say, _writes)
    import io

    io.open = builtins.open


def _writes(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    return isinstance(file, str | os.PathLike) and any(letter in mode for letter in "wax+")


def _said_first(
    call: Callable[..., Any], say: Callable[[str], None], counts: Callable[..., bool]
) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **more: Any) -> Any:
        if not counts(*arguments, **more) or _is_elsewhere(arguments):
            return call(*arguments, **more)
        place = _place()
        say(f"{call.__name__} at {place}")
        done = call(*arguments, **more)
        if call.__name__ == "open":  # the file is there, and has nothing in it yet
            say(f"after open at {place}")
        return done

    return wrapped


def _is_elsewhere(arguments: tuple[Any, ...]) -> bool:
    """Temporary files, caches and devices are none of the run's."""
    path = os.path.abspath(os.fspath(arguments[0])) if isinstance(arguments[0], str | os.PathLike) else ""
    return not path.startswith(os.getcwd() + os.sep)


def _place() -> str:
    """The innermost line outside of the standard library."""
    frame = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in INSIDE):
        if "site-packages" in frame.f_code.co_filename:
            break
        frame = frame.f_back
    file = frame.f_code.co_filename
    short = file.rpartition("site-packages/")[2] if "site-packages" in file else os.path.relpath(file, ROOT)
    return f"{short}:{frame.f_lineno}"


if __name__ == "__main__":
    main()
