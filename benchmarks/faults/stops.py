"""Stops programs in the ways of people and systems, at random moments, and looks whether anything is lost.

interrupt   Ctrl-C: the program has to end with status 130
terminate   SIGTERM: 143
hang up     SIGHUP, as of a terminal that closes: 129
sleep       SIGSTOP and, some seconds later, SIGCONT, as of a lid that is closed: it goes on as if nothing had been

The signal goes to the program alone or, as a terminal sends it, to its whole process group. Within a minute all its
processes have to be gone, its runs closed, and its last words have to say how to go on, without a traceback. It then
goes on with `--resume`, and has to end as in `kills.py`.

    python benchmarks/faults/stops.py --lives 60 --output benchmarks/results/stops.json

A call with the same output file goes on until it has as many.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from campaign import Lives, make_parser
from forking import import_everything
from kills import alive_in, compared, empty, go_on, live_unbroken
from programs import PROGRAMS, count_epochs, make_data, moments, start, wait
from whole import problems_of_tracking

WAYS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "hang up": signal.SIGHUP, "sleep": signal.SIGSTOP}
TIME_TO_END, SLEEP = 60.0, 3.0  # seconds
ABOUT_TO_END = 2.0  # seconds: what ends by itself within them need not have heeded the signal


def main() -> None:
    parser = make_parser(__doc__, programs=[*PROGRAMS], default=[*PROGRAMS])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--lives", type=int, default=60, help="in all")
    arguments = parser.parse_args()

    lives = Lives("stops", output=arguments.output, keep=arguments.keep)
    import_everything()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        given = {"data": make_data(work / "tiny.npz")}
        unbroken = {name: live_unbroken(name, given, work / "unbroken") for name in arguments.programs}
        while len(lives) < arguments.lives:
            draw = moments(f"{arguments.seed} {len(lives)}")
            name = arguments.programs[len(lives) % len(arguments.programs)]
            way = arguments.ways[len(lives) // len(arguments.programs) % len(arguments.ways)]
            lives.add(live(name, way, given["data"], work / "life", unbroken[name], draw), work / "life")
    for way, row in table(lives).items():
        print(f"{way}: {row}")


def live(name: str, way: str, data: Path, folder: Path, unbroken: dict[str, Any], draw: Any) -> dict[str, Any]:
    """A life that is stopped once and goes on."""
    empty(folder)
    program, group, after = PROGRAMS[name], draw.random() < 0.5, draw.uniform(0, unbroken["seconds"])
    command = program.command(data)
    child = start(command, folder, folder / "log.txt", first=count_epochs(folder / "epochs"))
    life: dict[str, Any] = {"program": name, "way": way, "group": group, "at": None, "words": "", "seconds": None}
    if wait(child, after) is not None:  # it was quicker
        return life | {"problems": []}
    life |= {"at": round(after, 2), "words": last_words(folder)}
    if way == "sleep":
        os.killpg(child, signal.SIGSTOP)
        time.sleep(SLEEP)
        os.killpg(child, signal.SIGCONT)
        return life | {"problems": compared(wait(child, 600), program, folder, unbroken, again=0)["problems"]}
    began = time.monotonic()
    (os.killpg if group else os.kill)(child, WAYS[way])
    found = troubles_at_the_end(child, 128 + WAYS[way], folder)
    life["seconds"] = round(time.monotonic() - began, 2)
    return life | {"problems": [*found, *go_on(program, command, folder, unbroken, 1)["problems"]]}


def troubles_at_the_end(child: int, status: int, folder: Path) -> list[str]:
    """What is wrong with how a program ends that was told to; it is gone afterwards."""
    began = time.monotonic()
    ended, seconds = wait(child, TIME_TO_END), time.monotonic() - began
    said, found = (folder / "log.txt").read_text(), []
    if alive_in(child):
        found.append(f"processes live on: {alive_in(child)}")
        os.killpg(child, signal.SIGKILL)
    if ended is None:
        return [*found, f"it has not ended after {TIME_TO_END:.0f} s"]
    if ended == 0 and seconds < ABOUT_TO_END:
        return found
    if ended != status:
        found.append(f"status {ended}, not {status}")
    if "Traceback" in said:
        found.append(f"a traceback: {said[-600:]}")
    if said and "--resume" not in said.splitlines()[-1]:
        found.append(f"its last words are {said.splitlines()[-1]!r}")
    for database in folder.glob("mlflow.db"):
        found += [trouble for trouble in problems_of_tracking(database) if "RUNNING" in trouble]
    return found


def last_words(folder: Path) -> str:
    """What the program was at, as far as it had said so."""
    lines = [line.strip() for line in (folder / "log.txt").read_text().splitlines() if line.strip()]
    return lines[-1][:80] if lines else ""


def table(lives: list[dict[str, Any]]) -> dict[str, str]:
    """Stops and troubles of each way."""
    stops, wrong = Counter(), Counter()
    for life in lives:
        stops[life["way"]] += life["at"] is not None
        wrong[life["way"]] += bool(life["problems"])
    return {way: f"{count} stops, {wrong[way]} lives with a problem" for way, count in stops.items()}


if __name__ == "__main__":
    main()
