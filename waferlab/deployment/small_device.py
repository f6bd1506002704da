"""The champion for a device that is smaller than a laptop: 8-bit whole numbers, and ONNX Runtime's own format.

    python -m waferlab.deployment.small_device yesterday.npz --score labelled.npz --output device

writes four files: the model as it is and in 8 bits, each as .onnx and as .ort. ONNX Runtime's own format needs no
reader of ONNX: a build of the runtime that knows nothing but the operators in `required_operators.config` takes it.
Which of the four is worth it depends on the device: sizes are the same everywhere, and so are scores on labelled maps
but for roundings; the milliseconds are those of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from waferlab import command_line
from waferlab.deployment.batch import FLATTERED
from waferlab.deployment.predictor import DEFAULT_MODEL, Predictor, batches_of_one_size
from waferlab.errors import ConfigError
from waferlab.tracking.whole_files import write_atomically

if TYPE_CHECKING:
    from waferlab.data.maps import WaferMaps
    from waferlab.reports.tables import Table

EXAMPLES = """\
  python -m waferlab.deployment.small_device yesterday.npz
  python -m waferlab.deployment.small_device yesterday.npz --score labelled.npz --output device
  python -m waferlab.deployment.small_device lot_417/ --model checkpoints/demo_ultra/lightning_cnn/model.onnx"""
MOST_MAPS = 512  # that the ranges of 8-bit numbers are taken from
TIMED_MAPS = 200  # one at a time, as they come off a tester
OPERATORS = "required_operators.config"
IN_8_BITS = ("Conv", "Add", "Relu", "AveragePool")
NO_SETS = "prediction sets are left out of the 8-bit files: their promise was made for the other's probabilities"


def main() -> int:
    """Makes the forms with the command line's arguments and returns the exit status."""
    parser = command_line.Parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("maps", metavar="MAPS", help="whose values the ranges of 8-bit numbers are taken from; labels are not needed")
    add("--score", metavar="MAPS", help="labelled maps, of lots that the model was not trained on, to score all forms")
    add("--model", default=DEFAULT_MODEL, help=f"a .onnx file, or models:/name@alias (default {DEFAULT_MODEL})")
    add("--tracking-uri", metavar="URI", help="of the registry (default: $MLFLOW_TRACKING_URI, else ./mlflow.db)")
    add("--output", type=Path, default=Path("device"), metavar="DIR", help="folder to write to (default: device)")
    arguments = parser.parse_args()
    return command_line.run(lambda: run(arguments), when_stopped="No file is half written: start it anew.")


def run(arguments: argparse.Namespace) -> None:
    """The work itself; imported late, so that --help and wrong flags answer at once."""
    from rich.console import Console

    from waferlab.data.reading import load_wafer_maps
    from waferlab.reports.columns import InColumns

    predictor = Predictor.load(arguments.model, tracking_uri=arguments.tracking_uri)
    predictor.graph()  # or a sentence: an .ort file is one of these forms already
    labelled = load_wafer_maps(arguments.score) if arguments.score else None
    maps = maps_of(arguments.maps)
    files = make_forms(predictor.path, maps, arguments.output)
    if predictor.sets is not None:
        print(NO_SETS)
    found = measure_forms(files, maps, labelled)
    write_atomically(arguments.output / "forms.json", (json.dumps(found, indent=1) + "\n").encode())
    Console().print(InColumns(forms_table(found)))
    if labelled is not None:
        print(FLATTERED)
    print(f"in {arguments.output}, with what a build of ONNX Runtime needs for them in {OPERATORS}")


def maps_of(source: str) -> list[np.ndarray]:
    """Up to `MOST_MAPS` of a source, spread over all of it, each uint8 [rows, columns].

    Raises:
        DataError: the source cannot be read.
    """
    from waferlab.data.streaming import stream_wafer_maps

    rng, kept, seen = np.random.default_rng(0), [], 0
    for chunk in stream_wafer_maps(source):  # each map of a stream of unknown length has the same chance
        for one in chunk.maps:
            seen += 1
            if len(kept) < MOST_MAPS:
                kept.append(one.copy())  # and not the whole chunk that it is a view of
            elif (place := int(rng.integers(seen))) < MOST_MAPS:
                kept[place] = one.copy()
    return kept


def make_forms(file: Path, maps: Sequence[np.ndarray], folder: Path) -> dict[str, Path]:
    """Writes the four files to a folder, each whole or not at all; by name.

    Args:
        file: that `export_onnx` has written.
        maps: that bring about the ranges of 8-bit numbers.
        folder: made if need be; files of the same names are replaced.

    Raises:
        ConfigError: there are no maps.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    if not maps:
        raise ConfigError("Without a map nobody knows which ranges 8-bit numbers have to reach over. Give some.")
    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(io.StringIO()):
        whole, small = Path(made) / "model.onnx", Path(made) / "model_8bit.onnx"
        whole.write_bytes(file.read_bytes())
        in_8_bits(whole, small, maps)
        # Without what makes a file faster on this kind of processor alone, as it is meant for another.
        logging.disable(logging.INFO)
        try:
            convert_onnx_models_to_ort(Path(made), optimization_styles=[OptimizationStyle.Fixed])
        finally:
            logging.disable(logging.NOTSET)
        folder.mkdir(parents=True, exist_ok=True)
        forms = {
            f"{kind}, {ending}": Path(made) / f"{name}.{ending}"
            for kind, name in (("float", "model"), ("8-bit", "model_8bit"))
            for ending in ("onnx", "ort")
        }
        (operators,) = Path(made).glob("*.config")
        for source, target in [*((path, path.name) for path in forms.values()), (operators, OPERATORS)]:
            write_atomically(folder / target, source.read_bytes())
    return {form: folder / path.name for form, path in forms.items()}


def in_8_bits(file: Path, small: Path, maps: Sequence[np.ndarray]) -> Path:
    """Writes the model with convolutions in 8-bit whole numbers, their ranges those that these maps bring about.

    Weights have 7 bits: where a processor has no instruction for it (VNNI), sums of pairs of 8-bit products overflow.
    What the file says of itself stays, but for its prediction sets.
    """
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Maps(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = ({"maps": batch} for _, batch in batches_of_one_size(maps))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(small), Maps(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=list(IN_8_BITS),
        )  # fmt: skip
    model, original = onnx_ir.load(small), onnx_ir.load(file)
    DeduplicateInitializersPass(size_limit=2**31)(model)  # eight views and one have each their weights by then
    model.metadata_props.clear()
    model.metadata_props.update({key: v for key, v in original.metadata_props.items() if key != "prediction_sets"})
    onnx_ir.save(model, small)
    return small


def measure_forms(
    files: dict[str, Path], maps: Sequence[np.ndarray], labelled: WaferMaps | None, *, part: np.ndarray | None = None
) -> dict[str, Any]:
    """Of each form: bytes; milliseconds for a map by itself, with one thread; on labelled maps its macro F1.

    The difference in macro F1 is to the first form, with its interval over lots (see `compare_macro_f1`).

    Args:
        files: by form.
        maps: to be timed on.
        labelled: to be scored on, or None.
        part: int64 [n], which of the labelled maps; None for all.
    """
    predictors = {form: Predictor(file, threads=1, name=form) for form, file in files.items()}
    seconds: dict[str, list[float]] = {form: [] for form in files}
    timed = maps[:TIMED_MAPS]
    for one in [*timed[:10], *timed]:  # in turn, as a machine is not equally fast all the time; the first to warm up
        for form, predictor in predictors.items():
            started = time.perf_counter()
            predictor.probabilities([one])
            seconds[form].append(time.perf_counter() - started)
    found: dict[str, Any] = {
        form: {"bytes": files[form].stat().st_size, "ms_a_map": float(np.median(seconds[form][10:])) * 1e3}
        for form in files
    }
    if labelled is not None:
        part = np.arange(len(labelled)) if part is None else part
        for form, scores in score_forms(predictors, labelled, part).items():
            found[form] |= scores
    return found


def score_forms(predictors: dict[str, Predictor], labelled: WaferMaps, part: np.ndarray) -> dict[str, dict[str, Any]]:
    """Macro F1 of each on labelled maps, beside that of the first; maps of classes that it does not know are left out.

    Raises:
        ConfigError: no map is left.
    """
    from waferlab.data.maps import CLASS_NAMES
    from waferlab.evaluation.metrics import compare_macro_f1
    from waferlab.evaluation.predictions import Predictions

    names = next(iter(predictors.values())).class_names
    columns = np.array([names.index(name) if name in names else -1 for name in CLASS_NAMES])[labelled.labels]
    known = part[columns[part] >= 0]
    if not len(known):
        raise ConfigError(f"--score: not one map has a class that the model knows: {', '.join(names)}.")
    maps = [labelled[i] for i in known]
    answers = {
        form: Predictions(predictor.probabilities(maps), columns[known], labelled.groups[known], names)
        for form, predictor in predictors.items()
    }
    first = next(iter(answers.values()))
    return {
        form: {
            "maps": len(known),
            "against_first": compare_macro_f1(one, first),
            "other_class": float((one.predicted != first.predicted).mean()),
        }
        for form, one in answers.items()
    }


def forms_table(found: dict[str, Any]) -> Table:
    """A table of what `measure_forms` gives."""
    from waferlab.reports.tables import Table

    scored = "against_first" in next(iter(found.values()))
    rows = []
    for form, values in found.items():
        row = [form, f"{values['bytes'] / 1e3:,.0f}", f"{values['ms_a_map']:.2f}"]
        if scored:
            against, (low, high) = values["against_first"], values["against_first"]["interval"]
            row += [f"{against['new']:.4f}", f"{against['difference']:+.4f} [{low:+.4f}, {high:+.4f}]",
                    f"{values['other_class']:.2%}"]  # fmt: skip
        rows.append(row)
    return Table(["form", "kB", "ms a map", *(["macro F1", "difference", "other class"] if scored else [])], rows)


if __name__ == "__main__":
    sys.exit(main())
