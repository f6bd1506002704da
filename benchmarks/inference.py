"""Maps a second, exported file beside eager PyTorch; and what makes the champion quicker, with what it costs in F1.

First, every family with random weights: raw maps of real or generated sizes in, probabilities out, resizing included,
by ONNX Runtime and by PyTorch in inference mode, in turn, with one view and with eight, in batches of 256 as far as
sizes agree. Then, with --champion, a trained model's file in several forms on the test part: one view, eight views of
every map, eight views of the maps that need them (sure_at chosen on validation), the first and the last also in 8-bit
whole numbers, calibrated on maps of the validation part. The clock leaves out reading the maps and opening the file.

    python benchmarks/inference.py --data wm811k.npz --champion champion --output benchmarks/results/inference.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from measure import plain_config, take_turns, write_record

FAMILIES = ("lightning_cnn", "torchvision_resnet", "torchvision_efficientnet", "yolo_inspired")
MEASURES = (
    "Predictor", "export_onnx", "RawMapClassifier", "Decision", "resize_dies", "symmetries", "LightningCNN",
    "in_8_bits",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", metavar="PATH")
    parser.add_argument("--maps", type=int, default=512, help="that each family answers (default 512)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=FAMILIES, metavar="NAME")
    parser.add_argument("--champion", type=Path, help="output folder of benchmarks/champion.py, with --data")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    from waferlab.data.reading import load_wafer_maps

    data = load_wafer_maps(arguments.data)
    chosen = np.random.default_rng(0).permutation(len(data))[: arguments.maps]
    maps = [data[i] for i in chosen]
    record = {"benchmark": "inference", "data": arguments.data, "maps": len(maps), "families": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            record["families"][name] = family(name, maps, Path(folder), repeats=arguments.repeats)
        if arguments.champion:
            record["champion"] = champion(arguments.champion, data, Path(folder), repeats=arguments.repeats)
    write_record(
        arguments.output,
        record,
        measures=MEASURES,
        repeats=f"{arguments.repeats} turns after one to warm up",
        weights=None,
        search=None,
    )


def rates(ways: dict[str, Callable[[], object]], n: int, *, repeats: int) -> dict[str, dict[str, float]]:
    """Maps a second of each way, of n maps: median, lowest and highest over the turns."""

    def seconds(way: Callable[[], object]) -> float:
        started = time.perf_counter()
        way()
        return time.perf_counter() - started

    for way in ways.values():
        way()
    turns = take_turns({name: partial(seconds, way) for name, way in ways.items()}, repeats=repeats)
    found = {}
    for name, some in turns.items():
        per_second = n / np.array(some)
        found[name] = {
            "median": round(float(np.median(per_second)), 1),
            "low": round(float(per_second.min()), 1),
            "high": round(float(per_second.max()), 1),
        }
        print(f"  {name}: {found[name]['median']:,.0f} maps/s", flush=True)
    return found


def family(name: str, maps: Sequence[np.ndarray], folder: Path, *, repeats: int) -> dict:
    """One architecture with random weights: file and PyTorch, one view and eight."""
    from integrated_pipeline import IntegratedMLPipeline
    from waferlab.deployment.onnx_export import export_onnx
    from waferlab.deployment.predictor import Predictor
    from waferlab.evaluation.decision import Decision

    model = IntegratedMLPipeline(plain_config(model_type=name)).create_model(name).eval()
    found = {}
    for views in (1, 8):
        decision = Decision(views=views)
        file = export_onnx(model, folder / name / f"{views}.onnx", image_size=40, decision=decision)
        some = maps if views == 1 else maps[: len(maps) // 4]
        print(f"{name}, {views} views", flush=True)
        ways = {
            "onnxruntime": partial(Predictor(file).probabilities, some),
            "pytorch": partial(eager, model, decision, some),
        }
        found[str(views)] = rates(ways, len(some), repeats=repeats)
    return found


def eager(model, decision, maps: Sequence[np.ndarray]) -> np.ndarray:
    """The same answers by PyTorch, with the same batches."""
    import torch

    from waferlab.deployment.onnx_export import RawMapClassifier
    from waferlab.deployment.predictor import batches_of_one_size

    whole = RawMapClassifier(model, 40, decision).eval()
    out = np.empty((len(maps), 9), np.float32)
    with torch.inference_mode():
        for some, batch in batches_of_one_size(maps):
            out[some] = whole(torch.from_numpy(batch))[0].numpy()
    return out


def champion(output: Path, data, folder: Path, *, repeats: int) -> dict:
    """Forms of a trained model's file: maps a second, and what they score on the test part."""
    from integrated_pipeline import LightningCNN
    from waferlab.data.splitting import split_by_lot
    from waferlab.deployment.onnx_export import export_onnx
    from waferlab.deployment.predictor import Predictor
    from waferlab.deployment.small_device import in_8_bits
    from waferlab.evaluation.decision import Decision
    from waferlab.evaluation.metrics import compare_macro_f1, compute_metrics
    from waferlab.evaluation.predictions import Predictions
    from waferlab.training.checkpoints import load_trained

    summary = json.loads((output / "results/champion/experiment_summary.json").read_text())
    (result,) = summary["models"]
    split = split_by_lot(data, seed=summary["config"]["seed"])
    if split.fingerprint != summary["split"]["fingerprint"]:
        raise SystemExit(f"{output} was trained on another split. Train it anew: python benchmarks/champion.py")
    checkpoint = output / "checkpoints/champion/lightning_cnn" / result["checkpoint"]
    model = load_trained(LightningCNN, checkpoint, expected=result["checkpoint_sha256"])
    kept = {key: value for key, value in result["decision"].items() if key in Decision.__dataclass_fields__}
    decision = Decision(**kept | {"offsets": tuple(kept["offsets"]), "left_out": tuple(kept["left_out"])})
    always = replace(decision, views=8, sure_at=None)
    forms = {"one view": replace(always, views=1), "eight views of every map": always}
    forms["eight views where needed"] = replace(always, sure_at=sure_on_validation(model, data, split, always, folder))
    files = {
        name: export_onnx(model, folder / "champion" / f"{i}.onnx", image_size=40, decision=form)
        for i, (name, form) in enumerate(forms.items())
    }
    calibration = np.random.default_rng(0).permutation(split.validation)[:512]
    for name in ("one view", "eight views where needed"):
        small = files[name].with_suffix(".8bit.onnx")
        files[f"{name}, 8-bit"] = in_8_bits(files[name], small, [data[i] for i in calibration])
    test = [data[i] for i in split.test]
    answers = {
        name: Predictions(
            Predictor(file).probabilities(test), data.labels[split.test], data.groups[split.test],
            Predictor(file).class_names,
        )
        for name, file in files.items()
    }  # fmt: skip
    print("champion", flush=True)
    whole = answers["eight views of every map"]
    some = test[:2048]
    speed = rates(
        {name: partial(Predictor(file).probabilities, some) for name, file in files.items()}, len(some), repeats=repeats
    )
    one_thread = rates(
        {name: partial(Predictor(file, threads=1).probabilities, some[:1024]) for name, file in files.items()},
        1024, repeats=max(1, repeats // 2),
    )  # fmt: skip
    sure_at, network = forms["eight views where needed"].sure_at, answers_of_network(model, test, folder)
    return {
        "test_maps": len(test),
        "test_lots": len(np.unique(whole.groups)),
        "decision": kept,
        "sure_at": sure_at,
        "answered_by_one_view": None if sure_at is None else float((network[1].max(1) >= sure_at).mean()),
        "forms": {
            name: {
                "maps_per_second": speed[name],
                "one_thread": one_thread[name],
                "macro_f1": compute_metrics(one)["macro_f1"],
                "against_eight_views": compare_macro_f1(one, whole),
                "other_class": float((one.predicted != whole.predicted).mean()),
            }
            for name, one in answers.items()
        },
    }


def answers_of_network(model, maps: Sequence[np.ndarray], folder: Path) -> dict[int, np.ndarray]:
    """The network's own probabilities with one view and with eight."""
    from waferlab.deployment.onnx_export import export_onnx
    from waferlab.deployment.predictor import Predictor
    from waferlab.evaluation.decision import Decision

    return {
        views: Predictor(
            export_onnx(model, folder / f"network_{views}.onnx", image_size=40, decision=Decision(views=views))
        ).probabilities(maps)
        for views in (1, 8)
    }


def sure_on_validation(model, data, split, decision, folder: Path) -> float | None:
    """Where one view may answer for eight, chosen as a run with eight views does."""
    from waferlab.evaluation.decision import where_one_view_is_sure

    return where_one_view_is_sure(decision, answers_of_network(model, [data[i] for i in split.validation], folder))


if __name__ == "__main__":
    main()
