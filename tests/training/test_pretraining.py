"""Promises about pre-training on generated maps: no leak, the same again, whole files, nothing claimed in vain."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrated_pipeline import FINE_TUNING_SHARE, MODEL_REGISTRY, IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.data.generator import generate_wafer_maps
from waferlab.data.maps import pack_maps
from waferlab.data.reading import load_wafer_maps
from waferlab.errors import ConfigError, WeightsUnavailableError
from waferlab.models.starting_weights import read_header, write_generated_weights
from waferlab.records import StartingWeights
from waferlab.training import pretraining
from waferlab.training.pretraining import HELD_OUT_SEED, GeneratedMaps, GeneratedStream, stream_seed

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"maps": 2304, "maps_per_epoch": 1152}


def pretrain(model_type, folder, *, seed=0, image_size=16, say=lambda text: None, **more):
    """Pre-trains a network that a pipeline makes and trains."""
    config = ExperimentConfig(
        model_type=model_type, use_pretrained=False, enable_mlflow=False, seed=seed, image_size=image_size,
        output_dir=folder, quiet=True, threads=1,
    )  # fmt: skip
    made = IntegratedMLPipeline(config)
    return pretraining.pretrain(
        model_type,
        make=partial(made.create_model, model_type),
        fit=partial(made.fit, model_type),
        precision=made.precision(model_type),
        folder=folder, seed=seed, image_size=image_size, say=say, **SMALL | more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights of the small CNN after two tiny epochs."""
    return pretrain("lightning_cnn", tmp_path_factory.mktemp("made"))


def pipeline(folder, **settings):
    settings = {"image_size": 16, "enable_optuna": False, "enable_mlflow": False, "quiet": True} | settings
    return IntegratedMLPipeline(ExperimentConfig(pretrained_dir=folder, **settings))


@pytest.fixture
def no_host(monkeypatch):
    def fetch_weights(url, file, *, wait, hash_prefix=None):
        raise WeightsUnavailableError("no answer")

    monkeypatch.setattr("waferlab.models.torchvision_models.fetch_weights", fetch_weights)


# --- the stream


def test_no_generated_evaluation_map_is_in_the_stream():
    highest = 2**31 - 1  # of ExperimentConfig.seed, which the maps of data="synthetic" are drawn with
    with pytest.raises(ValueError, match="seed"):
        ExperimentConfig(seed=highest + 1)
    assert highest < HELD_OUT_SEED < stream_seed(0, 0)
    seeds = {stream_seed(seed, chunk) for seed in (0, 1, highest) for chunk in (0, 1, 2**32 - 1)}
    assert len(seeds) == 9 and min(seeds) > HELD_OUT_SEED

    def digests(generator_seed):
        drawn, labels, _ = generate_wafer_maps(150, seed=generator_seed)
        return set(pack_maps(drawn, labels, source="").digests())

    evaluated = set().union(*(load_wafer_maps("synthetic", seed=seed).digests() for seed in (0, 1)))
    held_out = digests(HELD_OUT_SEED)
    streamed = set().union(*(digests(stream_seed(seed, chunk)) for seed in (0, 1) for chunk in (0, 1)))
    assert not evaluated & streamed and not evaluated & held_out and not held_out & streamed


def test_no_map_of_the_stream_comes_twice_and_classes_are_equally_frequent():
    stream = GeneratedStream(seed=0, image_size=16, maps_per_epoch=1152)
    loader, seen = stream.train_dataloader(), []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [128] * 9
        seen += [image.numpy().tobytes() for images, _ in batches for image in images]
    assert len(set(seen)) > 0.99 * len(seen)  # at 16 x 16 pixels a few Near-full maps are alike


def test_the_chunk_drawn_ahead_is_the_chunk_drawn_when_asked_for():
    ahead, alone = (GeneratedMaps(seed=3, per_class=4, image_size=16) for _ in range(2))
    ahead[torch.arange(36)]  # chunk 0; chunk 1 is drawn meanwhile
    for ours, theirs in zip(ahead[torch.arange(36, 72)], alone[torch.arange(36, 72)], strict=True):
        assert torch.equal(ours, theirs)


# --- the file


@pytest.mark.long
def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(made, tmp_path):
    again = load_file(pretrain("lightning_cnn", tmp_path))
    other = load_file(pretrain("lightning_cnn", tmp_path, seed=1))
    first = load_file(made)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_the_header_says_what_the_weights_are(made):
    header = read_header(made)
    assert made.name.startswith("lightning_cnn-")
    assert (header["seed"], header["maps_seen"], header["image_size"]) == ("0", "2304", "16")
    assert 0 < float(header["validation_macro_f1"]) <= 1 and float(header["seconds"]) > 0


def test_weights_are_made_once_and_what_a_kill_at_the_end_left_is_taken_away(made):
    before, lines, left = made.stat().st_mtime_ns, [], made.with_name(f"{made.stem}.partial.ckpt")
    left.touch()
    assert pretrain("lightning_cnn", made.parent, say=lines.append) == made
    assert made.stat().st_mtime_ns == before and "made before" in lines[0] and not left.exists()


@pytest.mark.long
def test_a_killed_pretraining_leaves_no_half_file_and_resumes_to_the_same_weights(made, tmp_path):
    code = (
        "import sys; from functools import partial; from pathlib import Path; from test_pretraining import pretrain;"
        "pretrain('lightning_cnn', Path(sys.argv[1]), say=partial(print, flush=True))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])},
    )  # fmt: skip
    assert "epoch 1/2" in child.stdout.readline()
    while not list(tmp_path.glob("*.partial.ckpt")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not list(tmp_path.glob("*.safetensors"))
    lines = []
    file = pretrain("lightning_cnn", tmp_path, resume=True, say=lines.append)
    assert "epoch 2/2" in lines[0]
    assert os.listdir(tmp_path) == [made.name]
    first, resumed = load_file(made), load_file(file)
    assert all(torch.equal(first[name], resumed[name]) for name in first)


def test_a_write_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
    def disk_is_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write_generated_weights(tmp_path / "w.safetensors", torch.nn.Linear(2, 2), header={})
    assert not list(tmp_path.iterdir())


# --- starting from it


@pytest.mark.parametrize("source", ["auto", "wafer"])
def test_every_tensor_arrives_the_heads_too(made, source):
    model = pipeline(made.parent, pretrained_source=source).create_model("lightning_cnn")
    assert str(model.starting_weights) == f"generated wafer maps ({made.name})"
    written, ours = load_file(made), model.network.state_dict()
    assert written.keys() == ours.keys()
    assert all(torch.equal(written[name], ours[name]) for name in written)


def test_without_use_pretrained_weights_are_random(made):
    model = pipeline(made.parent, use_pretrained=False, pretrained_source="wafer").create_model("lightning_cnn")
    assert str(model.starting_weights) == "random (not asked for)"
    assert not torch.equal(model.network.state_dict()["0.weight"], load_file(made)["0.weight"])


def generated_resnet(folder):
    """A file for the ResNet, as pretrain would write it."""
    network = pipeline(folder, use_pretrained=False).create_model("torchvision_resnet").network
    header = {"image_size": 16, "validation_macro_f1": 0.5}
    write_generated_weights(folder / "torchvision_resnet-00000000.safetensors", network, header=header)
    return network.state_dict()


def test_auto_takes_imagenet_weights_first(tmp_path, monkeypatch):
    import torchvision.models

    generated_resnet(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "checkpoints" / os.path.basename(weights.url))
    source = str(pipeline(tmp_path).create_model("torchvision_resnet").starting_weights)
    assert source.startswith("torchvision ResNet18_Weights")


def test_auto_takes_generated_maps_where_imagenet_cannot_be_had_and_imagenet_alone_does_not(
    tmp_path, monkeypatch, no_host
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    written = generated_resnet(tmp_path)
    model = pipeline(tmp_path).create_model("torchvision_resnet")
    assert str(model.starting_weights) == "generated wafer maps (torchvision_resnet-00000000.safetensors)"
    assert all(torch.equal(written[name], value) for name, value in model.network.state_dict().items())
    alone = pipeline(tmp_path, pretrained_source="imagenet")
    assert str(alone.create_model("torchvision_resnet").starting_weights) == "random (no answer)"
    without = alone.create_model("lightning_cnn").starting_weights
    assert str(without) == "random (none are published for this network)"


def test_wafer_does_not_ask_for_imagenet_weights(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("asked for ImageNet weights")

    monkeypatch.setattr("waferlab.models.torchvision_models.fetch_weights", never)
    source = str(pipeline(tmp_path, pretrained_source="wafer").create_model("torchvision_resnet").starting_weights)
    assert source.startswith("random (none on generated maps in")
    assert "python run_experiment.py --mode pretrain --models torchvision_resnet --image-size 16" in source


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_safetensors(file):
    torch.save({"0.weight": torch.zeros(1)}, file)


def one_bit(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def another_network(file):
    save_file({"weight": torch.zeros(3)}, file, metadata=read_header(file) | {"network": "00000000"})


def other_tensors(file):
    save_file({"weight": torch.zeros(3)}, file, metadata=read_header(file))


def no_header(file):
    save_file(load_file(file), file)


@pytest.mark.parametrize("harm", [half, no_safetensors, one_bit, another_network, other_tensors, no_header])
def test_a_wrong_or_damaged_file_is_one_clear_line_and_the_run_goes_on(harm, made, tiny_npz, tmp_path, capsys):
    file = tmp_path / made.name
    file.write_bytes(made.read_bytes())
    harm(file)
    run = pipeline(
        tmp_path, model_type="lightning_cnn", data=str(tiny_npz), max_epochs=1, output_dir=tmp_path, quiet=False
    )
    record = run.train_final_model("lightning_cnn")
    assert record.weights.kind == "random" and made.name in record.weights.reason
    lines = [line for line in capsys.readouterr().out.splitlines() if "pre-trained" in line]
    assert len(lines) == 1 and made.name in lines[0] and "goes on without" in lines[0]
    assert record.epochs == 1  # trained to the end


def test_weights_for_another_image_size_are_not_taken(made):
    source = str(pipeline(made.parent, image_size=24).create_model("lightning_cnn").starting_weights)
    assert source.startswith("random (") and "another size" in source


@pytest.mark.long
def test_the_summary_names_the_weights_that_were_used_and_a_resumed_run_keeps_the_name(made, tiny_npz, tmp_path):
    settings = {"model_type": "lightning_cnn", "data": str(tiny_npz), "max_epochs": 1, "output_dir": tmp_path}
    first = pipeline(made.parent, **settings).run_complete_pipeline()
    assert first["models"][0]["weights"] == f"generated wafer maps ({made.name})"
    again = pipeline(tmp_path / "gone", resume=True, **settings).run_complete_pipeline()
    assert again["models"][0]["weights"] == first["models"][0]["weights"]


def test_fine_tuning_takes_a_share_of_the_learning_rate_unless_one_is_chosen(made):
    own = MODEL_REGISTRY["lightning_cnn"].defaults["learning_rate"]
    tuned = pipeline(made.parent).create_model("lightning_cnn")
    assert tuned.learning_rate == tuned.hparams["learning_rate"] == FINE_TUNING_SHARE * own
    assert pipeline(made.parent, use_pretrained=False).create_model("lightning_cnn").learning_rate == own
    assert pipeline(made.parent, learning_rate=0.01).create_model("lightning_cnn").learning_rate == 0.01
    assert pipeline(made.parent).create_model("lightning_cnn", {"learning_rate": 0.02}).learning_rate == 0.02


def test_a_search_begins_with_the_learning_rate_of_fine_tuning(made, tiny_npz, tmp_path):
    searches = {"data": str(tiny_npz), "num_optuna_trials": 1, "search_epochs": 1, "output_dir": tmp_path}
    (trial,) = pipeline(made.parent, enable_optuna=True, **searches).search("lightning_cnn").trials
    own = MODEL_REGISTRY["lightning_cnn"].defaults["learning_rate"]
    assert trial.parameters["learning_rate"] == FINE_TUNING_SHARE * own


def test_a_resumed_fine_tuning_keeps_its_learning_rate_and_the_name_of_its_weights(made, tiny_npz, tmp_path):
    settings = {"model_type": "lightning_cnn", "data": str(tiny_npz), "max_epochs": 1, "output_dir": tmp_path}
    first = pipeline(made.parent, **settings)
    before = first.train_final_model("lightning_cnn")
    (first.config.checkpoints_dir / "lightning_cnn" / "finished.json").unlink()  # as after a kill
    after = pipeline(tmp_path / "gone", resume=True, **settings).train_final_model("lightning_cnn")
    assert after.weights == before.weights == StartingWeights("generated", f"generated wafer maps ({made.name})")
    assert after.parameters["learning_rate"] == before.parameters["learning_rate"]


def test_the_fingerprint_of_a_training_changes_with_the_source_of_its_weights():
    prints = {ExperimentConfig(pretrained_source=s).training_fingerprint() for s in ("auto", "imagenet", "wafer")}
    assert len(prints) == 3
    with pytest.raises(ConfigError, match="pretrained_source='coco' is unknown"):
        ExperimentConfig(pretrained_source="coco")
