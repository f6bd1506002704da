"""Which code a record was made by: digests of the definitions that its figures depend on.

A digest is of a definition's parsed source without docstrings, together with the private helpers and the constants that
it names. So comments, formatting and moves to another file leave it as it is, and a change of what is computed does
not. A record keeps the digests of what it measures as `code`; `readme_tables.py` compares them with those of today.
"""

from __future__ import annotations

import ast
import hashlib
import io
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Found = dict[str, list[tuple[str, ast.AST]]]  # definitions by name, each with the path of its file


def _of(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names)


# What moves a figure, by theme; a benchmark puts its `MEASURES` together from these.
SPLIT = ("split_by_lot", "WaferMaps.digests")
BATCHES = ("resize_maps", "encode", "augment", "BatchIndexedMaps", "EpochBatches", "WaferMapDataModule")
GENERATOR = ("generate_wafer_maps", "DieGrid", "Latents")
TRAINING = (
    *_of("IntegratedMLPipeline", "data_module", "create_model", "precision", "fit", "train_final_model"),
    "IntegratedMLPipeline._callbacks_of_final_training",
    *_of("ExperimentConfig", "data_augmentation", "class_balancing", "balance_by", "precision"),
    *("WaferClassifier", "macro_f1", "TimeBudget", "Patience", "SeedEachEpoch", "record_training", "best_weights"),
    *("possible_precisions", "seconds_a_step", "QuickestThreads", "keep_freed_memory"),
)
MUON = ("Muon", "orthogonalized", "hidden_kernels")
CNN = (*MUON, "LightningCNN", "ResidualBlock", "AverageAndMaxPool", "register_model('lightning_cnn')")
TORCHVISION = ("TorchvisionLightningModel", "SmallImageConv2d", "quicken_small_convolutions")
LITE = (*TORCHVISION, "SamePadding", "efficientnet_lite0", "read_published", "register_model('efficientnet_lite0')")
FAMILY = {
    "lightning_cnn": CNN,
    "torchvision_resnet": (*TORCHVISION, "register_model('torchvision_resnet')"),
    "torchvision_efficientnet": (*TORCHVISION, "register_model('torchvision_efficientnet')"),
    "yolo_inspired": ("YOLOLightningAdapter", "register_model('yolo_inspired')"),
}
FAMILIES = tuple(name for names in FAMILY.values() for name in names)
SCORES = ("compute_metrics", "probabilities_by_views", "score_model", "IntegratedMLPipeline.evaluate")
DECISION = ("Decision", "choose_decision", "fit_temperature", "symmetries", "decision_of")
GENERATED_WEIGHTS = (
    *("pretrain", "GeneratedStream", "GeneratedMaps", "draw_chunk", "load_generated_weights", "start_from"),
)
SEARCH = (
    *_of("IntegratedMLPipeline", "search", "optuna_objective", "_train_trial", "_suggest", "_default_trial"),
    *("suggest_parameters", "suggest_for_cnn", "suggest_freezing", "suggest_size", "make_sampler", "make_pruner"),
    *("open_study", "plan_search", "SearchBudget", "ModelSearch", "side_by_side", "search_record", "to_go_on_with"),
)
AFTER_SEARCH = ("IntegratedMLPipeline.go_on", "TrainingFolder.begin", "seconds_by_merit")
SERIES = (
    *_of("TrainingSeries", "__init__", "_variant_config"),
    *("train_and_score", "mean_interval", "paired_differences", "holm_factors"),
)
DEFAULTS = _of("ExperimentConfig", "samples_per_class", "image_size", "batch_size")

_ALWAYS = (*SPLIT, *BATCHES, *GENERATOR, *TRAINING, *SCORES, *DEFAULTS)
# Of what run_experiment.py writes, by its `mode`.
EXPERIMENTS = {
    "comparison": (*_ALWAYS, *FAMILIES, *SERIES, "COMPARISON"),
    "ablation": (*_ALWAYS, *CNN, *SEARCH, *AFTER_SEARCH, *SERIES, *GENERATED_WEIGHTS, "ABLATION"),
    "pipeline": (*_ALWAYS, *FAMILIES, *SEARCH, *AFTER_SEARCH, *DECISION, *GENERATED_WEIGHTS, "PRODUCTION"),
}


def digests(names: Iterable[str], *, at: str | None = None) -> dict[str, str]:
    """The digest of each definition, in this tree or at a commit.

    Raises:
        KeyError: there is no definition of that name.
    """
    found = _definitions_here() if at is None else _definitions(_sources_at(at))
    names = sorted({*names})
    if unknown := [name for name in names if name not in found]:
        raise KeyError(f"{', '.join(unknown)}: no such definition. Name in MEASURES what there is.")
    return {name: _digest(name, found) for name in names}


def changed(code: Mapping[str, str | None]) -> list[str]:
    """The definitions of a record that are not today what they were when it was made."""
    return sorted(name for name, old in code.items() if _digest_here(name) != old)


def _definitions(sources: Mapping[str, str]) -> Found:
    """Functions, classes, constants and registrations by name, methods and fields as `Class.name`.

    Those of benchmarks/ carry the name of their file, as in `against_recipe.recipe`.
    """
    found: Found = defaultdict(list)
    for path, source in sources.items():
        before = f"{Path(path).stem}." if path.startswith("benchmarks/") else ""
        for node in ast.parse(source).body:
            for name in _names(node):
                found[before + name].append((path, node))
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                for name in _names(inner):
                    found[f"{before}{node.name}.{name}"].append((path, inner))
    return found


@cache
def _digest_here(name: str) -> str:
    """What many records ask for; "" of what there is no more."""
    found = _definitions_here()
    return _digest(name, found) if name in found else ""


@cache
def _definitions_here() -> Found:
    in_packages = [file for start in ROOT.glob("*/__init__.py") for file in start.parent.rglob("*.py")]
    files = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *in_packages]
    return _definitions({file.relative_to(ROOT).as_posix(): file.read_text() for file in files})


def _sources_at(commit: str) -> dict[str, str]:
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        sources = {m.name: archive.extractfile(m).read().decode() for m in archive if m.name.endswith(".py")}
    tops = {name: name.partition("/")[0] for name in sources}
    kept = {"benchmarks", *(top for top in tops.values() if f"{top}/__init__.py" in sources)}
    return {name: source for name, source in sources.items() if "/" not in name or tops[name] in kept}


def _names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case ast.Expr(value=ast.Call(func=ast.Name(id=function), args=[ast.Constant(value=first), *_])):
            yield f"{function}({first!r})"


def _digest(name: str, found: Found) -> str:
    reached, waiting = [], list(found[name])
    while waiting:
        path, node = here = waiting.pop()
        reached.append(here)
        for used in filter(found.__contains__, _helpers(node)):
            near = [other for other in found[used] if other[0] == path]  # a name may be private to several files
            waiting += [other for other in near or found[used] if other not in reached + waiting]
    return hashlib.sha256("\n".join(sorted(_outline(node) for _, node in reached)).encode()).hexdigest()[:12]


def _helpers(node: ast.AST) -> set[str]:
    """The private names and the constants that a definition names; its object's own are not meant."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    names |= {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and getattr(inner.value, "id", "") not in ("self", "cls")
    }
    return {name for name in names if name.startswith("_") or name.isupper()}


def _outline(node: Any) -> str:
    """Like `ast.dump`, whose text differs from one Python to the next, and without docstrings."""
    if isinstance(node, list):
        return f"[{', '.join(map(_outline, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
        parts["body"] = node.body[1:]
    inside = (f"{key}={_outline(value)}" for key, value in parts.items() if value is not None and value != [])
    return f"{type(node).__name__}({', '.join(inside)})"
