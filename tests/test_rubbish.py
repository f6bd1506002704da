"""Promises about what makes no sense: it gets a sentence, never a traceback, and costs no more than it weighs."""

import io
import json
import os
import pickle
import string
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import integrated_pipeline  # noqa: F401  which registers the models
from waferlab.config import ExperimentConfig, default_options, parse_options, read_options
from waferlab.data.image_files import choose_levels, read_image
from waferlab.data.lswmd import read_lswmd
from waferlab.data.maps import CLASS_NAMES
from waferlab.data.reading import load_wafer_maps
from waferlab.data.streaming import stream_wafer_maps
from waferlab.deployment.answer_files import answer_file
from waferlab.deployment.predictor import Answers
from waferlab.deployment.request_maps import JSON_TYPE, NPY_TYPES, RefusedRequest, maps_from_body
from waferlab.errors import ConfigError, DataError, printable
from waferlab.reports.pages import to_html
from waferlab.reports.run_figures import plot_least_certain

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks/faults"))
NAMES = sorted(default_options())
SENTENCE = 700  # characters that an error may have

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_config_or_sentence(make):
    """What comes out is a configuration that can be written down, or an error that a person reads."""
    try:
        config = make()
    except ConfigError as error:
        assert 10 < len(str(error)) < SENTENCE
        return
    yaml.safe_dump(config.as_plain())
    config.training_fingerprint(), config.results_dir, config.checkpoints_dir, config.shared_weights_dir


@quick
@given(name=st.sampled_from(NAMES), value=plain)
@example("seed", int("f" * 4000, 16))
@example("trainer", {1: 2})
@example("model_type", [["lightning_cnn"]])
@example("enable_optuna", "maybe")
@example("output_dir", "a\0b")
@example("data", "m\udcf6.npz")
@example("devices", "1" * 5000)
@example("model_type", "x" * 100_000)
@example("trainer", {"x" * 1000: 1})
def test_any_value_of_an_option_is_taken_or_refused_in_a_sentence(name, value):
    assert_config_or_sentence(lambda: ExperimentConfig(**{name: value}))


@quick
@given(name=st.sampled_from(NAMES), text=st.text(st.characters(codec="utf-8"), max_size=40))
@example("seed", "2001-99-99")
@example("seed", "1" * 5000)
@example("trainer", "[" * 5000)
@example("objectives", "&a [*a]")
@example("seed", f"!<{'a' * 100_000}> 1")
def test_any_text_behind_an_option_is_taken_or_refused_in_a_sentence(name, text):
    assert_config_or_sentence(lambda: ExperimentConfig(**parse_options([f"{name}={text}"])))


@quick
@given(content=st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
@example(content=b"seed: 1\n---\nseed: 2\n")
@example(content=b"\xff\xfes\x00")
@example(content=b"{{}}: 1")
def test_any_file_of_options_is_taken_or_refused_in_a_sentence(content, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_bytes(content)
    assert_config_or_sentence(lambda: ExperimentConfig(**read_options(file)))


def test_a_few_lines_cannot_stand_for_gigabytes(tmp_path):
    file = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"aliases such as \*a0 are not read"):
        read_options(file)


def test_a_file_without_an_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="is larger than"):
        read_options("/dev/zero")


@st.composite
def damaged(draw, sound):
    """A sound input of which some bytes are others, and the end may be missing or be a second one."""
    content = bytearray(draw(st.sampled_from(sound)))
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)):
        content[place % len(content)] = byte
    end = draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:end]) + bytes(content) * draw(st.booleans())


@pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL.TiffImagePlugin"
)  # what Pillow says of a damaged TIFF before it gives up
@pytest.mark.parametrize("reader", ["image", "lswmd", "model", "npz", "request"])
@quick
@given(st.data())
def test_a_damaged_file_or_request_is_read_or_refused_in_a_sentence(reader, data):
    from fuzz import seeds
    from targets import TARGETS

    TARGETS[reader](data.draw(st.binary(max_size=300) | damaged(seeds(reader))))


# --- what files cost


@contextmanager
def memory():
    """A function that tells how many bytes were taken at most since the block began."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def dense(path, rng):
    arrays = {"maps": rng.integers(0, 3, (3000, 50, 50), np.uint8), "labels": np.repeat(CLASS_NAMES, 334)[:3000]}
    np.savez(path := path / "dense.npz", **arrays)
    return arrays["maps"].nbytes, lambda: load_wafer_maps(path)


def one_after_another(path, rng):
    arrays = {
        "maps_flat": rng.integers(0, 3, 3000 * 2500, np.uint8), "offsets": np.arange(3001) * 2500,
        "shapes": np.full((3000, 2), 50), "labels": np.repeat(CLASS_NAMES, 334)[:3000],
    }  # fmt: skip
    np.savez(path := path / "flat.npz", **arrays)
    return arrays["maps_flat"].nbytes, lambda: load_wafer_maps(path)


def mixed(path, rng):
    maps = rng.integers(0, 3, (800, 52, 52), np.int32)
    np.savez(path := path / "mixed.npz", arr_0=maps, arr_1=np.eye(9, 8, dtype=np.int32)[np.arange(800) % 9])
    return maps.nbytes, lambda: load_wafer_maps(path)


def streamed(path, rng):
    honest, _ = dense(path, rng)
    return honest, lambda: [None for _ in stream_wafer_maps(path / "dense.npz")]


def pickled(path, rng):
    maps = list(rng.integers(0, 3, (3000, 50, 50), np.uint8))
    frame = pandas.DataFrame({"waferMap": maps, "lotName": ["a", "b"] * 1500, "failureType": ["none"] * 3000})
    (path := path / "LSWMD.pkl").write_bytes(pickle.dumps(frame))
    return path.stat().st_size, lambda: read_lswmd(path)


def an_image(levels, path, rng):
    Image.fromarray(rng.integers(0, 256, (1024, 1024), np.uint8)).save(path := path / "image.bmp")
    return 1024 * 1024, lambda: read_image(path, choose_levels([path], levels))


def a_request(kind, path, rng):
    maps = rng.integers(0, 3, (200, 100, 100), np.uint8)
    written = io.BytesIO()
    np.save(written, maps)
    text = json.dumps({"maps": maps.tolist()}, separators=(",", ":"))
    body = text.encode() if kind == JSON_TYPE else written.getvalue()
    return len(body), lambda: maps_from_body(body, kind)


@pytest.mark.parametrize(
    "make",
    [
        *(dense, one_after_another, mixed, streamed, pickled),
        *(partial(an_image, levels) for levels in ("three", "binary", "auto")),
        *(partial(a_request, kind) for kind in (JSON_TYPE, NPY_TYPES[0])),
    ],
)
def test_reading_takes_at_most_four_times_the_memory_that_the_content_has(make, tmp_path):
    honest, read = make(tmp_path, np.random.default_rng(0))
    with memory() as at_most:
        kept, most = read(), at_most()
    allowed = 6 if "json" in str(make) else 4  # a die is two letters of JSON and eight bytes of a list; 8 MiB at most
    assert kept is not None and most <= allowed * honest, f"{most / honest:.1f} times"


# --- what is made to cost more, or to break


def npz_member(path, content, compression):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("maps.npy", content)
        archive.writestr("labels.npy", array_as_npy(np.array(["none"])))
    return path


def array_as_npy(array):
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


def test_an_npz_that_is_compressed_as_numpy_never_does_is_refused_before_it_is_inflated(tmp_path):
    path = npz_member(tmp_path / "x.npz", array_as_npy(np.zeros((1, 2**13, 2**13), np.uint8)), zipfile.ZIP_BZIP2)
    with memory() as at_most:
        for read in (load_wafer_maps, stream_wafer_maps):
            with pytest.raises(DataError, match=r"x\.npz: cannot be read as an \.npz"):
                read(path)
        assert at_most() < 2**20


def a_frame(**cells):
    columns = {"waferMap": [np.ones((2, 2), np.uint8)], "lotName": ["a"], "failureType": ["none"], **cells}
    return pandas.DataFrame({name: pandas.Series(column, dtype=object) for name, column in columns.items()})


def nested(depth, width=10):
    """A list of the same list so many times, and so on: short to write down, and longer than any memory to print."""
    inner = ["x"]
    for _ in range(depth):
        inner = [inner] * width
    return inner


@pytest.mark.parametrize("column", ["waferMap", "lotName", "failureType"])
def test_of_a_cell_that_holds_more_than_it_weighs_only_the_beginning_is_said(column, tmp_path):
    path = tmp_path / "LSWMD.pkl"
    path.write_bytes(pickle.dumps(a_frame(**{column: [nested(30)]})))
    with pytest.raises(ValueError, match="Row 0: ") as said:
        read_lswmd(path)
    assert len(str(said.value)) < SENTENCE


def test_letters_that_unicode_does_not_know_are_refused_in_a_sentence(tmp_path):
    labels = np.zeros(1, "<U4")
    labels.view(np.uint32)[:] = 0x110000
    np.savez(tmp_path / "x.npz", maps=np.ones((1, 3, 3), np.uint8), labels=labels)
    for read in (load_wafer_maps, lambda path: list(stream_wafer_maps(path))):
        with pytest.raises(DataError, match=r"x\.npz: cannot be read"):
            read(tmp_path / "x.npz")


def an_icon(path):
    inside = io.BytesIO()
    Image.new("1", (9000, 9000)).save(inside, "png")
    head = b"\0\0\1\0\1\0\0\0\0\0\1\0\1\0" + len(inside.getvalue()).to_bytes(4, "little") + (22).to_bytes(4, "little")
    path.write_bytes(head + inside.getvalue())


def a_broken_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500), np.uint8)).save(path)
    first, _, rest = path.read_bytes().partition(b"IDAT")
    assert b"IDAT" in rest
    path.write_bytes(first + b"IDAT" + rest.replace(b"IDAT", b"ID\xffT", 1))


@pytest.mark.parametrize("make", [an_icon, a_broken_png, lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")])
def test_an_image_of_another_kind_or_broken_is_refused_before_it_is_inflated(make, tmp_path):
    make(tmp_path / "x.png")
    with memory() as at_most:
        with pytest.raises(DataError, match=r"x\.png: not a readable image"):
            read_image(tmp_path / "x.png", "three")
        assert at_most() < 2**22


@pytest.mark.parametrize("name", ["x.npz", "LSWMD.pkl", "x.png"])
def test_what_may_never_end_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    for read in (load_wafer_maps, stream_wafer_maps):
        with pytest.raises(DataError, match="no plain file"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="no images in it"):
        stream_wafer_maps(tmp_path)


def test_the_home_of_somebody_who_is_not_there_is_a_name_like_any_other():
    for read in (load_wafer_maps, stream_wafer_maps):
        with pytest.raises(DataError, match=r"~nobody-of-that-name/x\.npz: no such file"):
            read("~nobody-of-that-name/x.npz")


def test_a_number_of_any_length_is_read_in_no_time(tmp_path):
    (tmp_path / "options.yaml").write_text(f"seed: {'1' * 200_000}x")
    assert_config_or_sentence(lambda: ExperimentConfig(**read_options(tmp_path / "options.yaml")))


@pytest.mark.parametrize("inside", [b"[]", b"{}", b'""'])
def test_a_request_of_countless_little_things_is_refused_before_they_are_made(inside):
    body = b'{"maps": [' + b",".join([inside] * 1_000_000) + b"]}"
    with memory() as at_most:
        with pytest.raises(RefusedRequest) as said:
            maps_from_body(body, JSON_TYPE)
        assert said.value.status == 413 and at_most() < 2**20


def test_names_that_are_not_unicode_reach_the_answers_and_the_terminal_in_other_letters(tmp_path):
    name = os.fsdecode(b"L\xf6\x1b[2J.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / name)
    (chunk,) = stream_wafer_maps(tmp_path)
    chunk.ids[0].encode()
    assert printable(chunk.ids[0]) == r"L\udcf6\x1b[2J.png"
    answers = Answers(("a", "b"), np.array([[0.25, 0.75]], np.float32), None, 0.9)
    for suffix in (".csv", ".parquet"):
        with answer_file(tmp_path / f"answers{suffix}", ("a", "b")) as file:
            file.write(chunk, answers)
    assert r"L\udcf6" in (tmp_path / "answers.csv").read_text()
    assert pandas.read_parquet(tmp_path / "answers.parquet").id[0] == chunk.ids[0]


def test_dollars_in_a_name_are_drawn_and_no_formula(tmp_path):
    plot_least_certain([np.ones((4, 4), np.uint8)], [(r"$\q$", "$x$ $y$", 0.5, "$")], path=tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["../secret", "%2Fetc%2Fpasswd", "gone.png", "."])
def test_a_picture_that_somebodys_text_asks_for_is_not_fetched(name, tmp_path):
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "pages").mkdir()
    page = to_html(f"# T\n\n## S\n\n![a picture]({name})\n", folder=tmp_path / "pages")
    assert "a picture" in page and "<img" not in page


CORPUS = sorted(file for file in (ROOT / "tests/corpus").glob("*/*"))


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_once_went_wrong_is_refused_in_a_sentence(file):
    from targets import TARGETS

    TARGETS[file.parent.name](file.read_bytes())
