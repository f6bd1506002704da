"""Promises about the house: who may import whom, how long a file is, what lies where, what an import does."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
LISTED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
TRACKED = [name for name in LISTED.split("\0") if name and (ROOT / name).exists()]
SCRIPTS = {"quick_start.py", "demo.py", "run_experiment.py", "predict.py"}.intersection(TRACKED)
SCRIPT_MODULES = {Path(name).stem for name in SCRIPTS}
ROOMS = [name for name in TRACKED if name.startswith("waferlab/") and name.endswith(".py")]
TOP_LEVEL = {
    *("integrated_pipeline.py", "simple_model.py", "quick_start.py", "demo.py", "run_experiment.py", "predict.py"),
    *("waferlab", "tests", "benchmarks", "docs", "deploy", "examples", "results", "checkpoints"),
    *("README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "requirements.txt", "requirements-dev.txt"),
}
TOOLS = {"mlflow", "optuna", "optuna_integration", "ultralytics", "matplotlib", "seaborn", "torch", "lightning"}
ALLOWED_TOOLS = {  # of the files that the linter cannot read; what they import of waferlab has rules of its own there
    "integrated_pipeline.py": {"torch", "lightning", "optuna", "optuna_integration"},
    "simple_model.py": {"torch"},
}


def tree(name):
    return ast.parse((ROOT / name).read_text())


def imported(name):
    """The full names of all modules that a file imports, at its top or in a function, but not for type checking."""
    waiting, modules = [tree(name)], set()
    while waiting:
        match waiting.pop():
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=otherwise):
                waiting += otherwise
            case ast.Import(names=names):
                modules |= {alias.name for alias in names}
            case ast.ImportFrom(module=module):
                modules.add(module)
            case node:
                waiting += ast.iter_child_nodes(node)
    return modules


def lines(name):
    return len((ROOT / name).read_text().splitlines())


def test_imports_go_the_way_that_pyproject_says():
    code = "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


@pytest.mark.parametrize("name", sorted({*ALLOWED_TOOLS, *SCRIPTS}))
def test_the_story_and_the_scripts_name_no_tool_that_belongs_to_a_room(name):
    used = {module.partition(".")[0] for module in imported(name)}
    assert used & TOOLS <= ALLOWED_TOOLS.get(name, set())


def test_simple_model_needs_models_alone():
    ours = {module for module in imported("simple_model.py") if (ROOT / module.partition(".")[0]).is_dir()}
    assert ours and all(module.startswith("waferlab.models") for module in ours)
    assert not {"integrated_pipeline", *SCRIPT_MODULES}.intersection(imported("simple_model.py"))


@pytest.mark.parametrize("name", ["integrated_pipeline.py", *sorted(SCRIPTS)])
def test_nobody_imports_a_script(name):
    assert not SCRIPT_MODULES & imported(name)


def test_the_story_is_read_in_800_lines():
    assert lines("integrated_pipeline.py") <= 800


def test_each_function_of_the_story_fits_a_screen():
    functions = [node for node in ast.walk(tree("integrated_pipeline.py")) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 40}
    assert functions and not long


def test_no_other_file_of_the_product_is_longer_than_650_lines():
    long = {name: lines(name) for name in [*ROOMS, *SCRIPTS, "simple_model.py"] if lines(name) > 650}
    assert ROOMS and not long


def test_the_top_level_holds_what_it_is_meant_to():
    tops = {name.partition("/")[0] for name in TRACKED}
    assert {top for top in tops if not top.startswith(".")} <= TOP_LEVEL


def test_the_init_files_hold_a_docstring_and_nothing_else_but_the_predictor_that_users_import():
    for name in ROOMS:
        if name.endswith("__init__.py"):
            names_predictor = name == "waferlab/deployment/__init__.py"
            assert ast.get_docstring(tree(name)) and len(tree(name).body) == 1 + names_predictor, name


STATE = """
import logging, sys, warnings
import integrated_pipeline
import matplotlib

def state():
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    drawing = {**matplotlib.rcParams, "backend": matplotlib.get_backend(auto_select=False)}
    return {"warnings": [*warnings.filters], "levels": levels, "root": logging.root.level,
            "disabled": logging.root.manager.disable, "drawing": drawing}

# The libraries are here now. Whatever changes when our own files are read once more, they change themselves.
warnings.resetwarnings()
for name in logging.root.manager.loggerDict:
    logging.getLogger(name).setLevel(logging.NOTSET)
matplotlib.rcdefaults()
before = state()
for name in [*sys.modules]:
    if name.partition(".")[0] in ("integrated_pipeline", "simple_model", "waferlab"):
        del sys.modules[name]
import integrated_pipeline
after = state()
print(*[what for what in before if after[what] != before[what]])
"""


@pytest.mark.long
def test_importing_the_story_changes_no_warning_filter_logger_or_drawing_style():
    done = subprocess.run([sys.executable, "-c", STATE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
