"""Promises about many maps: rows as in memory, whole or kept as a part; counts that add up; scores where labels are."""

import csv
import io
import json
import os
import signal

import numpy as np
import pytest
from made_up_models import ByShare, write_file
from rich.console import Console

from waferlab.data import streaming
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.deployment import answer_files, batch
from waferlab.deployment.batch import BatchOptions, answer_maps
from waferlab.deployment.predictor import Predictor
from waferlab.errors import DataError, ModelError, RunError, UserError
from waferlab.evaluation.metrics import compute_metrics
from waferlab.evaluation.predictions import Predictions
from waferlab.reports import run_figures


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(streaming, "MAPS_AT_ONCE", 50)


@pytest.fixture
def drawn():
    """For tests that need the picture itself."""


@pytest.fixture(autouse=True)
def without_picture(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(run_figures, "plot_least_certain", lambda maps, captions, *, path: path)


def answer(source, output, *, predictor=None, quiet=False, **options):
    """What is printed while all maps of a source are answered."""
    console = Console(record=True, width=200, highlight=False, file=io.StringIO())
    chosen = BatchOptions(output=output, **options)
    answer_maps(predictor or ByShare(), str(source), options=chosen, console=console, quiet=quiet)
    return console.export_text()


def read_rows(path):
    if path.suffix == ".csv":
        with path.open(newline="") as opened:
            return list(csv.DictReader(opened))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def summary_of(output):
    return json.loads(output.with_name(f"{output.stem}_summary.json").read_text())


def save(path, maps, **arrays):
    np.savez(path, maps=np.asarray(maps, np.uint8), **arrays)
    return path


def with_failures(*numbers, dies=16):
    """Maps of 4 x 4 dies of which so many fail."""
    return [np.repeat([2, 1], [n, dies - n]).reshape(4, 4) for n in numbers]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_each_map_has_a_row_that_says_what_the_model_says_of_all_maps_at_once(suffix, tmp_path, tiny_npz, monkeypatch):
    monkeypatch.setattr(answer_files, "ROWS_OF_A_GROUP", 100)
    whole = load_wafer_maps(tiny_npz)
    expected = ByShare().predict([whole[i] for i in range(len(whole))], coverage=0.8)
    answer(tiny_npz, tmp_path / f"out{suffix}", coverage=0.8)
    rows = read_rows(tmp_path / f"out{suffix}")
    names = ["id", "lot", "class", *(f"p_{name}" for name in CLASS_NAMES), "set", "abstain"]
    assert all(list(row) == names for row in rows)
    assert [int(row["id"]) for row in rows] == list(range(len(whole)))
    assert [row["lot"] for row in rows] == list(map(str, whole.groups))
    assert [row["class"] for row in rows] == expected.classes
    probabilities = [[float(row[f"p_{name}"]) for name in CLASS_NAMES] for row in rows]
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-6)
    assert [row["set"] for row in rows] == ["|".join(names) for names in expected.set_names()]
    abstains = [{"true": True, "false": False}.get(row["abstain"], row["abstain"]) for row in rows]
    assert abstains == expected.abstains.tolist() and len(set(abstains)) == 2


def test_a_spreadsheet_takes_no_name_for_a_formula_and_a_terminal_none_for_a_command(tmp_path):
    lots = ["=1+1", "+A1", "-A1", "@sum", "\tx", "-12", "plain", "\x1b[2J"]
    source = save(tmp_path / "maps.npz", np.ones((8, 4, 4)), group=np.array(lots))
    said = answer(source, tmp_path / "out.csv")
    kept = ["'=1+1", "'+A1", "'-A1", "'@sum", "x", "-12", "plain", "\x1b[2J"]
    assert [row["lot"] for row in read_rows(tmp_path / "out.csv")] == kept
    assert r"\x1b[2J" in said and "\x1b" not in said
    answer(source, tmp_path / "out.jsonl")
    assert [row["lot"] for row in read_rows(tmp_path / "out.jsonl")] == [lot.strip() for lot in lots]


def test_a_model_without_sets_leaves_set_and_abstain_empty_and_that_is_said(tmp_path, tiny_npz):
    for suffix, nothing in ((".csv", ""), (".jsonl", None), (".parquet", None)):
        output = tmp_path / f"out{suffix}"
        assert "no prediction sets" in answer(tiny_npz, output, predictor=ByShare(sets=None))
        assert {(row["set"], row["abstain"]) for row in read_rows(output)} == {(nothing, nothing)}
        assert summary_of(output)["classes"]["Donut"]["abstained"] is None


def test_the_first_answer_is_said_before_the_second_map_is_looked_at(tmp_path, monkeypatch):
    source = save(tmp_path / "a.npz", with_failures(*range(9), *range(8)), group=np.array(["L7"] * 17))
    predictor, said = ByShare(), []
    monkeypatch.setattr(batch, "_in_words", lambda chunk, answers: said.append(list(predictor.asked)) or "first")
    assert "first" in answer(source, tmp_path / "out.csv", predictor=predictor)
    assert said == [[1]] and predictor.asked == [1, 16]
    monkeypatch.undo()
    text = answer(source, tmp_path / "out.csv")
    assert "First answer: map 0 of lot L7 is Center" in text and "set at 90% coverage: Center" in text


def test_counts_by_class_and_lot_add_up(tmp_path):
    lots = np.array(["A", "A", "A", "B", "B", ""])
    source = save(tmp_path / "a.npz", with_failures(16, 2, 16, 2, 2, 9), group=lots)
    text = answer(source, tmp_path / "out.csv")
    summary = summary_of(tmp_path / "out.csv")
    assert {name: row["count"] for name, row in summary["classes"].items() if row["count"]} == {
        "Donut": 3, "Loc": 1, "none": 2,
    }  # fmt: skip
    assert summary["classes"]["Donut"]["share"] == 0.5 and summary["classes"]["Donut"]["abstained"] == 0
    assert summary["classes"]["Loc"]["abstained"] == 1  # between two classes
    first, second = summary["by_lot"]["listed"]
    assert first | {"lot": "B", "maps": 2, "defect_share": 1.0, "most_frequent": "Donut"} == first
    assert second | {"lot": "A", "maps": 3, "defect_share": 1 / 3, "most_frequent": "Donut"} == second
    assert summary["by_lot"]["maps_of_unknown_lot"] == 1 and "1 maps are of unknown lot" in text
    assert summary["maps"] == 6 and summary["source"] == "a.npz"


def test_twenty_lots_are_listed_and_the_rest_counted(tmp_path):
    source = save(tmp_path / "a.npz", with_failures(*[2] * 30, *[16] * 70), group=np.arange(100))
    assert "80 other lots with 80 maps: 12.5% defects" in answer(source, tmp_path / "out.csv")
    lots = summary_of(tmp_path / "out.csv")["by_lot"]
    assert lots["lots"] == 100 and [row["lot"] for row in lots["listed"]] == list(map(str, range(20)))


def test_the_least_certain_maps_of_all_chunks_are_drawn_and_listed(tmp_path, tiny_npz, drawn):
    whole = load_wafer_maps(tiny_npz)
    sure = ByShare().predict([whole[i] for i in range(len(whole))], coverage=0.9).probabilities.max(1)
    answer(tiny_npz, tmp_path / "out.csv")
    listed = summary_of(tmp_path / "out.csv")["least_certain"]
    assert [one["id"] for one in listed] == list(map(str, np.argsort(sure, kind="stable")[:12]))
    assert (tmp_path / "out_least_certain.png").stat().st_size > 20_000


def test_a_report_gives_the_scores_of_the_labelled_maps_and_says_whom_they_flatter(tmp_path, tiny_npz):
    whole = load_wafer_maps(tiny_npz)
    answers = ByShare().predict([whole[i] for i in range(len(whole))], coverage=0.9)
    expected = compute_metrics(Predictions(answers.probabilities, whole.labels, whole.groups, CLASS_NAMES))
    text = answer(tiny_npz, tmp_path / "out.csv", report=True)
    report = summary_of(tmp_path / "out.csv")["report"]
    assert report["macro_f1"] == pytest.approx(expected["macro_f1"])
    assert report["intervals"]["macro_f1"] == pytest.approx(expected["intervals"]["macro_f1"])
    assert report["confusion_matrix"] == expected["confusion_matrix"]
    held = answers.sets[np.arange(len(whole)), whole.labels]
    shares = [held[(whole.labels == 1) & (whole.groups == lot)] for lot in np.unique(whole.groups[whole.labels == 1])]
    assert report["sets"]["per_class"]["Donut"]["covered"] == pytest.approx(np.mean([s.mean() for s in shares]))
    assert "trained or tuned on, these figures flatter it" in text and "Macro F1" in text
    assert (tmp_path / "out_confusion_matrix.png").exists() and (tmp_path / "out_per_class.csv").exists()


def test_labels_that_the_model_does_not_know_matter_to_a_report_only(tmp_path):
    source = save(tmp_path / "a.npz", with_failures(1, 2), labels=np.array(["Spiral", "none"]))
    answer(source, tmp_path / "out.csv")
    with pytest.raises(DataError, match=r"'Spiral' of a\.npz is no class of the model"):
        answer(source, tmp_path / "new.csv", report=True)
    with pytest.raises(DataError, match="no labels"):
        answer(save(tmp_path / "b.npz", with_failures(1, 2)), tmp_path / "new.csv", report=True)
    assert not list(tmp_path.glob("*new*"))


def test_maps_without_a_label_are_left_out_of_a_report(tmp_path):
    source = save(tmp_path / "a.npz", with_failures(0, 2, 16), labels=np.array(["Center", "", "Donut"]))
    answer(source, tmp_path / "out.csv", report=True)
    report = summary_of(tmp_path / "out.csv")["report"]
    assert report["n_samples"] == report["n_groups"] == 2 and report["accuracy"] == 0.5


def broken_after(maps, error):
    class Broken(ByShare):
        def predict(self, some, *, coverage):
            if sum(self.asked) >= maps:
                raise error
            return super().predict(some, coverage=coverage)

    return Broken()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("error", [DataError("damaged."), KeyboardInterrupt(), MemoryError()])
def test_a_half_way_failure_keeps_the_rows_so_far_and_the_old_file(suffix, error, tmp_path, tiny_npz):
    output = tmp_path / f"out{suffix}"
    output.write_bytes(b"old")
    with pytest.raises(type(error)) as raised:
        answer(tiny_npz, output, predictor=broken_after(101, error))
    assert output.read_bytes() == b"old"
    (tmp_path / f"out{suffix}.partial").rename(tmp_path / f"part{suffix}")
    rows = read_rows(tmp_path / f"part{suffix}")
    assert [row["id"] for row in rows] == list(map(str, range(101)))
    if not isinstance(error, MemoryError):
        assert f"first 101 maps are kept in {output}.partial" in str(raised.value)
    assert not list(tmp_path.glob(".out*"))


def test_a_failure_at_the_first_map_leaves_nothing(tmp_path, tiny_npz):
    with pytest.raises(DataError, match="No answer was kept"):
        answer(tiny_npz, tmp_path / "out.csv", predictor=broken_after(0, DataError("damaged.")))
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_takes_no_row_apart(tmp_path, tiny_npz, monkeypatch):
    class Full(answer_files._Csv):
        def append(self, text):
            if self._whole < 5000:
                return super().append(text)
            self._file.write(text.encode()[:99])
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(answer_files.FORMATS, ".csv", Full)
    with pytest.raises(RunError, match=r"No space left on device.*first 51 maps are kept"):
        answer(tiny_npz, tmp_path / "out.csv")
    (tmp_path / "out.csv.partial").rename(tmp_path / "part.csv")
    assert len(read_rows(tmp_path / "part.csv")) == 51


def test_outputs_and_coverages_that_cannot_be_are_named_before_anything_is_read(tmp_path, tiny_npz):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    for output, message in {
        "out.xlsx": r"unknown kind of file '\.xlsx'. Allowed: \.csv, \.parquet, \.jsonl", "folder.csv": "is a folder",
        "file/out.csv": "cannot be written",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            answer(tiny_npz, tmp_path / output)
    with pytest.raises(UserError, match=r"coverage=0\.905 .* Allowed: 0\.5 to 0\.99"):
        answer("nowhere.npz", tmp_path / "out.csv", coverage=0.905)


def test_maps_that_are_left_out_are_counted(tmp_path):
    maps = np.array(with_failures(1, 2, 3))
    maps[0, 0, 0] = 3
    np.savez(tmp_path / "a.npz", arr_0=maps)
    assert "1 left out" in answer(tmp_path / "a.npz", tmp_path / "out.csv")
    summary = summary_of(tmp_path / "out.csv")
    assert (summary["maps"], summary["left_out"]) == (2, 1)
    np.savez(tmp_path / "a.npz", arr_0=maps[:1])
    with pytest.raises(DataError, match="no map of it can be answered"):
        answer(tmp_path / "a.npz", tmp_path / "new.csv")


def test_quiet_prints_the_outcome_alone(tmp_path, tiny_npz):
    text = answer(tiny_npz, tmp_path / "out.csv", quiet=True)
    assert "First answer" not in text and "maps/s" in text and "Near-full" in text


def test_examples_to_explain_are_the_least_certain_and_some_of_each_class(tmp_path, tiny_npz):
    stream = streaming.stream_wafer_maps(tiny_npz)
    options = BatchOptions(output=tmp_path / "out.csv")
    tallies = batch.stream_answers(ByShare(), stream, options=options, console=Console(), say=lambda text: None)
    examples = tallies.examples()
    counts = {name: row["count"] for name, row in tallies.by_class().items()}
    assert len(examples) <= 27 and len({one.id for one in examples}) == len(examples)
    for name, count in counts.items():
        assert sum(one.called == name for one in examples) >= min(2, count)
    assert tallies.least_certain[0] in examples


def test_what_the_model_lacks_is_said_before_any_map_is_answered(tmp_path, tiny_npz):
    write_file(tmp_path / "plain.onnx")
    for what in ("monitor", "explain"):
        with pytest.raises(ModelError):
            answer(tiny_npz, tmp_path / "out.csv", predictor=Predictor(tmp_path / "plain.onnx"), **{what: True})
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".npz"] == ["plain.onnx"]


def test_where_no_labelled_map_is_answered_the_summary_says_all_but_a_report(tmp_path):
    source, maps, patterns = tmp_path / "mixed.npz", np.stack(with_failures(3, 5)), np.zeros((2, 8), np.int64)
    maps[0, 0, 0] = 3  # of the only map with one pattern
    patterns[0, 1] = patterns[1, :2] = 1
    np.savez(source, arr_0=maps.astype(np.int64), arr_1=patterns)
    printed = answer(source, tmp_path / "out.csv", report=True)
    assert "No labelled map was answered: there is no report." in printed
    assert "report" not in summary_of(tmp_path / "out.csv") and len(read_rows(tmp_path / "out.csv")) == 1


def test_a_second_ctrl_c_costs_no_row(tmp_path, tiny_npz, monkeypatch):
    keep = answer_files._keep

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return keep(*arguments)

    monkeypatch.setattr(answer_files, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt), answer_files.answer_file(tmp_path / "out.csv", CLASS_NAMES) as file:
        for chunk in streaming.stream_wafer_maps(tiny_npz):
            file.write(chunk, ByShare().predict(chunk.maps, coverage=0.9))
            break
        raise KeyboardInterrupt
    assert len((tmp_path / "out.csv.partial").read_text().splitlines()) == 1 + 1  # the first chunk is one map
