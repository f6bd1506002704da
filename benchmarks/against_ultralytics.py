"""Our training against Ultralytics' own trainer, on the same network.

Measured: seconds from the call to its return for `YOLO("yolo11n-cls.yaml").train(...)` and for
`train_final_model("yolo_inspired")`, with the same maps, image size, batch size, epochs, threads and random initial
weights, all in float32, in turn, each in a process of its own, after a turn that is left out; and the seconds until the
validation macro F1 first reaches what all reach. Each validates after every epoch and saves checkpoints. Theirs has
three equal channels, since its classification knows no other, and reads PNG files of the pixels that ours resizes
itself: once from the files in each epoch, once decoded into memory at the start (`cache="ram"`). It augments by its own
flips only: its default crops, colour changes and erasing are switched off, since on wafer maps they cost it both time
and score. Left out of the clock: imports, writing the PNG files, the final test.

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

from measure import (
    ClockedF1,
    against_ours,
    prepare,
    repeats_in_words,
    take_warm_turns,
    write_image_folder,
    write_record,
)
from provenance import BATCHES, FAMILY, TRAINING

from waferlab.training.callbacks import History

MEASURES = (
    *(*BATCHES, *TRAINING, *FAMILY["yolo_inspired"], "CheckpointFiles", "History"),
    *("against_ultralytics.ultralytics", "against_ultralytics.ours"),
)
READS = {"Ultralytics' trainer, PNG files": "PNG files", "Ultralytics' trainer, memory": "memory"}


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
    parser.add_argument("--way", choices=("ours", *READS.values()), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(precision="32-true")  # the other trainer has no lower one on a CPU
    arguments = parser.parse_args()
    if arguments.way:
        outcome = ours(arguments) if arguments.way == "ours" else ultralytics(arguments)
        (arguments.folder / "outcome.json").write_text(json.dumps(outcome))
        return

    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        pipeline = prepare(arguments, "yolo_inspired")
        write_image_folder(pipeline.data_module(arguments.batch_size), arguments.folder / "images")
        ways = {name: partial(in_own_process, way, arguments) for name, way in {**READS, "ours": "ours"}.items()}
        row = against_ours(take_warm_turns(ways, repeats=arguments.repeats))
    for name, kind in READS.items():
        row[name] |= {"reads": kind, "channels": row["runs"][name][0]["channels"]}
    settings = {k: getattr(arguments, k) for k in ("data", "per_class", "epochs", "batch_size", "image_size", "seed")}
    maps = {part: len(indices) for part, indices in pipeline.split.parts().items()}
    models = [{"model_type": "yolo_inspired", **row}]
    write_record(
        arguments.output,
        {"benchmark": "against_ultralytics", **settings, "maps": maps, "models": models},
        measures=MEASURES,
        repeats=repeats_in_words(arguments.repeats),
        precision=[arguments.precision],
    )


def in_own_process(way: str, arguments: argparse.Namespace) -> dict:
    passed = {k: v for k, v in vars(arguments).items() if k not in ("way", "output", "repeats", "precision")}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in passed.items()]
    threads = str(len(os.sched_getaffinity(0)))  # ultralytics takes one thread unless told
    command = [sys.executable, __file__, "--way", way, *flags]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL)
    outcome = json.loads((arguments.folder / "outcome.json").read_text())
    print(f"{way}: {outcome['seconds']:.0f} s, test macro F1 {outcome['test_macro_f1']:.3f}", flush=True)
    return outcome


def ours(arguments: argparse.Namespace) -> dict:
    from waferlab.models.yolo import import_ultralytics_tasks

    import_ultralytics_tasks()
    pipeline = prepare(arguments, "yolo_inspired")
    clock = ClockedF1()
    original = History.on_train_epoch_end

    def noted(history, trainer, model) -> None:
        original(history, trainer, model)
        score = round(float(trainer.callback_metrics["val_macro_f1"]), 4)
        clock.points.append((round(time.monotonic() - clock._started, 2), score))

    History.on_train_epoch_end = noted
    started = time.monotonic()
    record = pipeline.train_final_model("yolo_inspired")
    seconds = time.monotonic() - started
    (result,), _ = pipeline.evaluate([record])
    return {"seconds": seconds, "curve": clock.points, "test_macro_f1": round(result.test["macro_f1"], 4)}


def ultralytics(arguments: argparse.Namespace) -> dict:
    from waferlab.models.yolo import import_ultralytics_tasks

    os.environ["YOLO_CONFIG_DIR"] = str(arguments.folder)  # settings of its own, thrown away afterwards
    import_ultralytics_tasks()
    import torch
    from ultralytics import YOLO, settings

    settings.update({name: False for name in settings if settings[name] is True})  # its trackers are not timed
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = prepare(arguments, "yolo_inspired")
    clock, channels = ClockedF1(), []

    def note(trainer) -> None:
        channels.append(trainer.data["channels"])
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
        amp=False, cache="ram" if arguments.way == "memory" else False,
        project=str(arguments.folder / "runs"), exist_ok=True,
        fliplr=0.5, flipud=0.5, scale=0.0, auto_augment=None, erasing=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0,
    )  # fmt: skip
    seconds = time.monotonic() - started
    score = test_score(model, pipeline, arguments)
    return {"seconds": seconds, "curve": clock.points, "test_macro_f1": score, "channels": channels[0]}


def test_score(model, pipeline, arguments: argparse.Namespace) -> float:
    """Their best checkpoint on our test part; its classes are in the folder's order, sorted by name."""
    import torch
    from sklearn.metrics import f1_score

    from waferlab.data.maps import CLASS_NAMES

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
