"""How often monitoring alarms without a reason, and which changes of real maps it notices.

    python benchmarks/monitoring.py --data wm811k.npz --model model.onnx --reference reference.npz \
        --output benchmarks/results/monitoring.json

The model must not have been trained on the validation and test parts of `split_by_lot(maps, seed=0)`. The test part is
answered once, at most 4,000 maps of all its lots; then lots are drawn.

False alarms: (a) as a user meets them, batches of test lots against the validation part; all of them come from the same
few dozen lots and one reference, so they are not independent, and the share is that of this reference; (b) batch and
reference both dealt anew from all held-out lots each time, which averages over references. Intervals are Clopper and
Pearson's for the number of batches.

Power: the same batches after a change of the maps themselves, answered by the model anew. Lots and die grids of the
maps stay as they are but where these are what changes:

    new die grid        a share of the lots is resampled to 1.2 times the rows and 0.85 times the columns
    more failing dies   a share of the passing dies of every map fails, at random
    class mix           a share of the maps gives way to maps of Edge-Loc and Scratch from the test part
    two patterns        a share of the maps gives way to two overlaid test maps of one die grid and different classes
    checkerboard        a share of the maps gets a pattern that no class has: every other 2x2 block of dies fails

With --ordered, model and reference are those of a training with split="ordered", and the last 20% of the lots take the
place of all this: macro F1 there, which batches alarm, macro F1 after correcting the answers for the estimated mix.

The clock of `seconds` counts comparing alone, not answering.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import write_record

from waferlab.data import splitting
from waferlab.data.maps import CLASS_NAMES, WaferMaps
from waferlab.data.reading import load_wafer_maps
from waferlab.deployment.predictor import Predictor
from waferlab.monitoring.class_mix import corrected_for_mix, estimate_mix, mix_with_intervals
from waferlab.monitoring.drift import ALARM, SIGNALS, Drift, compare
from waferlab.monitoring.reference import MOST_MAPS, NO_LABEL, Reference, Sample, at_most

MEASURES = (
    *("compare", "Reference.of", "Reference.calibration", "Sample.of", "fit_calibration", "estimate_mix"),
    *("mix_with_intervals", "corrected_for_mix", "Calibration", "split_by_lot", "split_in_order", "Predictor.outputs"),
)
EXTRA_FAILING = (0.01, 0.03, 0.10)  # of the passing dies
SHARES = {
    "new die grid": (0.2, 0.5, 1.0),
    "class mix": (0.1, 0.2, 0.4),
    "two patterns": (0.05, 0.15, 0.4),
    "checkerboard": (0.02, 0.05, 0.15),
}
GROWING = ("Edge-Loc", "Scratch")


@dataclass(frozen=True, eq=False)
class Held:
    """Maps that the model was neither trained nor validated on, as it answers them; labels int64 [N] or `NO_LABEL`."""

    sample: Sample
    labels: np.ndarray
    maps: list[np.ndarray]


def main() -> None:
    arguments = parse()
    maps = load_wafer_maps(arguments.data)
    predictor, watch = Predictor(arguments.model), Stopwatch(arguments.permutations)
    measure = ordered if arguments.ordered else at_random
    record = {
        "benchmark": "monitoring", "data": arguments.data, "lots_in_batch": arguments.lots,
        "permutations": arguments.permutations, "batches": arguments.batches,
        **measure(watch, predictor, maps, arguments, np.random.default_rng(arguments.seed)),
    }  # fmt: skip
    record["seconds"] = {"comparing": round(watch.seconds, 1), "comparisons": watch.calls}
    write_record(
        arguments.output, record, measures=MEASURES, weights=None, search=None,
        repeats=f"{arguments.batches} batches, {arguments.shift_batches} for each shift",
    )  # fmt: skip


def at_random(
    watch: Stopwatch, predictor: Predictor, maps: WaferMaps, arguments: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    """False alarms and power, of a model of lots at random."""
    reference, held = both_sides(predictor, maps, splitting.split_by_lot(maps, seed=0), arguments.reference)
    return {
        "test": {"maps": len(held.sample), "lots": held.sample.n_lots},
        "reference": {"maps": len(reference.sample), "lots": reference.sample.n_lots},
        "false_alarms": false_alarms(watch, reference, held, arguments, rng),
        "class_mix": mix_errors(reference, held, arguments, rng),
        "shifts": shifts(watch, predictor, reference, held, arguments, rng),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH")
    parser.add_argument("--model", type=Path, required=True, help="an exported model.onnx")
    parser.add_argument("--reference", type=Path, required=True, help="its reference.npz; made if it is not there")
    parser.add_argument("--ordered", action="store_true", help='the model was trained with split="ordered"')
    parser.add_argument("--batches", type=int, default=500, help="of test lots, for false alarms")
    parser.add_argument("--shift-batches", type=int, default=100, help="for each shift and strength")
    parser.add_argument("--lots", type=int, default=25, help="in a batch")
    parser.add_argument("--permutations", type=int, default=999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


class Stopwatch:
    """Compares, and adds up the seconds that it takes."""

    def __init__(self, permutations: int) -> None:
        self.seconds, self.calls, self._permutations = 0.0, 0, permutations

    def compare(self, reference: Reference, batch: Sample) -> Drift:
        """As `drift.compare`, with other deals each time."""
        started = time.perf_counter()
        found = compare(reference, batch, permutations=self._permutations, seed=self.calls)
        self.seconds, self.calls = self.seconds + time.perf_counter() - started, self.calls + 1
        return found


def reference_of(path: Path, predictor: Predictor, maps: WaferMaps, split: splitting.Split) -> Reference:
    if not path.exists():
        Reference.of(predictor, maps, split).save(path)
    return Reference.load(path)


def both_sides(predictor: Predictor, maps: WaferMaps, split: splitting.Split, path: Path) -> tuple[Reference, Held]:
    """What batches are compared with, and the test part that they are drawn from."""
    return reference_of(path, predictor, maps, split), hold(predictor, maps, split.test)


def hold(predictor: Predictor, maps: WaferMaps, indices: np.ndarray) -> Held:
    """Some of these maps, of all their lots, answered."""
    some = indices[at_most(maps.groups[indices], MOST_MAPS, np.random.default_rng(0).random(len(indices)))]
    dies = [maps[i] for i in some]
    columns = np.array(
        [predictor.class_names.index(n) if n in predictor.class_names else NO_LABEL for n in CLASS_NAMES]
    )
    return Held(Sample.of(predictor, dies, maps.groups[some]), columns[maps.labels[some]], dies)


def lots_drawn(lots: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [M], the maps of n lots, or of four fifths of all where there are no more."""
    names = np.unique(lots)
    return np.flatnonzero(np.isin(lots, rng.permutation(names)[: min(n, max(1, 4 * len(names) // 5))]))


# False alarms


def false_alarms(
    watch: Stopwatch, reference: Reference, held: Held, arguments: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    def as_met() -> Drift:
        return watch.compare(reference, held.sample.select(lots_drawn(held.sample.lots, arguments.lots, rng)))

    both = Sample.joined(
        [held.sample, replace(reference.sample, lots=reference.sample.lots + held.sample.lots.max() + 1)]
    )
    labels = np.concatenate([held.labels, reference.labels])

    def dealt_anew() -> Drift:
        inside = lots_drawn(both.lots, arguments.lots, rng)
        rest = np.flatnonzero(~np.isin(both.lots, both.lots[inside]))
        rest = rest[lots_drawn(both.lots[rest], reference.sample.n_lots, rng)]
        dealt = replace(reference, sample=both.select(rest), labels=labels[rest])
        return watch.compare(dealt, both.select(inside))

    ways: dict[str, Callable[[], Drift]] = {"as a user meets them": as_met, "dealt anew": dealt_anew}
    return {name: alarm_rates([way() for _ in range(arguments.batches)]) for name, way in ways.items()}


def alarm_rates(found: list[Drift]) -> dict[str, Any]:
    """How many of the batches alarm, in all and by signal; and each signal by its own p value at 5%."""
    rates = {"verdict": share_of([one.verdict == ALARM for one in found])}
    for key in SIGNALS:
        rates[key] = share_of([one.signal(key).alarms for one in found])
        alone = [one.signal(key).p for one in found]
        rates[f"{key}, alone"] = share_of([p is not None and p < 0.05 for p in alone])
    return rates


def share_of(hits: list[bool]) -> dict[str, Any]:
    from scipy.stats import binomtest

    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="exact")
    return {"share": round(sum(hits) / len(hits), 4), "interval": [round(end, 4) for end in interval], "n": len(hits)}


# The class mix


def mix_errors(
    reference: Reference, held: Held, arguments: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    """Of batches of test lots: distance of the estimated shares from the true ones, and of counted answers."""
    errors: dict[str, list[float]] = {"estimated": [], "counted": [], "validation": []}
    for _ in range(arguments.shift_batches):
        some = lots_drawn(held.sample.lots, arguments.lots, rng)
        some = some[held.labels[some] != NO_LABEL]
        batch, truth = held.sample.select(some), shares(held.labels[some], len(reference.class_names))
        mix, _ = mix_with_intervals(reference.calibration.likelihoods(batch.probabilities), batch.lots)
        counted = shares(batch.probabilities.argmax(1), len(truth))
        prior = reference.calibration.prior
        for name, guess in (("estimated", mix), ("counted", counted), ("validation", prior)):
            errors[name].append(float(np.abs(guess - truth).sum() / 2))
    return {name: {"mean": round(float(np.mean(some)), 4), "n": len(some)} for name, some in errors.items()}


def shares(labels: np.ndarray, n_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=n_classes) / len(labels)


# Shifts


def shifts(
    watch: Stopwatch, predictor: Predictor, reference: Reference, held: Held, arguments: argparse.Namespace,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    for name, strength, batch_of in shifted(predictor, held, rng):
        drifts = []
        for _ in range(arguments.shift_batches):
            drifts.append(watch.compare(reference, batch_of(lots_drawn(held.sample.lots, arguments.lots, rng))))
        found.append({"shift": name, "strength": strength, "alarms": alarm_rates(drifts)})
        print(name, strength, found[-1]["alarms"]["verdict"])
    return found


def shifted(
    predictor: Predictor, held: Held, rng: np.random.Generator
) -> Iterator[tuple[str, float, Callable[[np.ndarray], Sample]]]:
    """Name, strength, and what makes a batch of the places of its maps."""
    sample, n = held.sample, len(held.sample)

    def answered(maps: list[np.ndarray]) -> Sample:
        return Sample.joined([sample, Sample.of(predictor, maps, sample.lots)])

    pool = answered([resampled(one) for one in held.maps])
    for strength in SHARES["new die grid"]:

        def other_grids(some: np.ndarray, pool: Sample = pool, strength: float = strength) -> Sample:
            lots = np.unique(sample.lots[some])
            changed = np.isin(sample.lots[some], rng.permutation(lots)[: round(strength * len(lots))])
            return pool.select(some + n * changed)

        yield "new die grid", strength, other_grids
    for strength in EXTRA_FAILING:
        pool = answered([more_failing(one, strength, rng) for one in held.maps])
        yield "more failing dies", strength, lambda some, pool=pool: pool.select(some + n)
    growing = np.flatnonzero(np.isin(held.labels, [predictor.class_names.index(name) for name in GROWING]))
    overlaid, both = overlays(held, predictor, rng)
    kinds = {
        "class mix": (Sample.joined([sample, sample]), growing),
        "two patterns": (answered(overlaid), both),
        "checkerboard": (answered([checkered(one) for one in held.maps]), None),
    }
    for name, (pool, instead) in kinds.items():
        for strength in SHARES[name]:

            def partly(some: np.ndarray, pool=pool, instead=instead, strength: float = strength) -> Sample:
                other = some if instead is None else rng.choice(instead, len(some))
                places = np.where(rng.random(len(some)) < strength, n + other, some)
                return replace(pool.select(places), lots=sample.lots[some], grids=sample.grids[some])

            yield name, strength, partly


def resampled(one: np.ndarray) -> np.ndarray:
    rows, columns = one.shape
    high, wide = round(1.2 * rows) + 1, max(3, round(0.85 * columns))
    down = np.minimum(((np.arange(high) + 0.5) * rows / high).astype(int), rows - 1)
    across = np.minimum(((np.arange(wide) + 0.5) * columns / wide).astype(int), columns - 1)
    return np.ascontiguousarray(one[down][:, across])


def more_failing(one: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.where((one == 1) & (rng.random(one.shape) < share), np.uint8(2), one)


def checkered(one: np.ndarray) -> np.ndarray:
    row, column = np.indices(one.shape) // 2
    return np.where((one > 0) & ((row + column) % 2 == 0), np.uint8(2), one)


def overlays(held: Held, predictor: Predictor, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """All maps, each with a pattern overlaid by one of another class on the same die grid; and which have one."""
    plain = predictor.class_names.index("none") if "none" in predictor.class_names else NO_LABEL
    pattern = (held.labels != plain) & (held.labels != NO_LABEL)
    _, grid = np.unique(held.sample.grids, axis=0, return_inverse=True)
    made, both = list(held.maps), []
    for i in np.flatnonzero(pattern):
        partners = np.flatnonzero(pattern & (grid.ravel() == grid.ravel()[i]) & (held.labels != held.labels[i]))
        if len(partners):
            made[i] = np.maximum(held.maps[i], held.maps[rng.choice(partners)])
            both.append(i)
    return made, np.array(both if both else np.flatnonzero(pattern), dtype=np.int64)


# The last lots


def ordered(
    watch: Stopwatch, predictor: Predictor, maps: WaferMaps, arguments: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Any]:
    """A model of the first lots on the last ones."""
    reference, held = both_sides(predictor, maps, splitting.split_in_order(maps, seed=0), arguments.reference)
    known = held.labels != NO_LABEL
    calibrated = reference.calibration.apply(held.sample.probabilities[known])
    likelihoods = reference.calibration.likelihoods(held.sample.probabilities[known])
    mix = estimate_mix(likelihoods, np.ones((len(likelihoods), 1)))[0]
    prior, truth = reference.calibration.prior, held.labels[known]
    corrected = corrected_for_mix(calibrated, prior, mix)
    by_true_mix = corrected_for_mix(calibrated, prior, shares(truth, len(prior)))
    answers = {
        "as answered": held.sample.probabilities[known], "calibrated": calibrated,
        "corrected for the estimated mix": corrected, "corrected for the true mix": by_true_mix,
    }  # fmt: skip
    drifts = [
        watch.compare(reference, held.sample.select(lots_drawn(held.sample.lots, arguments.lots, rng)))
        for _ in range(arguments.shift_batches)
    ]
    found = {
        "maps": len(held.sample), "lots": held.sample.n_lots,
        "all": {one.key: {"effect": round(one.effect, 4), "p": one.p, "p_corrected": one.p_corrected}
                for one in watch.compare(reference, held.sample).signals},
        "alarms": alarm_rates(drifts),
        "macro_f1": {name: macro_f1(truth, some.argmax(1)) for name, some in answers.items()},
        "accuracy": {name: round(float((truth == some.argmax(1)).mean()), 4) for name, some in answers.items()},
        "mix": {name: [round(float(x), 4) for x in (prior[i], mix[i], (truth == i).mean())]
                for i, name in enumerate(reference.class_names)},
    }  # fmt: skip
    return {"ordered": found}


def macro_f1(truth: np.ndarray, answers: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return round(float(f1_score(truth, answers, average="macro", labels=np.unique(truth), zero_division=0)), 4)


if __name__ == "__main__":
    main()
