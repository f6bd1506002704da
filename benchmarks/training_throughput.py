"""Our fit against a bare PyTorch loop, for each architecture.

Measured: seconds from the first batch to the end of the last epoch, on the same network from the same seed, the same
batches in the same order, augmentation, precision, memory format, optimiser, schedule and threads. Both validate after
each epoch by macro F1 and save the best weights and a state to resume from. Ours has Lightning's Trainer, its
callbacks and torchmetrics around that; the bare loop has nothing. Where ours swaps convolutions for quicker ones
(`small_convolutions.py`), a second bare loop has PyTorch's own, as a loop written by hand would. They take turns. Left
out of the clock: imports, data, building the network.

    python benchmarks/training_throughput.py --output benchmarks/results/training_throughput.json
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from measure import as_text, paired_ratio, plain_config, take_turns, write_record
from provenance import BATCHES, FAMILIES, TRAINING

MEASURES = (*BATCHES, *TRAINING, *FAMILIES, "CheckpointFiles", "History", "training_throughput.bare_loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="anything that --data of the scripts takes")
    parser.add_argument("--samples-per-class", type=int, default=300, help="generated maps of each class")
    parser.add_argument("--models", nargs="+", default=["all"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    from integrated_pipeline import IntegratedMLPipeline

    with tempfile.TemporaryDirectory() as folder:
        config = plain_config(
            model_type="all" if arguments.models == ["all"] else arguments.models,
            data=arguments.data,
            samples_per_class=arguments.samples_per_class,
            max_epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            image_size=arguments.image_size,
            output_dir=folder,
        )
        prepared = IntegratedMLPipeline(config)
        prepared.prepare_data()
        rows = [compare(prepared, name, Path(folder), arguments.repeats) for name in config.model_types()]
    settings = {k: getattr(arguments, k) for k in ("data", "samples_per_class", "batch_size", "image_size", "epochs")}
    write_record(
        arguments.output,
        {"benchmark": "training_throughput", **settings, "models": rows},
        measures=MEASURES,
        repeats=f"{arguments.repeats} turns after one to warm up",
        precision=[row["precision"] for row in rows],
    )


def compare(prepared, model_type: str, folder: Path, repeats: int) -> dict:
    from waferlab.models.small_convolutions import SmallImageConv2d

    ways = {"ours": partial(ours, prepared, model_type), "bare": partial(bare_loop, prepared, model_type, folder)}
    if any(isinstance(module, SmallImageConv2d) for module in prepared.create_model(model_type).modules()):
        ways["plain"] = partial(bare_loop, prepared, model_type, folder, plain_convolutions=True)
    take_turns(ways, repeats=1)  # the first time, torch picks kernels and the disk cache is cold
    turns = take_turns(ways, repeats=repeats)
    maps = prepared.config.max_epochs * len(prepared.split.train)
    row = {"model_type": model_type, "precision": str(prepared.precision(model_type))}
    for name, seconds in turns.items():
        row[f"{name}_maps_per_second"] = [round(maps / s, 1) for s in seconds]
    for name in [name for name in ways if name != "ours"]:
        ratio = row[f"speed_over_{name}_loop"] = paired_ratio(turns[name], turns["ours"])
        print(f"{model_type}: speed of ours over the {name} loop {as_text(ratio)}", flush=True)
    return row


def ours(prepared, model_type: str) -> float:
    from integrated_pipeline import IntegratedMLPipeline

    pipeline = IntegratedMLPipeline(replace(prepared.config, model_type=model_type))
    pipeline.maps, pipeline.split, pipeline._data = prepared.maps, prepared.split, prepared._data
    return pipeline.train_final_model(model_type).train_seconds


def bare_loop(prepared, model_type: str, folder: Path, *, plain_convolutions: bool = False) -> float:
    import numpy as np
    import torch
    from sklearn.metrics import f1_score

    from waferlab.data.images import augment, encode
    from waferlab.models.small_convolutions import SmallImageConv2d

    data = prepared.data_module(prepared.config.batch_size)
    torch.manual_seed(prepared.config.seed)
    model = prepared.create_model(model_type, class_weights=data.class_weights).to(memory_format=torch.channels_last)
    for module in model.modules() if plain_convolutions else ():
        if isinstance(module, SmallImageConv2d):
            module.__class__ = torch.nn.Conv2d
    bf16 = "bf16" in str(prepared.precision(model_type))
    batches, validation = data.train_dataloader(), data.val_dataloader()
    steps = prepared.config.max_epochs * len(batches)
    started = time.monotonic()
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": model.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=model.learning_rate, fused=True)
    best, step = -1.0, 0
    for epoch in range(prepared.config.max_epochs):
        batches.sampler.set_epoch(epoch)
        model.train()
        for images, labels in batches:
            progress = step / steps
            cosine = 0.5 * (1 + math.cos(math.pi * (progress - model.warmup) / (1 - model.warmup)))
            factor = max(0.02, progress / model.warmup) if progress < model.warmup else cosine
            for group in optimizer.param_groups:
                group["lr"] = model.learning_rate * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.loss(model(augment(encode(images))).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = torch.cat([model(encode(images)).argmax(1) for images, _ in validation])
        truth = np.concatenate([labels for _, labels in validation])
        score = f1_score(truth, predicted, average="macro", labels=range(9), zero_division=0)
        if score > best:
            best = score
            torch.save(model.state_dict(), folder / "bare_best.pt")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "bare_resume.pt")
    return time.monotonic() - started


if __name__ == "__main__":
    main()
