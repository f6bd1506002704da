"""How many small errors the tests notice: mutmut makes one at a time, and a mutant that no test fails on survives.

    python benchmarks/mutation.py decision
    python benchmarks/mutation.py search --sample 60 --show

What is copied to a temporary folder is changed there: the working tree stays as it is. For each mutant only those tests
of the module's own files run that reach the changed function, the quickest first, up to the first failure.

A mutant counts as noticed when a test fails or when the tests no longer come to an end. Not mutated: code outside of
functions, decorated functions (properties among them) and the text inside f-strings. A sample is drawn from all mutants
by seed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICED = ("killed", "timeout", "segfault", "check was interrupted by user")  # the last: a KeyboardInterrupt in a test
# Tests that start processes, in which mutmut sees nothing, or that wait for a clock.
LEFT_OUT = ("process", "cut_off", "ctrl_c", "killed", "time_limit", "database", "script", "status_2", "library", "help")
MUTMUT = """\
[mutmut]
source_paths =
{sources}
only_mutate = {file}
pytest_add_cli_args =
    -n
    0
    -p
    no:cacheprovider
    -k
    {selected}
pytest_add_cli_args_test_selection =
{tests}
process_isolation = forkserver
track_dependencies = false
use_git_change_detection = false
timeout_multiplier = 5
"""


@dataclass(frozen=True)
class Target:
    """What is mutated, and the tests that answer for it.

    Attributes:
        file: the source file.
        tests: files, or single tests; see also `LEFT_OUT`.
        functions: patterns of the functions, "Class.method" for methods.
    """

    file: str
    tests: tuple[str, ...]
    functions: tuple[str, ...] = ("*",)


WHOLE_SEARCHES, TRAININGS = "tests/search/test_search.py", "tests/training/test_final_training.py"
CALLBACKS, INFERENCE = "tests/training/test_callbacks.py", "tests/evaluation/test_inference.py"
TARGETS = {
    "decision": Target("waferlab/evaluation/decision.py", ("tests/evaluation/test_decision.py", INFERENCE)),
    "reading": Target("waferlab/data/reading.py", ("tests/data/test_reading.py",)),
    "splitting": Target("waferlab/data/splitting.py", ("tests/data/test_splitting.py",)),
    "batches": Target("waferlab/data/datamodule.py", ("tests/data/test_datamodule.py", TRAININGS)),
    "metrics": Target("waferlab/evaluation/metrics.py", ("tests/evaluation/test_metrics.py",)),
    "predictions": Target("waferlab/evaluation/predictions.py", ("tests/evaluation/test_metrics.py",)),
    "inference": Target("waferlab/evaluation/inference.py", (INFERENCE,)),
    "statistics": Target("waferlab/evaluation/statistics.py", ("tests/evaluation/test_statistics.py",)),
    "gate": Target("waferlab/deployment/promotion.py", ("tests/deployment/test_promotion.py",)),
    "starting_weights": Target(
        "waferlab/models/starting_weights.py",
        ("tests/models/test_starting_weights.py", "tests/training/test_pretraining.py"),
    ),
    "checkpoints": Target("waferlab/training/checkpoints.py", ("tests/training/test_checkpoints.py", CALLBACKS)),
    "training_callbacks": Target("waferlab/training/callbacks.py", (CALLBACKS, TRAININGS)),
    "study": Target("waferlab/search/study.py", ("tests/search/test_study.py", WHOLE_SEARCHES)),
    "trials": Target("waferlab/search/trials.py", ("tests/search/test_trials.py", WHOLE_SEARCHES)),
    "trial_files": Target("waferlab/search/trial_files.py", ("tests/search/test_trial_files.py", WHOLE_SEARCHES)),
    "side_by_side": Target("waferlab/training/side_by_side.py", ("tests/training/test_side_by_side.py",)),
    "pace": Target("waferlab/training/pace.py", ("tests/training/test_pace.py",)),
    "budget": Target("waferlab/search/budget.py", ("tests/search/test_budget.py", WHOLE_SEARCHES)),
    "search": Target(
        "integrated_pipeline.py",
        (WHOLE_SEARCHES, "tests/search/test_budget.py", "tests/search/test_own_study.py"),
        functions=(
            "suggest_*",
            *(
                f"IntegratedMLPipeline.{name}"
                for name in (
                    "plan_search", "search", "search_and_train", "go_on", "optuna_objective", "_train_trial",
                    "_suggest", "_default_trial", "_trial_files", "_begin_final_training", "_start_without_search",
                )
            ),
        ),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=TARGETS)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random; all without")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--only", nargs="+", metavar="MUTANT", help="these alone, such as the survivors of another run")
    parser.add_argument("--tests", nargs="+", help="other test files than the module's own")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print how the survivors differ")
    parser.add_argument("--output", type=lambda path: Path(path).resolve(), help="write a record (JSON)")
    arguments = parser.parse_args()
    target = TARGETS[arguments.module]
    tests = tuple(arguments.tests or target.tests)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # mutmut reads its settings there
        prepare(Path(folder), target, tests)
        everything = mutants(target)
        chosen = arguments.only or everything
        if arguments.sample is not None and arguments.sample < len(chosen):
            chosen = sorted(random.Random(arguments.seed).sample(chosen, arguments.sample))
        call(folder, "run", f"--max-children={arguments.processes}", *chosen)
        fates = read_fates(Path(folder), target, chosen)
        report(fates, of=len(everything), diffs=Path(folder) if arguments.show else None)
        if arguments.output:
            write(arguments, tests, fates, of=len(everything))


def prepare(folder: Path, target: Target, tests: tuple[str, ...]) -> None:
    """Copies the sources, the tests and pytest's settings, and writes mutmut's."""
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, folder)
    for name in ("tests", "waferlab", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    sources = [*sorted(file.name for file in ROOT.glob("*.py")), "waferlab", "benchmarks"]
    settings = MUTMUT.format(
        sources=indented(sources), file=target.file, tests=indented(tests), selected=f"not ({' or '.join(LEFT_OUT)})"
    )
    (folder / "setup.cfg").write_text(settings)


def indented(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def mutants(target: Target) -> list[str]:
    """The names of all mutants of the target's functions."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    names = mutate_file_contents(target.file, (ROOT / target.file).read_text()).mutant_names
    found = {
        pattern: [n for n in names if fnmatch.fnmatchcase(function_of(n), pattern)] for pattern in target.functions
    }
    for pattern, some in found.items():
        if not some:
            raise SystemExit(f"{target.file} has no function {pattern!r} that could be mutated. Mend TARGETS.")
    module = target.file.removesuffix(".py").replace("/", ".")
    return [f"{module}.{name}" for name in dict.fromkeys(n for some in found.values() for n in some)]


def function_of(mutant: str) -> str:
    """Gives "f" for "x_f__mutmut_1" and "C.f" for "xǁCǁf__mutmut_1"."""
    mangled = mutant.rpartition(".")[2].partition("__mutmut_")[0]
    return ".".join(mangled.split("ǁ")[1:]) if "ǁ" in mangled else mangled.removeprefix("x_")


def call(folder: str | Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).with_name("mutmut"), *arguments], cwd=folder, check=True, **options)


def read_fates(folder: Path, target: Target, chosen: list[str]) -> dict[str, str]:
    """What became of each mutant: "killed", "survived", "no tests", "timeout", ..."""
    from mutmut.stats import status_by_exit_code

    codes = json.loads((folder / "mutants" / f"{target.file}.meta").read_text())["exit_code_by_key"]
    return {name: status_by_exit_code[codes[name]] for name in chosen}


def report(fates: dict[str, str], *, of: int, diffs: Path | None) -> None:
    for name, fate in fates.items():
        if fate not in NOTICED:
            print(f"{fate:10} {name}")
            if diffs:
                shown = call(diffs, "show", name, capture_output=True, text=True).stdout
                changed = [line for line in shown.splitlines() if re.match(r"[-+](?![-+])", line)]
                print("\n".join(f"           {line}" for line in changed if "def " not in line))
    noticed = sum(fate in NOTICED for fate in fates.values())
    print(f"{noticed} of {len(fates)} mutants noticed ({noticed / len(fates):.0%}): {dict(Counter(fates.values()))}")
    if len(fates) < of:
        print(f"a sample of {of}")


def write(arguments: argparse.Namespace, tests: tuple[str, ...], fates: dict[str, str], *, of: int) -> None:
    from measure import write_record

    survivors = [name for name, fate in fates.items() if fate not in NOTICED]
    record = {
        "benchmark": "mutation", "module": arguments.module, "tests": list(tests), "mutants": of, "tried": len(fates),
        "seed": arguments.seed, "fates": dict(Counter(fates.values())), "survivors": survivors,
    }  # fmt: skip
    write_record(arguments.output, record)


if __name__ == "__main__":
    main()
