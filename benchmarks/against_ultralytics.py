"""Our training against Ultralytics' own trainer, on the same network.

Measured: seconds from the call to its return for `YOLO("yolo11n-cls.yaml").train(...)` and for
`train_final_model("yolo_inspired")`, with the same maps, image size, batch size, epochs, threads and random initial
weights, in turn, each in a process of its own; and the seconds until the validation macro F1 first reaches what both
reach. Each validates after every epoch and saves checkpoints. Theirs reads PNG files of the pixels that ours resizes
itself, and augments by its own flips only: its default crops, colour changes and erasing are switched off, since on
wafer maps they cost it both time and score. Left out of the clock: imports, writing the PNG files, the final test.

    python benchmarks/against_ultralytics.py --data wm811k.npz --output benchmarks/results/against_ultralytics.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import ClockedF1, as_text, paired_ratio, prepare, take_turns, write_image_folder, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="anything that --data of the scripts takes")
    parser.add_argument("--per-class", type=int, default=600, help="keep at most so many maps of each class")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=("ours", "ultralytics"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        outcome = {"ours": ours, "ultralytics": ultralytics}[arguments.way](arguments)
        (arguments.folder / "outcome.json").write_text(json.dumps(outcome))
        return

    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        pipeline = prepare(arguments, "yolo_inspired")
        write_image_folder(pipeline.data_module(arguments.batch_size), arguments.folder / "images")
        ways = {way: partial(in_own_process, way, arguments) for way in ("ultralytics", "ours")}
        turns = take_turns(ways, repeats=arguments.repeats)
    maps = {part: len(indices) for part, indices in pipeline.split.parts().items()}
    write_record(arguments.output, report(turns, arguments, maps))


def report(turns: dict, arguments: argparse.Namespace, maps: dict[str, int]) -> dict:
    whole = paired_ratio(*([run["seconds"] for run in turns[way]] for way in ("ultralytics", "ours")))
    level = min(max(score for _, score in run["curve"]) for runs in turns.values() for run in runs)
    to_level = {way: [first_time(run["curve"], level) for run in runs] for way, runs in turns.items()}
    same_f1 = paired_ratio(to_level["ultralytics"], to_level["ours"])
    print(f"to finish {arguments.epochs} epochs, theirs over ours: {as_text(whole)}")
    print(f"to validation macro F1 {level:.3f}, theirs over ours: {as_text(same_f1)}")
    for way, runs in turns.items():
        print(f"{way}: test macro F1 {[run['test_macro_f1'] for run in runs]}")
    settings = {k: getattr(arguments, k) for k in ("data", "per_class", "epochs", "batch_size", "image_size", "seed")}
    ratios = {"seconds_to_finish_theirs_over_ours": whole, "level": level, "seconds_to_level_theirs_over_ours": same_f1}
    return {"benchmark": "against_ultralytics", **settings, "maps": maps, **ratios, "runs": turns}


def first_time(curve: list, level: float) -> float:
    return next(seconds for seconds, score in curve if score >= level)


def in_own_process(way: str, arguments: argparse.Namespace) -> dict:
    flags = [
        f"--{k.replace('_', '-')}={v}" for k, v in vars(arguments).items() if k not in ("way", "output", "repeats")
    ]
    threads = str(len(os.sched_getaffinity(0)))  # ultralytics takes one thread unless told
    command = [sys.executable, __file__, "--way", way, *flags]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL)
    outcome = json.loads((arguments.folder / "outcome.json").read_text())
    print(f"{way}: {outcome['seconds']:.0f} s, test macro F1 {outcome['test_macro_f1']:.3f}", flush=True)
    return outcome


def ours(arguments: argparse.Namespace) -> dict:
    import integrated_pipeline
    from integrated_pipeline import import_ultralytics_tasks

    import_ultralytics_tasks()
    pipeline = prepare(arguments, "yolo_inspired")
    clock = ClockedF1()
    original = integrated_pipeline.History.on_train_epoch_end

    def noted(history, trainer, model) -> None:
        original(history, trainer, model)
        score = round(float(trainer.callback_metrics["val_macro_f1"]), 4)
        clock.points.append((round(time.monotonic() - clock._started, 2), score))

    integrated_pipeline.History.on_train_epoch_end = noted
    started = time.monotonic()
    record = pipeline.train_final_model("yolo_inspired")
    seconds = time.monotonic() - started
    (result,), _ = pipeline.evaluate([record])
    return {"seconds": seconds, "curve": clock.points, "test_macro_f1": round(result["test"]["macro_f1"], 4)}


def ultralytics(arguments: argparse.Namespace) -> dict:
    from integrated_pipeline import import_ultralytics_tasks

    os.environ["YOLO_CONFIG_DIR"] = str(arguments.folder)  # settings of its own, thrown away afterwards
    import_ultralytics_tasks()
    import torch
    from ultralytics import YOLO, settings

    settings.update({name: False for name in settings if settings[name] is True})  # its trackers are not timed
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = prepare(arguments, "yolo_inspired")
    clock = ClockedF1()

    def note(trainer) -> None:
        if len(clock.points) < arguments.epochs:  # it is called once more for the best weights, after the last epoch
            predicted = torch.cat(trainer.validator.pred)[:, 0]
            clock.add(torch.cat(trainer.validator.targets), predicted)

    model = YOLO("yolo11n-cls.yaml", verbose=False)
    model.add_callback("on_fit_epoch_end", note)
    clock.__init__()
    started = time.monotonic()
    model.train(
        data=str(arguments.folder / "images"), epochs=arguments.epochs, imgsz=arguments.image_size,
        batch=arguments.batch_size, seed=arguments.seed, device="cpu", pretrained=False, plots=False, verbose=False,
        project=str(arguments.folder / "runs"), exist_ok=True,
        fliplr=0.5, flipud=0.5, scale=0.0, auto_augment=None, erasing=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0,
    )  # fmt: skip
    seconds = time.monotonic() - started
    return {"seconds": seconds, "curve": clock.points, "test_macro_f1": test_score(model, pipeline, arguments)}


def test_score(model, pipeline, arguments: argparse.Namespace) -> float:
    """Their best checkpoint on our test part; its classes are in the folder's order, sorted by name."""
    import torch
    from sklearn.metrics import f1_score

    from wafer_data import CLASS_NAMES

    test = pipeline.data_module(arguments.batch_size).test_dataloader().dataset
    network = model.model.eval()
    ours_of = torch.tensor([CLASS_NAMES.index(name) for name in model.names.values()])
    with torch.inference_mode():
        outputs = [network(part.float().div(255).expand(-1, 3, -1, -1)) for part in test.images.split(256)]
    outputs = torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs])
    score = f1_score(
        test.labels, ours_of[outputs.argmax(1)], average="macro", labels=range(len(CLASS_NAMES)), zero_division=0
    )
    return round(float(score), 4)


if __name__ == "__main__":
    main()
