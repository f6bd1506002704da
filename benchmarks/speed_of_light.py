"""What share of a processor's arithmetic a training step uses: its products over those that the machine can do.

Measured, for each family, precision that the processor computes in, batch size and number of threads: floating point
operations (FLOP) of one map in one training step, forward and backward, times maps a second, over the FLOP a second of
large square matrix products in the same precision with the same threads. Product and step take turns, and the ratio is
of one turn. The step is the project's: forward, loss, confusion matrix, backward and optimizer of `WaferClassifier`, on
one batch, encoded already. Left out of the clock: batches, augmentation, Lightning, logging, validation.

FLOP are counted by torch's counter but for convolutions: of one with groups it counts the gradient of the kernel as if
there were none, for each channel of EfficientNet's depthwise ones as many times as there are channels. And it takes the
zeros around an image for work. On maps of few pixels they are a large part, which a clever convolution need not do;
"without borders" they are not counted. The record has all three.

With --profile, the ten operators in which most of the step's time is spent, with one thread (torch.profiler; time of
the operator itself, without what it calls).

    python benchmarks/speed_of_light.py --profile --output benchmarks/results/speed_of_light.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from measure import as_text, paired_ratio, plain_config, rows, take_turns, write_record
from provenance import FAMILIES, _of

if TYPE_CHECKING:
    from waferlab.models.classifier import WaferClassifier

MEASURES = (
    *FAMILIES, *_of("WaferClassifier", "forward", "setup", "_step", "configure_optimizers"), "possible_precisions",
    "keep_freed_memory",
    *_of("speed_of_light", "training_step", "peak_of", "flop_a_map", "seconds_of", "measure"),
)  # fmt: skip
SIDE = 1536  # of the square matrices: larger ones are no faster
SECONDS = 0.5  # that a turn of steps or products takes, about
OPERATORS = 10
DTYPES = {"32-true": "float32", "bf16-mixed": "bfloat16"}


# What is timed


def training_step(model: WaferClassifier, *, batch_size: int, pixels: int, precision: str) -> Callable[[], Any]:
    """One step of the model's training on a batch, to be called again and again; changes the model."""
    import torch

    from waferlab.data.images import encode
    from waferlab.training.memory import keep_freed_memory

    keep_freed_memory()
    model.train().setup("fit")
    model.trainer = SimpleNamespace(estimated_stepping_batches=10**6)  # all that the optimizer asks of it
    optimizer = model.configure_optimizers()["optimizer"]
    draw = torch.Generator().manual_seed(0)
    images = encode(torch.randint(0, 255, (batch_size, 1, pixels, pixels), dtype=torch.uint8, generator=draw))
    labels = torch.randint(0, 9, (batch_size,), generator=draw)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = model(images).float()
            loss = model.loss(logits, labels)
            model.confusion["fit"].update(logits.detach(), labels)
        loss.backward()
        optimizer.step()

    return step


def peak_of(precision: str) -> Callable[[], Any]:
    """A product of large matrices, which takes `2 * SIDE**3` FLOP."""
    import torch

    dtype = getattr(torch, DTYPES[precision])
    one, other, out = (torch.rand(SIDE, SIDE).to(dtype) for _ in range(3))
    return lambda: torch.mm(one, other, out=out)


def seconds_of(call: Callable[[], Any], *, seconds: float) -> float:
    """Of one call: the median of as many as fill the seconds, three at the least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# What is counted


def flop_a_map(model: WaferClassifier, *, batch_size: int, pixels: int) -> dict[str, float]:
    """FLOP of forward and backward, over the maps of the batch: counted, without borders, as torch's counter does."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from waferlab.models.small_convolutions import SmallImageConv2d

    aten, model = torch.ops.aten, copy.deepcopy(model)
    for module in model.modules():  # of whose backward the counter sees nothing; it is that of a convolution
        if isinstance(module, SmallImageConv2d):
            module.__class__ = torch.nn.Conv2d
    step, found = training_step(model, batch_size=batch_size, pixels=pixels, precision="32-true"), {}
    for name, borders in {"counted": True, "without_borders": False, "by_torch": None}.items():
        mapping = {
            aten.convolution: partial(_forward_flop, borders=borders),
            aten.convolution_backward: partial(_backward_flop, borders=borders),
        }
        with FlopCounterMode(display=False, custom_mapping={} if borders is None else mapping) as counter:
            step()
        found[name] = counter.get_total_flops() / batch_size
    return found


def _forward_flop(x, weight, bias, stride, padding, dilation, *_, out_shape, borders, **__) -> int:
    """Of a convolution; arguments are shapes, as the counter hands them over, and out_shape is that of the result."""
    pairs = 1
    for axis, (size, width, out) in enumerate(zip(x[2:], weight[2:], out_shape[2:], strict=True)):
        places = (o * stride[axis] - padding[axis] + tap * dilation[axis] for o in range(out) for tap in range(width))
        pairs *= sum(borders or 0 <= place < size for place in places)
    return 2 * x[0] * weight[0] * weight[1] * pairs


def _backward_flop(grad, x, weight, _, stride, padding, dilation, *more, out_shape, borders, **__) -> int:
    """Both gradients, as far as they are wanted: each has the products of the way forward."""
    (*_, wanted) = more
    forward = _forward_flop(x, weight, None, stride, padding, dilation, out_shape=grad, borders=borders)
    return forward * sum(wanted[:2])


# What is found


def measure(model_type: str, *, precision: str, batch_size: int, pixels: int, threads: int, turns: int) -> dict:
    """A row: speed of a family and its share of the peak."""
    import torch

    model = build(model_type, pixels)
    flop = flop_a_map(model, batch_size=batch_size, pixels=pixels)
    step = training_step(model, batch_size=batch_size, pixels=pixels, precision=precision)
    before, peak = torch.get_num_threads(), peak_of(precision)
    torch.set_num_threads(threads)
    try:
        step(), peak()  # the first time, torch picks kernels
        ways = {"step": partial(seconds_of, step, seconds=SECONDS), "peak": partial(seconds_of, peak, seconds=SECONDS)}
        taken = take_turns(ways, repeats=turns)
    finally:
        torch.set_num_threads(before)
    speeds = [batch_size / seconds for seconds in taken["step"]]
    peaks = [2 * SIDE**3 / seconds for seconds in taken["peak"]]
    row = {"model_type": model_type, "precision": precision, "batch_size": batch_size, "threads": threads}
    row |= {"mflop_a_map": {name: round(value / 1e6, 2) for name, value in flop.items()}}
    row |= {"maps_per_second": [round(speed, 1) for speed in speeds], "peak_gflops": [round(p / 1e9, 1) for p in peaks]}
    for name, value in flop.items():
        row[f"share_{name}"] = paired_ratio([value * speed for speed in speeds], peaks)
    what = f"{model_type}, {precision}, batch {batch_size}, {threads} thread{'' if threads == 1 else 's'}"
    print(f"{what}: {as_text(row['share_counted'])} of {statistics.median(peaks) / 1e9:.0f} GFLOP/s", flush=True)
    return row


def build(model_type: str, pixels: int) -> WaferClassifier:
    import torch

    from integrated_pipeline import IntegratedMLPipeline

    torch.manual_seed(0)
    return IntegratedMLPipeline(plain_config(model_type=model_type, image_size=pixels)).create_model(model_type)


def dearest_operators(model_type: str, *, precision: str, batch_size: int, pixels: int, steps: int = 5) -> list[dict]:
    """Where the time of a step goes, with one thread, the dearest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step = training_step(build(model_type, pixels), batch_size=batch_size, pixels=pixels, precision=precision)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            for _ in range(steps):
                step()
    finally:
        torch.set_num_threads(before)
    found = profiled.key_averages()
    whole = sum(one.self_cpu_time_total for one in found)
    found = sorted(found, key=lambda one: -one.self_cpu_time_total)[:OPERATORS]
    return [
        {"operator": one.key, "share": round(one.self_cpu_time_total / whole, 4), "calls": round(one.count / steps, 1)}
        for one in found
    ]


def table_of_shares(record: dict) -> list[str]:
    """What a page says of a record: a row for each family, precision, batch size and number of threads; operators."""
    table = rows(
        "model, batch, threads, precision, MFLOP a map, without borders, maps a second, peak (GFLOP/s), share of the "
        "peak, without borders",
        [
            [row["model_type"], str(row["batch_size"]), str(row["threads"]), row["precision"],
             f"{row['mflop_a_map']['counted']:.0f}", f"{row['mflop_a_map']['without_borders']:.0f}",
             f"{statistics.median(row['maps_per_second']):,.0f}", f"{statistics.median(row['peak_gflops']):.0f}",
             spread(row["share_counted"]), spread(row["share_without_borders"])]
            for row in record["rows"]
        ],
    )  # fmt: skip
    if not record["operators"]:
        return table
    return [*table, "", "Where the time of a step goes, with one thread in float32:", "", *table_of_operators(record)]


def spread(ratio: dict) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def table_of_operators(record: dict) -> list[str]:
    """Of each family the operators that take most of the time of a step."""
    cells = [
        [name, f"{sum(one['share'] for one in found):.0%}",
         "; ".join(f"{one['operator'].removeprefix('aten::')} {one['share']:.0%}" for one in found)]
        for name, found in record["operators"].items()
    ]  # fmt: skip
    return rows(f"model, share of the {OPERATORS} dearest, operators", cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["all"])
    parser.add_argument("--batch-size", type=int, nargs="+", help="as many as you like (default: the configuration's)")
    parser.add_argument("--image-size", type=int, help="default: the configuration's")
    parser.add_argument("--turns", type=int, default=5, help=f"of {SECONDS} s each (default 5)")
    parser.add_argument("--profile", action="store_true", help="the dearest operators of each family, too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    from waferlab.training.pace import cores, possible_precisions

    config = plain_config(model_type="all" if arguments.models == ["all"] else arguments.models)
    batch_sizes, pixels = arguments.batch_size or [config.batch_size], arguments.image_size or config.image_size
    names, precisions = config.model_types(), possible_precisions("cpu")
    found = [
        measure(name, precision=p, batch_size=b, pixels=pixels, threads=threads, turns=arguments.turns)
        for name in names for p in precisions for b in batch_sizes for threads in sorted({1, cores()}, reverse=True)
    ]  # fmt: skip
    operators = {}
    for name in names if arguments.profile else ():
        operators[name] = dearest_operators(name, precision="32-true", batch_size=batch_sizes[0], pixels=pixels)
        print(f"{name}: " + "; ".join(f"{one['operator']} {one['share']:.1%}" for one in operators[name]), flush=True)
    record = {"benchmark": "speed_of_light", "image_size": pixels, "rows": found, "operators": operators}
    write_record(arguments.output, record, measures=MEASURES, repeats=f"{arguments.turns} turns", precision=precisions)


if __name__ == "__main__":
    main()
