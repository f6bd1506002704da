"""Promises about the gate: who becomes champion, on which maps that is decided, and that the reason is written."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_models import write_file

from waferlab.data.maps import CLASS_NAMES, pack_maps
from waferlab.data.splitting import Split
from waferlab.deployment import promotion
from waferlab.deployment.predictor import Predictor
from waferlab.deployment.promotion import CannotCompareError, MapsSeen, NotRegistered, Promotion, judge, promote
from waferlab.errors import ModelError, RegistryError
from waferlab.evaluation.predictions import Predictions
from waferlab.tracking.registry import Champion, ModelRegistry, ModelVersion, as_the_programs_own
from waferlab.tracking.runs import RunTree

CLASSES = len(CLASS_NAMES)


# --- the rule, on made-up answers


def made_up(wrong, *, lots=40):
    """Answers on one map of each class in every lot; `wrong` says which, bool [lots, classes]."""
    labels = np.tile(np.arange(CLASSES), lots)
    answered = np.where(np.broadcast_to(wrong, (lots, CLASSES)).ravel(), (labels + 1) % CLASSES, labels)
    return Predictions(np.eye(CLASSES)[answered], labels, np.repeat(np.arange(lots), CLASSES), CLASS_NAMES)


def wrong_at(*lots, of=40, classes=slice(None)):
    wrong = np.zeros((of, CLASSES), bool)
    wrong[list(lots), classes] = True
    return wrong


ALL = np.ones(40 * CLASSES, bool)


def test_a_model_that_is_surely_better_becomes_champion():
    said = judge(made_up(False), made_up(wrong_at(*range(0, 40, 3))), fair=ALL, champion="7")
    assert said.alias == "champion" and said.comparison["interval"][0] > 0
    assert "version 7" in said.because and said.maps_compared == 360


def test_a_model_that_is_better_within_the_noise_only_is_challenger():
    new, old = made_up(wrong_at(1, 2, classes=0)), made_up(wrong_at(3, 4, 5, classes=0))
    said = judge(new, old, fair=ALL, champion="7")
    assert said.comparison["difference"] > 0 > said.comparison["interval"][0]
    assert said.alias == "challenger" and "lower bound is not above 0" in said.because


def test_two_models_that_answer_the_same_are_no_reason_to_change_the_champion():
    assert judge(made_up(False), made_up(False), fair=ALL, champion="7").alias == "challenger"


def test_only_maps_that_neither_was_trained_on_count():
    # The old one knows the first half of the maps by heart and fails on the rest; the new one errs everywhere a little.
    old, new = made_up(wrong_at(*range(20, 40))), made_up(wrong_at(*range(0, 20), 39))
    assert judge(new, old, fair=ALL, champion="7").alias == "challenger"
    said = judge(new, old, fair=np.repeat(np.arange(40) >= 20, CLASSES), champion="7")
    assert said.alias == "champion" and said.maps_compared == 20 * CLASSES
    assert said.comparison["new"] == pytest.approx(0.95) and said.comparison["old"] == 0


def test_too_few_lots_or_a_class_without_a_map_decide_nothing():
    new, old = made_up(False), made_up(True)
    with pytest.raises(CannotCompareError, match=r"only 45 of 360 are .* from 5 lots, and .* needs 6"):
        judge(new, old, fair=np.repeat(np.arange(40) < 5, CLASSES), champion="7")
    with pytest.raises(CannotCompareError, match="no map of Donut, none is among the 280"):
        judge(new, old, fair=~np.isin(new.labels, (1, 8)), champion="7")
    judge(new, old, fair=np.repeat(np.arange(40) < 6, CLASSES), champion="7")


@pytest.mark.parametrize(("looks", "said"), [(0, "not decided before"), (1, "1 time before"), (3, "3 times before")])
def test_the_verdict_says_how_often_these_maps_have_decided(looks, said):
    assert said in judge(made_up(False), made_up(True), fair=ALL, champion="7", looks=looks).because


# --- what a version has seen


def wafers(lots=60):
    """A map of each class in every lot; classes differ by their share of failing dies, no two maps are equal."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(CLASSES), lots)
    drawn = [rng.permutation(np.repeat([2, 1], [f, 36 - f])).reshape(6, 6).astype(np.uint8) for f in 3 * (labels + 1)]
    return pack_maps(drawn, labels, groups=np.repeat(np.arange(lots), CLASSES), source="made up")


MAPS = wafers()


def split_at(fitted, tested):
    """A split by lots, of whose first part the last lot is for validation."""
    parts = [np.flatnonzero(np.isin(MAPS.groups, lots)) for lots in (fitted[:-1], fitted[-1:], tested)]
    return Split(*parts, fingerprint="made up")


FIRST = split_at(range(30), range(30, 60))
SECOND = split_at([*range(10), *range(50, 60)], range(10, 50))  # lots 30 to 49 are test maps of both


def test_what_a_version_has_seen_is_read_as_it_was_written(tmp_path):
    seen = MapsSeen.of(MAPS, FIRST)
    again = MapsSeen.load(seen.save(tmp_path / "seen.npz"))
    digests = MAPS.digests()
    assert digests.dtype == np.uint64 and again.test_part == seen.test_part
    for part, expected in (("train", True), ("validation", True), ("test", False)):
        assert (np.isin(digests[getattr(FIRST, part)], again.fitted) == expected).all()
        assert (np.isin(digests[getattr(FIRST, part)], again.tested) != expected).all()


def test_a_test_part_is_known_again_in_another_order_and_told_from_others():
    turned = MAPS.select(np.arange(len(MAPS))[::-1])
    mirrored = Split(*(np.sort(len(MAPS) - 1 - part) for part in FIRST.parts().values()), fingerprint="")
    assert MapsSeen.of(turned, mirrored).test_part == MapsSeen.of(MAPS, FIRST).test_part
    assert MapsSeen.of(MAPS, SECOND).test_part != MapsSeen.of(MAPS, FIRST).test_part


def test_digests_that_are_damaged_or_made_in_another_way_are_refused(tmp_path, monkeypatch):
    seen, file = MapsSeen.of(MAPS, FIRST), tmp_path / "seen.npz"
    arrays = dict(np.load(seen.save(file)))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        MapsSeen.load(file)
    for change, said in (
        ({"fitted": np.array([{}], dtype=object)}, "cannot be read"),
        ({"fitted": arrays["fitted"].astype(float)}, "holds no digests"),
        ({"tested": arrays["tested"][None]}, "holds no digests"),
        ({"probe": arrays["probe"] + np.uint64(1)}, "in another way"),
    ):
        np.savez(file, **arrays | change)
        with pytest.raises(ValueError, match=said):
            MapsSeen.load(file)
    monkeypatch.setattr("waferlab.deployment.promotion.MAX_DIGESTS", 100)
    with pytest.raises(ValueError, match="more than 100"):
        MapsSeen.load(seen.save(file))


# --- files, without a network


def answers(file, split):
    probabilities = Predictor(file).probabilities([MAPS[i] for i in split.test])
    return Predictions(probabilities, MAPS.labels[split.test], MAPS.groups[split.test], CLASS_NAMES)


def offer(tracking, file, split=FIRST, *, checkpoint=None, name="model", run=None, export=None, **more):
    return promote(
        export or (lambda: [file]),
        checkpoint=checkpoint or answers(file, split),
        maps=MAPS, split=split, model_type="made_up", name=name, tracking=tracking, run=run, run_key="key",
        **more,
    )  # fmt: skip


class Registry:
    """What `RunTree` says of a registry, in memory."""

    def __init__(self):
        self.kept = []  # (file, maps seen, alias, tags, description)

    def versions(self, name):
        return [
            ModelVersion(str(i), (a,) if a else (), tags, bool(a or said))
            for i, (_, _, a, tags, said) in enumerate(self.kept, 1)
        ]

    def champion(self, name, *, into):
        number = next((i for i, one in enumerate(self.kept, 1) if one[2] == "champion"), None)
        if number is None:
            return None
        (into / "model.onnx").write_bytes(self.kept[number - 1][0])
        (into / "extra_files").mkdir()
        (into / "extra_files" / promotion.MAPS_SEEN).write_bytes(self.kept[number - 1][1])
        return Champion(str(number), into)

    def register(self, run, file, *, alias, description, tags, beside, **_):
        self.kept = [(f, s, None if a == alias else a, t, d) for f, s, a, t, d in self.kept]
        self.kept.append((file.read_bytes(), beside[0].read_bytes(), alias, tags, description))
        return str(len(self.kept)), alias, description


def test_the_first_version_is_champion_and_the_next_must_beat_it(tmp_path):
    registry = Registry()
    poor, good = write_file(tmp_path / "poor.onnx", shift=0.05), write_file(tmp_path / "good.onnx")
    first = offer(registry, poor)
    assert (first.version, first.alias, first.uri) == ("1", "champion", "models:/model@champion")
    assert "There was no champion" in first.verdict
    better = offer(registry, good)
    assert (better.version, better.alias, better.maps_compared) == ("2", "champion", len(FIRST.test))
    worse = offer(registry, write_file(tmp_path / "worse.onnx", shift=0.06))
    assert (worse.version, worse.alias) == ("3", "challenger") and worse.comparison["difference"] < 0
    assert "To make it champion" not in worse.verdict  # it was compared, and lost


def test_a_version_whose_registration_was_cut_off_is_registered_to_its_end(tmp_path):
    registry, file = Registry(), write_file(tmp_path / "model.onnx")
    offer(registry, file)
    ((content, seen, _, tags, _),) = registry.kept
    registry.kept = [(content, seen, None, tags, "")]  # killed before it had an alias
    again = offer(registry, file)
    assert again.alias == "champion" and again.comparison is None and "There was no champion" in again.verdict
    assert "registered before" in offer(registry, file).verdict


def test_the_champion_is_met_on_maps_that_it_has_not_trained_on(tmp_path):
    registry = Registry()
    offer(registry, write_file(tmp_path / "poor.onnx", shift=0.05))
    said = offer(registry, write_file(tmp_path / "good.onnx"), SECOND)
    assert said.alias == "champion" and said.maps_compared == 20 * CLASSES  # lots 30 to 49
    assert "On 180 test maps that neither was trained or tuned on, of 20 lots" in said.verdict


def test_maps_that_the_new_model_has_trained_on_do_not_count_either(tmp_path):
    registry = Registry()
    offer(registry, write_file(tmp_path / "poor.onnx", shift=0.05))
    copies = split_at(range(10), range(30, 60))  # as if a lot of the training part had been measured once more
    copies = dataclasses.replace(copies, train=np.sort(np.append(copies.train, copies.test[:CLASSES])))
    assert offer(registry, write_file(tmp_path / "good.onnx"), copies).maps_compared == 29 * CLASSES


def test_a_champion_that_has_trained_on_nearly_all_of_the_test_maps_stays_and_the_remedy_is_named(tmp_path):
    registry = Registry()
    offer(registry, write_file(tmp_path / "poor.onnx", shift=0.05))
    said = offer(registry, write_file(tmp_path / "good.onnx"), split_at(range(30, 60), range(30)))
    assert (said.alias, said.comparison, said.maps_compared) == ("challenger", None, 0)
    assert "only 0 of 270" in said.verdict
    assert 'set_registered_model_alias("model", "champion", "2")' in said.verdict


def test_looks_at_the_same_test_part_are_counted_and_others_are_not(tmp_path):
    registry = Registry()
    files = [write_file(tmp_path / f"{i}.onnx", shift=0.05, number=str(i)) for i in range(5)]
    assert "time" not in offer(registry, files[0]).verdict  # nothing was compared
    assert "has not decided before" in offer(registry, files[1]).verdict
    assert "has decided 1 time before" in offer(registry, files[2]).verdict
    assert "has not decided before" in offer(registry, files[3], SECOND).verdict
    assert "has decided 2 times before" in offer(registry, files[4]).verdict


@pytest.mark.parametrize("alias", ["champion", "challenger", None])
def test_a_file_that_is_registered_already_is_not_registered_again(tmp_path, alias):
    registry, file = Registry(), write_file(tmp_path / "model.onnx")
    offer(registry, file)
    registry.kept[0] = (*registry.kept[0][:2], alias, *registry.kept[0][3:])
    again = offer(registry, file)
    assert len(registry.kept) == 1
    assert (again.version, again.alias) == ("1", alias) and "as version 1" in again.verdict
    assert again.uri == (f"models:/model@{alias}" if alias else "models:/model/1")


# --- the file answers as its checkpoint, or is not registered


def test_a_file_that_answers_otherwise_than_its_checkpoint_is_not_registered(tmp_path):
    registry, right = Registry(), write_file(tmp_path / "right.onnx")
    for wrong in (
        write_file(tmp_path / "rolled.onnx", roll=1),
        write_file(tmp_path / "less_sure.onnx", scale=200.0),
    ):
        said = offer(registry, wrong, checkpoint=answers(right, FIRST))
        apart = np.abs(answers(wrong, FIRST).probabilities - answers(right, FIRST).probabilities).max(1)
        assert isinstance(said, NotRegistered) and registry.kept == []
        assert f"by up to {apart.max():.2g}, on test map {apart.argmax()} (6x6 dies)" in said.reason
    assert said.in_summary() == {"registered": None, "not_registered_because": said.reason, "model_file": None}


def test_a_model_that_is_not_to_be_registered_is_exported_and_checked_all_the_same(tmp_path):
    right, wrong = write_file(tmp_path / "right.onnx"), write_file(tmp_path / "wrong.onnx", roll=1)
    for file, there in ((right, right), (wrong, None)):
        registry = Registry()
        said = offer(registry, file, checkpoint=answers(right, FIRST), only_exported_because="nothing is tracked")
        assert (said.file, registry.kept) == (there, [])
        assert said.in_summary()["model_file"] == (there and there.name)
    assert str(offer(Registry(), right, only_exported_because="nothing is tracked")) == (
        f"Not registered: nothing is tracked. The exported file: {right}"
    )


def test_a_file_that_answers_with_nothing_is_not_registered(tmp_path):
    registry, right = Registry(), write_file(tmp_path / "right.onnx")
    broken = write_file(tmp_path / "broken.onnx", scale=np.inf)
    with pytest.raises(ModelError, match="answers no numbers"):
        Predictor(broken).probabilities([MAPS[0]])
    said = offer(registry, broken, checkpoint=answers(right, FIRST))
    assert isinstance(said, NotRegistered) and registry.kept == []


def test_a_file_of_other_classes_is_not_registered(tmp_path):
    other = write_file(tmp_path / "other.onnx", names=[*CLASS_NAMES[:-1], "fine"])
    said = offer(Registry(), other, checkpoint=answers(write_file(tmp_path / "right.onnx"), FIRST))
    assert isinstance(said, NotRegistered) and "fine" in said.reason


def test_the_verdict_quotes_the_score_of_the_file(tmp_path):
    file = write_file(tmp_path / "model.onnx")
    checkpoint = answers(file, FIRST)
    tied = checkpoint.probabilities.copy()
    tied[0, :2] = tied[0, :2].sum() / 2 + np.array([-2e-5, 2e-5])  # a tie, which the checkpoint breaks the other way
    leaning = tied.copy()
    leaning[0, :2] += (4e-5, -4e-5)
    classifier = Predictor.probabilities
    try:
        Predictor.probabilities = lambda *_: leaning
        said = offer(Registry(), file, checkpoint=dataclasses.replace(checkpoint, probabilities=tied))
    finally:
        Predictor.probabilities = classifier
    assert isinstance(said, Promotion) and said.test_macro_f1 == 1.0
    assert "test macro F1 1.0000" in said.verdict and said.largest_difference_to_checkpoint == pytest.approx(4e-5)


# --- whatever fails is a sentence


def test_an_export_that_fails_is_a_sentence(tmp_path):
    def fail():
        raise NotImplementedError("no operator for this\nand a long story")

    said = offer(None, None, checkpoint=answers(write_file(tmp_path / "model.onnx"), FIRST), export=fail)
    assert said == NotRegistered("the export failed (NotImplementedError: no operator for this)")


@pytest.mark.parametrize("what", ["versions", "champion", "register"])
def test_a_registry_that_gives_no_answer_has_no_champion_to_be_replaced(tmp_path, what):
    registry, file = Registry(), write_file(tmp_path / "model.onnx")

    def fail(*_, **__):
        raise RegistryError("MlflowException: 503")

    setattr(registry, what, fail)
    said = offer(registry, file)
    assert isinstance(said, NotRegistered) and "MlflowException: 503" in said.reason
    assert registry.kept == [] and said.file == file


def test_only_a_registry_that_says_so_has_no_champion():
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE

    class Client:
        def get_registered_model(self, name):
            raise self.error

    tree = object.__new__(RunTree)  # as its thread sees it
    versions, champion = RunTree.versions.__wrapped__, RunTree.champion.__wrapped__
    tree._client = Client()
    tree._client.error = MlflowException("no such model", error_code=RESOURCE_DOES_NOT_EXIST)
    assert champion(tree, "model", into="nowhere") is None and versions(tree, "model") == []
    for error in (MlflowException("down", error_code=TEMPORARILY_UNAVAILABLE), MlflowException("?"), OSError("gone")):
        tree._client.error = error
        with pytest.raises(type(error)):
            champion(tree, "model", into="nowhere")
        with pytest.raises(type(error)):
            versions(tree, "model")


# --- a real registry


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    tracking = RunTree("promotion", uri=None, folder=folder, warn=pytest.fail)
    yield tracking, tracking.start("a run"), folder
    tracking.close()


def client_of(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def test_a_registered_version_is_the_file_and_says_what_it_has_seen(store, tmp_path):
    import mlflow

    tracking, run, folder = store
    file = write_file(tmp_path / "model.onnx")
    assert tracking.versions("whole") == [] and tracking.champion("whole", into=tmp_path) is None
    before = mlflow.get_tracking_uri()
    said = offer(tracking, file, name="whole", run=run)
    assert mlflow.get_tracking_uri() == before  # the program's own address is none of the registry's
    (version,) = tracking.versions("whole")
    assert version.version == said.version and version.aliases == ("champion",) and version.tags["run_key"] == "key"
    (tmp_path / "into").mkdir()
    champion = tracking.champion("whole", into=tmp_path / "into")
    assert champion == Champion("1", tmp_path / "into")
    assert (champion.folder / "model.onnx").read_bytes() == file.read_bytes()
    seen = MapsSeen.load(champion.folder / "extra_files" / promotion.MAPS_SEEN)
    np.testing.assert_array_equal(seen.fitted, MapsSeen.of(MAPS, FIRST).fitted)
    written = client_of(folder).get_model_version("whole", "1")
    assert written.description == said.verdict and written.run_id


def test_the_remedy_that_is_named_works(store, tmp_path):
    import mlflow

    tracking, run, folder = store
    offer(tracking, write_file(tmp_path / "poor.onnx", shift=0.05), name="remedy", run=run)
    swapped = split_at(range(30, 60), range(30))
    said = offer(tracking, write_file(tmp_path / "good.onnx"), swapped, name="remedy", run=run)
    assert said.alias == "challenger"
    with as_the_programs_own(f"sqlite:///{folder / 'mlflow.db'}"):
        exec(said.verdict.split("all the same: ")[1], {"mlflow": mlflow})
    assert client_of(folder).get_model_version_by_alias("remedy", "champion").version == 2


STRANGERS = {  # what becomes of the folder of a champion of ours, and what is said of it
    "other-software": (lambda v: shutil.rmtree(v / "extra_files"), "does not say which maps it was trained on"),
    "damaged": (lambda v: (v / "extra_files" / promotion.MAPS_SEEN).write_bytes(b"PK"), "cannot be read"),
    "gone": (lambda v: shutil.rmtree(v), "has no ONNX file"),
    "no-classifier": (lambda v: (v / "model.onnx").write_bytes(b"rubbish"), "no exported classifier"),
    "other-classes": (lambda v: write_file(v / "model.onnx", names=[*CLASS_NAMES[:-1], "fine"]), "fine"),
    "fewer-classes": (lambda v: write_file(v / "model.onnx", names=CLASS_NAMES[:-1]), "tells Center"),
}


@pytest.mark.parametrize("kind", list(STRANGERS))
def test_a_champion_that_cannot_be_met_stays_and_the_reason_is_written(store, tmp_path, kind):
    tracking, run, folder = store
    offer(tracking, write_file(tmp_path / "first.onnx", shift=0.05), name=kind, run=run)
    client, (spoil, reason) = client_of(folder), STRANGERS[kind]
    spoil(Path(client.get_model_version_download_uri(kind, "1").removeprefix("file://")))
    said = offer(tracking, write_file(tmp_path / "good.onnx"), name=kind, run=run)
    assert isinstance(said, Promotion) and (said.version, said.alias) == ("2", "challenger")
    assert "cannot be compared with version 1" in said.verdict and reason in said.verdict
    assert client.get_model_version_by_alias(kind, "champion").version == 1
    assert reason in client.get_model_version_by_alias(kind, "challenger").description


def test_a_champion_whose_files_are_out_of_reach_stays(store, tmp_path):
    tracking, run, folder = store
    client = client_of(folder)
    client.create_registered_model("far")
    client.create_model_version("far", source="gs://a-cloud-that-this-machine-has-no-library-for/model")
    client.set_registered_model_alias("far", "champion", "1")
    said = offer(tracking, write_file(tmp_path / "good.onnx"), name="far", run=run)
    assert isinstance(said, Promotion) and (said.version, said.alias) == ("2", "challenger")
    assert "its files cannot be had" in said.verdict
    assert client.get_model_version_by_alias("far", "champion").version == 1


def test_a_registration_that_fails_does_not_end_the_tracking(store, tmp_path):
    tracking, run, _ = store
    said = offer(tracking, write_file(tmp_path / "model.onnx"), name="a/bad:name", run=run)
    assert isinstance(said, NotRegistered) and "a/bad:name" in said.reason
    tracking.note(run, "still here")
    assert isinstance(offer(tracking, write_file(tmp_path / "model.onnx"), name="after", run=run), Promotion)


@pytest.mark.parametrize(
    ("meanwhile", "alias"), [("1", "champion"), ("2", "champion"), (None, "champion"), ("3", "challenger")]
)
def test_a_version_that_beat_one_that_is_champion_no_more_is_challenger(monkeypatch, meanwhile, alias):
    class Client:
        aliases, said = {"champion": meanwhile} if meanwhile else {}, {}

        def search_model_versions(self, *_, **__):
            return type("Page", (list,), {"token": None})()

        def get_registered_model(self, name):
            return self

        def create_model_version(self, *_, **__):
            return SimpleNamespace(version=2)

        def update_registered_model(self, *_, **__):
            pass

        def set_registered_model_alias(self, name, alias, version):
            self.aliases = self.aliases | {alias: version}

        def update_model_version(self, name, version, *, description):
            self.said = {version: description}

    class Bare(ModelRegistry):
        _judge = _open = None

    registry = object.__new__(Bare)
    registry._client, registry.uri, registry._ask = Client(), "sqlite://", lambda question: question()
    logged = SimpleNamespace(model_id="m", model_uri="u")
    monkeypatch.setattr("waferlab.tracking.registry._log_model", lambda *_: logged)
    version, given, said = registry.register(
        SimpleNamespace(id="run"), None, name="model", about="", alias="champion", description="It beats version 1.",
        tags={}, beside=[], example=None, classes=9, instead_of="1",
    )  # fmt: skip
    assert (version, given) == ("2", alias) and registry._client.aliases[alias] == "2"
    assert registry._client.said == {"2": said}
    assert ("not compared with" in said) is (alias == "challenger")
    assert alias == "champion" or registry._client.aliases["champion"] == "3"
