"""Promises about what a training leaves on disk: whole or named as damaged, never another run's, one run a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import tiny_settings
from made_up import Scripted, a_record

from integrated_pipeline import IntegratedMLPipeline
from waferlab.config import ExperimentConfig
from waferlab.errors import ConfigError, DamagedFileError, FolderInUseError
from waferlab.records import StartingWeights, write_summary
from waferlab.tracking.processes import where_numbers_hold
from waferlab.tracking.whole_files import temporary
from waferlab.training.checkpoints import (
    CheckpointFiles,
    TrainingFolder,
    checkpoint_digest,
    hold_folder,
    hold_folders,
    load_trained,
    read_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent.parent

settings = partial(tiny_settings, enable_mlflow=False, max_epochs=2)


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "model" / "best.ckpt"
    CheckpointFiles().save_checkpoint({"state_dict": {"weight": torch.arange(1000.0)}}, file)
    return file


def test_a_checkpoint_is_read_back_and_opens_in_torch_too(checkpoint):
    for read in (read_checkpoint(checkpoint), torch.load(checkpoint, weights_only=True)):
        assert torch.equal(read["state_dict"]["weight"], torch.arange(1000.0))
    assert checkpoint_digest(checkpoint, expected=checkpoint_digest(checkpoint))


def flip(position):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[position] ^= 0x41
        file.write_bytes(bytes(content))

    return damage


DAMAGES = {
    "a byte of the weights": flip(2000),
    "the first byte": flip(0),
    "the check sum": flip(-1),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-500]),
    "nothing left": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "no seal": lambda file: torch.save({"state_dict": {}}, file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_a_checkpoint_is_noticed_and_the_remedy_named(damage, checkpoint):
    DAMAGES[damage](checkpoint)
    with pytest.raises(DamagedFileError, match=r"best\.ckpt.*Delete it; with --resume"):
        read_checkpoint(checkpoint)
    with pytest.raises(DamagedFileError, match=r"best\.ckpt.*Delete it; with --resume"):
        checkpoint_digest(checkpoint)


def test_another_trainings_checkpoint_is_told_from_ones_own(checkpoint):
    with pytest.raises(DamagedFileError, match="another run has replaced it"):
        checkpoint_digest(checkpoint, expected="0" * 64)


def test_a_whole_file_that_no_training_wrote_is_one_sentence_too(tmp_path):
    file = tmp_path / "best.ckpt"
    CheckpointFiles().save_checkpoint({"state_dict": {"no such layer": torch.zeros(1)}}, file)
    with pytest.raises(DamagedFileError, match=r"best\.ckpt cannot be loaded safely .* Delete it") as error:
        load_trained(Scripted, file, expected=checkpoint_digest(file))
    assert "\n" not in str(error.value)


def test_lightning_refuses_to_go_on_from_a_damaged_checkpoint(checkpoint):
    flip(2000)(checkpoint)
    with pytest.raises(DamagedFileError):
        CheckpointFiles().load_checkpoint(checkpoint)


def test_a_training_goes_on_only_with_its_own_fingerprint(tmp_path):
    folder, begun, record = TrainingFolder(tmp_path, "ours"), Scripted(learning_rate=0.1), a_record()
    begun.starting_weights = StartingWeights("random", reason="no network")
    folder.start_afresh()
    folder.remember_start(begun)
    for file in (folder.best, folder.resume):
        file.write_bytes(b"some weights")
    folder.finish(record)
    assert folder.resume_point() == folder.resume and folder.finished() == record
    resumed = Scripted(learning_rate=0.2)
    folder.restore_start(resumed)
    assert resumed.learning_rate == resumed.hparams["learning_rate"] == 0.1
    assert resumed.starting_weights == begun.starting_weights
    other = TrainingFolder(tmp_path, "others")
    for refused in (other.resume_point, other.finished, lambda: other.restore_start(resumed)):
        with pytest.raises(ConfigError, match="other settings or data"):
            refused()
    anew = TrainingFolder(tmp_path, "ours", {"learning_rate": 0.2})  # a search has come to something else meanwhile
    assert anew.finished() is None and anew.resume_point() is None
    folder.best.unlink()  # without its weights no training is finished
    assert folder.finished() is None and folder.resume_point() is None


def test_a_failed_checkpoint_leaves_the_one_before_and_no_remains(tmp_path):
    file, files = tmp_path / "folder" / "resume.ckpt", CheckpointFiles()
    files.save_checkpoint({"weights": torch.arange(5)}, file)
    with pytest.raises(AttributeError):
        files.save_checkpoint({"weights": torch.zeros(5), "cannot be stored": lambda: None}, file)
    assert torch.equal(torch.load(file, weights_only=True)["weights"], torch.arange(5))
    assert list(file.parent.iterdir()) == [file]


def test_a_process_killed_while_it_writes_a_checkpoint_leaves_a_whole_one(tmp_path):
    file, unfinished = tmp_path / "resume.ckpt", tmp_path / "resume.ckpt.unfinished"
    CheckpointFiles().save_checkpoint({"weights": torch.zeros(5)}, file)
    program = "import sys, torch; from waferlab.training.checkpoints import CheckpointFiles\n"
    program += "while True: CheckpointFiles().save_checkpoint({'weights': torch.ones(50_000_000)}, sys.argv[1])"
    child = warm.Popen([sys.executable, "-c", program, file], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not unfinished.exists() or unfinished.stat().st_size == 0:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert set(torch.load(file, weights_only=True)["weights"].tolist()) in ({0.0}, {1.0})


# --- a whole run


@pytest.fixture(scope="module")
def finished(tiny_arrays, tmp_path_factory):
    """A finished run with a search whose winner is the final training."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "tiny.npz", **tiny_arrays)
    config = settings(folder / "tiny.npz", folder, num_optuna_trials=1, search_epochs=1)
    return config, IntegratedMLPipeline(ExperimentConfig(**config)).run_complete_pipeline()


def rubbish(file):
    file.write_text('{"half')


def without(key):
    """Takes an entry out of a record, as one of another version may lack it."""

    def damage(file):
        record = json.loads(file.read_text())
        del record[key]
        file.write_text(json.dumps(record))

    return damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("finished.json", without("starting_weights")),
        ("started.json", without("learning_rate")),
        ("finished.json", rubbish),
        ("finished.json", lambda file: file.write_text("")),
        ("finished.json", lambda file: file.write_text("[]")),
        ("best.ckpt", DAMAGES["a byte of the weights"]),
        ("started.json", rubbish),
        ("resume.ckpt", DAMAGES["cut short"]),
    ],
)
def test_a_damaged_file_is_one_sentence_and_its_remedy_works(name, damage, finished):
    config, summary = finished
    folder = Path(config["output_dir"]) / "checkpoints/tiny/lightning_cnn"
    kept = {file: file.read_bytes() for file in folder.glob("*.*")}
    try:
        if name in ("started.json", "resume.ckpt"):
            (folder / "finished.json").unlink()
        damage(folder / name)
        with pytest.raises(DamagedFileError, match=rf"{name} .*Delete it; with --resume") as error:
            IntegratedMLPipeline(ExperimentConfig(**config, resume=True)).run_complete_pipeline()
        assert "\n" not in str(error.value)
        (folder / name).unlink()
        made = IntegratedMLPipeline(ExperimentConfig(**config, resume=True))
        (again,), _ = made.evaluate([made.search_and_train("lightning_cnn")])
        assert again.test["macro_f1"] == summary["models"][0]["test"]["macro_f1"]
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


def test_weights_that_another_run_put_in_their_place_are_not_reported_as_ones_own(tiny_npz, tmp_path):
    runs = [
        IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, enable_optuna=False, seed=seed)))
        for seed in (0, 1)
    ]
    first = runs[0].train_final_model("lightning_cnn")
    runs[1].train_final_model("lightning_cnn")
    with pytest.raises(DamagedFileError, match="another run has replaced it"):
        runs[0].evaluate([first])


def test_a_checkpoint_that_scores_otherwise_than_its_history_is_refused(tiny_npz, tmp_path):
    run = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, enable_optuna=False)))
    record = run.train_final_model("lightning_cnn")
    run.evaluate([record])
    better = record.history | {"val_macro_f1": [record.val_macro_f1 + 0.05] * 2}
    with pytest.raises(DamagedFileError, match="It is not what was trained"):
        run.evaluate([replace(record, history=better)])


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("read", [read_checkpoint, lambda file: load_trained(Scripted, file, expected=None)])
def test_a_checkpoint_that_asks_for_other_code_is_refused_before_it_runs(read, tmp_path):
    CheckpointFiles().save_checkpoint({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "best.ckpt")  # well sealed
    with pytest.raises(DamagedFileError, match="cannot be loaded safely"):
        read(tmp_path / "best.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_training_is_not_gone_on_with_from_a_checkpoint_that_asks_for_other_code(tiny_npz, tmp_path):
    run = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, enable_optuna=False)))
    run.train_final_model("lightning_cnn")
    folder = tmp_path / "checkpoints/tiny/lightning_cnn"
    (folder / "finished.json").unlink()  # as if it had been cut off
    state = torch.load(folder / "resume.ckpt", weights_only=True)
    CheckpointFiles().save_checkpoint(state | {"more": Hostile(tmp_path / "ran")}, folder / "resume.ckpt")
    again = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path, enable_optuna=False, resume=True)))
    with pytest.raises(DamagedFileError, match="cannot be loaded safely"):
        again.train_final_model("lightning_cnn")
    assert not (tmp_path / "ran").exists()


# --- one run a folder

HOLDER = """
import sys, time
from pathlib import Path
from waferlab.training.checkpoints import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_told_who_holds_it_until_that_one_dies(tiny_npz, tmp_path):
    folder = tmp_path / "results" / "tiny"
    holder = warm.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holds\n"
        run = IntegratedMLPipeline(ExperimentConfig(**settings(tiny_npz, tmp_path)))
        with pytest.raises(FolderInUseError, match=rf"in use by process {holder.pid} on .*--output-dir"):
            run.run_complete_pipeline()
        assert not list((tmp_path / "checkpoints/tiny").glob("*/*"))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with hold_folder(folder):
            pass
    finally:
        holder.kill()


FORK = 'os.fork() or (time.sleep(1.5), open(sys.argv[1] + "/gone", "w"), os._exit(0))'
OF_TWO = HOLDER.replace('print("holds"', f'{FORK}\n    print("holds"')


def test_who_goes_on_after_a_kill_waits_for_the_workers_of_the_program_that_was_killed(tmp_path):
    holder = warm.Popen(
        [sys.executable, "-c", f"import os{OF_TWO}", tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "holds\n"
    holder.kill()
    holder.wait()
    assert not (tmp_path / "gone").exists()
    with hold_folder(tmp_path):
        assert (tmp_path / "gone").exists()  # as the worker says in the end


def test_two_runs_of_one_program_do_not_share_a_folder_either(tmp_path):
    with hold_folder(tmp_path), pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):  # and it is free again
        pass


def test_what_a_program_that_was_killed_had_begun_to_write_is_swept_up_and_what_others_write_is_not(tmp_path):
    (tmp_path / "model").mkdir()
    gone, other = 2**22 + 1, f".started.json.elsewhere-{2**22 + 1}.tmp"  # as of a container beside this one
    live = f".started.json.{where_numbers_hold()}-{os.getppid()}.tmp"
    for name in (f".started.json.{where_numbers_hold()}-{gone}.tmp", live, other):
        (tmp_path / "model" / name).write_text("{")
    (tmp_path / ".of-a-user.tmp").write_text("precious")
    with hold_folders(tmp_path):
        pass
    left = {file.name for file in tmp_path.rglob(".*")}
    assert left == {".lock", ".of-a-user.tmp", live, other}


def test_a_link_that_somebody_has_put_there_has_no_other_file_emptied(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.write_text("precious")
    (folder / ".lock").symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"), hold_folder(folder):
        pass
    temporary(folder / "summary.json").symlink_to(other)
    write_summary(folder / "summary.json", {"a": 1})
    (folder / ".lock").unlink()
    (folder / ".writable").symlink_to(other)
    with hold_folders(folder):
        pass
    (folder / "best.ckpt.unfinished").symlink_to(other)
    CheckpointFiles().save_checkpoint({"a": torch.ones(1)}, folder / "best.ckpt")
    assert other.read_text() == "precious" and json.loads((folder / "summary.json").read_text())["a"] == 1
    assert read_checkpoint(folder / "best.ckpt")["a"] == 1
