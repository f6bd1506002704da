"""Promises about memory: what a step frees, the next one has; where it does not suffice, batches come in parts."""

import platform
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT
from made_up import pipeline

from waferlab.training.memory import keep_freed_memory

STEPS = """
import ctypes, resource, sys
from waferlab.training.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def step():
    pieces = [ctypes.create_string_buffer(4 * 2**20) for _ in range(20)]
    for piece in pieces:
        ctypes.memset(piece, 1, len(piece))

step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step(), step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, cwd=ROOT, check=True)
    return int(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="says what glibc does")
def test_the_memory_that_a_step_frees_is_there_for_the_next():
    assert keep_freed_memory()
    assert page_faults("kept") < 0.1 * page_faults("as ever")


def test_where_there_is_no_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("waferlab.training.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


# --- where it does not suffice

LIMITED = """
import resource, sys
import lightning.pytorch as pl
sys.path.insert(0, "tests")
from made_up import Scripted, pipeline
from torch import nn
from waferlab.models.registry import MODEL_REGISTRY, ModelSpec

class Copies(nn.Module):  # 4 MiB of activations a map; convolutions would also need memory of oneDNN's own
    def forward(self, x):
        return x.repeat(1, 65536).relu().view(len(x), -1, 16).mean(1)

class Large(Scripted):
    def __init__(self, **training):
        super().__init__(**training)
        self.network.insert(2, Copies())

class Limit(pl.Callback):
    def on_train_start(self, trainer, model):
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

MODEL_REGISTRY["large"] = ModelSpec(Large, defaults={"learning_rate": 1e-3, "dropout": 0.1})
made = pipeline(sys.argv[1], sys.argv[2], model_type="large", batch_size=64, image_size=64)
model = made.create_model("large")
made.fit("large", model, made.data_module(), [Limit()], max_epochs=1, batches=1)
print("parts", model.parts)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory hold on Linux")
def test_a_step_that_the_memory_does_not_suffice_for_is_done_in_parts_and_it_is_said_once(tiny_npz, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tiny_npz, tmp_path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("parts ")[2]) > 1
    assert done.stderr.count("The memory does not suffice for a batch at once") == 1


class Fails(pl.Callback):
    """Has the first steps of a training end as if there were no more memory, in the middle of their gradients."""

    def __init__(self, times):
        self.times = times

    def on_after_backward(self, trainer, model):
        if self.times:
            self.times -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


def weights_after(times, tiny_npz, tmp_path, **more):
    made = pipeline(tiny_npz, tmp_path, data_augmentation=False, **more)
    pl.seed_everything(0, verbose=False)
    model = made.create_model("scripted", {"dropout": 0.0}, class_weights=[1.0, 2, 3, 4, 5, 6, 7, 8, 9])
    made.fit("scripted", model, made.data_module(), [Fails(times)], max_epochs=1)
    return model.parts, torch.cat([p.flatten() for p in model.parameters()]), model.trainer.callback_metrics


def test_parts_add_up_to_the_step_of_the_whole_batch(scripted, tiny_npz, tmp_path):
    whole, in_parts = (weights_after(times, tiny_npz, tmp_path) for times in (0, 2))
    assert (whole[0], in_parts[0]) == (1, 4)
    torch.testing.assert_close(in_parts[1], whole[1], rtol=1e-4, atol=1e-6)
    assert float(in_parts[2]["train_loss"]) == pytest.approx(float(whole[2]["train_loss"]), rel=0.02)


def test_where_single_maps_are_too_much_or_another_error_is_raised_it_is_raised(scripted, tiny_npz, tmp_path):
    with pytest.raises(RuntimeError, match="can't allocate"):
        weights_after(99, tiny_npz, tmp_path)
    with pytest.raises(RuntimeError, match="can't allocate"):
        weights_after(1, tiny_npz, tmp_path, accumulate_grad_batches=2)
