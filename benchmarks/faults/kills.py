"""Kills programs at random moments, lets them go on, and looks whether anything is lost.

A life: a script is started in an empty folder and killed with SIGKILL at a moment drawn between its first line and its
last, alone or with its whole process group, and up to twice again while it goes on. Then it goes on with `--resume` to
its end, and must have ended with status 0, every file whole, no run of MLflow open or twice there, one
champion, and, where two unbroken runs end alike, at most one epoch for each kill trained again, the same best trial and
the same weights, bit for bit. `company.py` has two lives of another kind: of a search with a worker that joined it, and
of the service.

    python benchmarks/faults/kills.py --kills 200 --output benchmarks/results/kills.json

A call with the same output file goes on until it has as many. The first program named needs about ten seconds a life.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from campaign import Lives, make_parser
from company import life_of_search, life_of_service
from forking import import_everything
from programs import PROGRAMS, Program, count_epochs, make_data, moments, start, wait
from serving import untrained
from whole import outcome, problems

TOGETHER = {"search with a worker": life_of_search, "service": life_of_service}
NAMES = [*PROGRAMS, *TOGETHER]


def main() -> None:
    parser = make_parser(__doc__, programs=NAMES, default=NAMES)
    parser.add_argument("--kills", type=int, default=200, help="in all")
    arguments = parser.parse_args()

    lives = Lives("kills", output=arguments.output, keep=arguments.keep)
    import_everything()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        given = {"data": make_data(work / "tiny.npz")}
        if "service" in arguments.programs:
            given["model"] = untrained(work / "model.onnx")
        unbroken = {name: live_unbroken(name, given, work / "unbroken") for name in arguments.programs}
        while sum(life["kills"] for life in lives) < arguments.kills:
            name = arguments.programs[len(lives) % len(arguments.programs)]
            draw = moments(f"{arguments.seed} {len(lives)}")
            lives.add(live(name, given, work / "life", unbroken[name], draw), work / "life")
    for name, row in table(lives).items():
        print(f"{name}: {row}")


def live_unbroken(name: str, given: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A life that nobody ends: its seconds, its epochs, its outcome."""
    if name in TOGETHER:
        life = live_together(name, given, folder, None, moments(""))
        if life["problems"]:
            raise SystemExit(f"{name} unbroken: {life['problems']}")
        return {"seconds": life["seconds"], "epochs": None}
    empty(folder)
    started = time.monotonic()
    command = PROGRAMS[name].command(given["data"])
    child = start(command, folder, folder / "log.txt", first=count_epochs(folder / "epochs"))
    status = wait(child)
    seconds = time.monotonic() - started
    found = problems(folder)
    if status or found:
        raise SystemExit(f"{name} unbroken: status {status}, {found}\n{(folder / 'log.txt').read_text()[-2000:]}")
    return {"seconds": round(seconds, 1), "epochs": epochs_of(folder), "outcome": outcome(folder)}


def live(name: str, given: dict[str, Path], folder: Path, unbroken: dict[str, Any], draw: Any) -> dict[str, Any]:
    """A life with up to three kills in it, each drawn within what is left of the quickest life that nobody ended."""
    if name in TOGETHER:
        life = live_together(name, given, folder, 5.0 if name == "service" else unbroken["seconds"], draw)
        return {"program": name, "killed_at": life["killed"], "kills": len(life["killed"]), "group": name != "service",
                "epochs_again": None, "problems": life["problems"]}  # fmt: skip
    program, killed_at, group = PROGRAMS[name], [], draw.random() < 0.5
    command = program.command(given["data"])
    empty(folder)
    left = unbroken["seconds"]
    for turn in range(draw.choice((1, 2, 3))):
        after, began = draw.uniform(0, left), time.monotonic()
        resumed = [*command, "--resume"] if turn else command
        child = start(resumed, folder, folder / "log.txt", first=count_epochs(folder / "epochs"))
        if wait(child, after) is not None:  # it was quicker
            if not turn:
                unbroken["seconds"] = min(unbroken["seconds"], time.monotonic() - began)
            break
        (os.killpg if group else os.kill)(child, signal.SIGKILL)
        wait(child)
        killed_at.append(round(after, 2))
        left -= after
        if not group:
            end_orphans(child)
    return {"program": name, "killed_at": killed_at, "kills": len(killed_at), "group": group,
            **go_on(program, command, folder, unbroken, len(killed_at))}  # fmt: skip


def live_together(name: str, given: dict[str, Path], folder: Path, seconds: float | None, draw: Any) -> dict[str, Any]:
    """A life of programs that do not work alone."""
    return TOGETHER[name](given["model" if name == "service" else "data"], folder, seconds, draw)


def go_on(program: Program, command: list[str], folder: Path, unbroken: dict[str, Any], kills: int) -> dict[str, Any]:
    """The rest of a life, to its end, and what is wrong with it."""
    child = start([*command, "--resume"], folder, folder / "log.txt", first=count_epochs(folder / "epochs"))
    return compared(wait(child, 600), program, folder, unbroken, again=kills)


def compared(
    status: int | None, program: Program, folder: Path, unbroken: dict[str, Any], *, again: int
) -> dict[str, Any]:
    """What is wrong with how a life ended; no more than `again` epochs may have been trained twice."""
    found = problems(folder)
    if status != 0:
        return {"epochs_again": 0, "problems": [f"status {status}: {(folder / 'log.txt').read_text()[-600:]}", *found]}
    twice = epochs_of(folder) - unbroken["epochs"]
    if program.same_weights:
        mine = outcome(folder)
        found += [f"{key}: {mine.get(key)} and not {value}" for key, value in unbroken["outcome"].items()
                  if mine.get(key) != value]  # fmt: skip
        if twice > again:
            found.append(f"{twice} epochs were trained again, and not {again} at most")
    return {"epochs_again": twice, "problems": found}


def empty(folder: Path) -> None:
    """Made anew; a process that has just been killed may be about to write its last file."""
    until = time.monotonic() + 10
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
    folder.mkdir(parents=True)


def end_orphans(session: int, seconds: float = 30) -> None:
    """Waits for the children of a program that was killed alone: they have to notice and end by themselves."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not alive_in(session):
            return
        time.sleep(0.05)
    os.killpg(session, signal.SIGKILL)
    raise SystemExit(f"Children of a killed program live on after {seconds:.0f} s.")


def alive_in(session: int) -> list[int]:
    """Processes of a session that run; those that have ended and that nobody has asked for do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(") ")
        except OSError:  # it has just ended
            continue
        state, _, group, *_ = rest.split()
        if int(group) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def epochs_of(folder: Path) -> int:
    """How many epochs were begun in a folder."""
    notes = folder / "epochs"
    return len(notes.read_bytes()) if notes.exists() else 0


def table(lives: list[dict[str, Any]]) -> dict[str, str]:
    """Kills and troubles of each program."""
    kills, wrong = Counter(), Counter()
    for life in lives:
        kills[life["program"]] += life["kills"]
        wrong[life["program"]] += bool(life["problems"])
    return {name: f"{count} kills, {wrong[name]} lives with a problem" for name, count in kills.items()}


if __name__ == "__main__":
    main()
