"""What the campaigns share: their flags, and the lives so far, which are written down after each."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import write_record
from provenance import SEARCH, TRAINING, changed

MEASURES = (*TRAINING, *SEARCH, "TrainingFolder", "CheckpointFiles", "RunTree", "write_atomically", "create_app")


def make_parser(doc: str | None, *, programs: Sequence[str], default: Sequence[str]) -> argparse.ArgumentParser:
    """The flags of a campaign over programs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", default=default, choices=programs)
    parser.add_argument("--seed", type=int, default=0)
    return with_output(parser)


def with_output(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where lives are written down."""
    parser.add_argument("--keep", type=Path, help="where folders of lives that went wrong are kept")
    parser.add_argument("--output", type=Path, help="the record; if it is there, it goes on from it")
    return parser


class Lives(list[dict[str, Any]]):
    """Those of a campaign, earlier calls with the same output included."""

    def __init__(self, benchmark: str, *, output: Path | None, keep: Path | None) -> None:
        record = json.loads(output.read_text()) if output and output.exists() else {"lives": [], "code": {}}
        if names := changed(record["code"]):
            print(f"{output} was made by other code ({', '.join(names)}): all lives are lived anew", file=sys.stderr)
        super().__init__([] if names else record["lives"])
        self._benchmark, self._output, self._keep = benchmark, output, keep

    def add(self, life: dict[str, Any], folder: Path) -> None:
        """Prints a life and writes it down; its folder is kept if something is wrong in it."""
        self.append(life)
        print(json.dumps(life), flush=True)
        if life["problems"] and self._keep:
            shutil.copytree(folder, self._keep / f"{self._benchmark}{len(self)}", dirs_exist_ok=True)
        if self._output:
            write_record(
                self._output, {"benchmark": self._benchmark, "lives": self}, measures=MEASURES,
                repeats=f"{len(self)} lives", search="as each program does",
            )  # fmt: skip
