"""Lets programs run short of something, then gives them enough, and looks whether anything is lost.

disk        a file system of so many kilobytes (a tmpfs, for which one has to be root), then a larger one
file size   no file may be larger (RLIMIT_FSIZE)
files       no more may be open at a time (RLIMIT_NOFILE)

Short of it, a program has to end with status 0, or with 1 or 2 and a sentence, never with a traceback, and leave no
process behind. With enough of it, it goes on with `--resume` and has to end as in `kills.py`. Amounts are drawn evenly
between nothing and what an unbroken run needs.

    python benchmarks/faults/scarce.py --lives 60 --output benchmarks/results/scarce.json

A call with the same output file goes on until it has as many.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from campaign import Lives, make_parser
from forking import import_everything
from kills import alive_in, empty, go_on, live_unbroken
from programs import PROGRAMS, count_epochs, make_data, moments, start, wait

KINDS = ("disk", "file size", "files")
ENOUGH = "size=2g"
MOST_FILES = 120  # more than any of the programs has open
BLOCK = 4096


def main() -> None:
    parser = make_parser(__doc__, programs=[*PROGRAMS], default=["demo", "comparison", "pretrain"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lives", type=int, default=60, help="in all")
    arguments = parser.parse_args()

    lives = Lives("scarce", output=arguments.output, keep=None)  # a life keeps its folder while it is mounted
    import_everything()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        given, unbroken = {"data": make_data(work / "tiny.npz")}, {}
        for name in arguments.programs:
            unbroken[name] = live_unbroken(name, given, work / "unbroken") | needs(work / "unbroken")
        while len(lives) < arguments.lives:
            draw = moments(f"{arguments.seed} {len(lives)}")
            name = arguments.programs[len(lives) % len(arguments.programs)]
            kind = arguments.kinds[len(lives) // len(arguments.programs) % len(arguments.kinds)]
            life = live(name, kind, given["data"], work / "life", unbroken[name], draw, arguments.keep)
            lives.add(life, work / "life")
    for kind, row in table(lives).items():
        print(f"{kind}: {row}")


def needs(folder: Path) -> dict[str, int]:
    """What an unbroken run has taken: bytes in all, as a file system counts them, and of its largest file."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return {"disk": sum(-(-size // BLOCK) * BLOCK for size in sizes), "file size": max(sizes), "files": MOST_FILES}


def live(
    name: str, kind: str, data: Path, folder: Path, unbroken: dict[str, Any], draw: Any, keep: Path | None
) -> dict[str, Any]:
    """A life that runs short, and goes on when there is enough."""
    amount, program = draw.randrange(unbroken[kind]), PROGRAMS[name]
    command, log = program.command(data), folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    with file_system(folder, amount if kind == "disk" else None) as enlarge:
        child = start(command, folder, log, first=limited(kind, amount, folder.with_suffix(".epochs")))
        status, found = wait(child, 600), []
        said = log.read_text()
        if alive_in(child):
            found.append(f"processes live on: {alive_in(child)}")
            os.killpg(child, signal.SIGKILL)
        if status not in (0, 1, 2):
            found.append(f"status {status}")
        if status in (1, 2) and "error: " not in said:
            found.append(f"status {status} without a sentence: {said[-300:]}")
        if "Traceback" in said:
            found.append(f"a traceback: {said[said.index('Traceback') :][-900:]}")
        enlarge()
        shutil.copy(log, folder / "log.txt")
        found += go_on(program, command, folder, unbroken | {"epochs": 10**6}, 1)["problems"]
        if found and keep:
            shutil.copytree(folder, keep / f"{name} {kind} {amount}", dirs_exist_ok=True)
    said = re.sub(r"#\w+", "", said.replace(str(folder), "."))  # neither this machine's folders nor numbers of runs
    words = [line for line in said.splitlines() if line.strip()][-1:]
    return {"program": name, "kind": kind, "amount": amount, "status": status, "words": words, "problems": found}


@contextlib.contextmanager
def file_system(folder: Path, size: int | None) -> Iterator[Callable[[], None]]:
    """An empty folder, on a file system of so many bytes if a size is given; what is yielded makes that large."""
    empty(folder)
    if size is None:
        yield lambda: None
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(size, BLOCK)}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", f"remount,{ENOUGH}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def limited(kind: str, amount: int, notes: Path) -> Callable[[], None]:
    """What sets a program's limit, in the program."""

    def install() -> None:
        count_epochs(notes)()
        if kind == "file size":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it: the call fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (amount, amount))
        elif kind == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(amount, 8), max(amount, 8)))

    return install


def table(lives: list[dict[str, Any]]) -> dict[str, str]:
    """How the lives of each kind ended."""
    count, ended, wrong = Counter(), Counter(), Counter()
    for life in lives:
        count[life["kind"]] += 1
        ended[life["kind"]] += life["status"] != 0
        wrong[life["kind"]] += bool(life["problems"])
    return {kind: f"{count[kind]} lives, {ended[kind]} ended by it, {wrong[kind]} with a problem" for kind in count}


if __name__ == "__main__":
    main()
