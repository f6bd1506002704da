"""Promises about how quickly a network learns here: measured without a trace, and the threads that are quickest now."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_up import Scripted

from waferlab.tracking.processes import usable_cores
from waferlab.training import pace
from waferlab.training.pace import PROBE_STEPS, TRY_AGAIN, QuickestThreads, possible_precisions, seconds_a_step

ROOT = Path(__file__).resolve().parents[2]

# --- precision


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine can: its GPU, whether that computes in bfloat16, and what its processor has."""

    def can(*, gpu=False, bf16=False, **capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    return can


@pytest.mark.parametrize(
    ("has", "accelerator", "possible"),
    [
        ({}, "auto", ("32-true",)),
        ({"avx512_bf16": True}, "auto", ("32-true", "bf16-mixed")),
        ({"amx_bf16": True}, "cpu", ("32-true", "bf16-mixed")),
        ({"avx512_bf16": False, "amx_bf16": False}, "cpu", ("32-true",)),
        ({"gpu": True, "bf16": True}, "auto", ("bf16-mixed",)),
        ({"gpu": True}, "gpu", ("32-true",)),
        ({"gpu": True, "bf16": True, "amx_bf16": True}, "cpu", ("32-true", "bf16-mixed")),
        ({"amx_bf16": True}, "mps", ("32-true",)),
    ],
)
def test_a_precision_is_possible_where_the_hardware_computes_in_it(has, accelerator, possible, machine):
    machine(**has)
    assert possible_precisions(accelerator) == possible


@pytest.fixture
def batch():
    return torch.randint(0, 3, (8, 1, 16, 16), dtype=torch.uint8), torch.arange(8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_measurement_leaves_the_model_the_random_state_and_the_threads_as_they_were(precision, batch, monkeypatch):
    model, threads = Scripted(learning_rate=0.1).eval(), []
    model.network(torch.zeros(1, 1, 16, 16)).sum().backward()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradients, random = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert seconds_a_step(model, batch, precision=precision, accelerator="cpu") > 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random) and not model.training
    assert threads == [1, 7]


def test_threads_are_given_back_when_a_measurement_fails(batch, monkeypatch):
    threads, model = [], Scripted()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    model.network = torch.nn.Linear(3, 3)  # which takes no maps
    with pytest.raises(RuntimeError):
        seconds_a_step(model, batch, precision="32-true", accelerator="cpu")
    assert threads == [1, 7]


@pytest.mark.parametrize(("precision", "autocast"), [("32-true", False), ("bf16-mixed", True)])
def test_steps_are_measured_in_the_asked_precision_on_encoded_maps_and_the_first_is_not_counted(
    precision, autocast, batch, monkeypatch
):
    seen, took = [], iter([9.0, 0.1, 0.3, 0.2])
    clock = SimpleNamespace(now=0.0)

    class Watched(Scripted):
        def forward(self, images):
            seen.append((torch.is_autocast_enabled("cpu"), images.min().item(), images.dtype, self.training))
            clock.now += next(took)
            return super().forward(images)

    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert seconds_a_step(Watched(), batch, precision=precision, accelerator="cpu") == pytest.approx(0.2)
    assert seen == [(autocast, -1.0, torch.float32, True)] * PROBE_STEPS


# --- threads


class Machine:
    """Steps of a training that take as long as is said of each number of threads."""

    def __init__(self, monkeypatch, **settings):
        self.now, self.threads, self.taken = 100.0, None, []
        monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now))
        monkeypatch.setattr(
            pace, "torch", SimpleNamespace(set_num_threads=self._take, get_num_threads=lambda: self.threads)
        )
        self.callback = QuickestThreads(**settings)

    def _take(self, threads):
        self.threads = threads
        self.taken.append(threads)

    def steps(self, number, seconds, *, slow_first=0.0):
        """So many steps; the first with another number of threads may take longer."""
        before = None
        for _ in range(number):
            self.callback.on_train_batch_start(None, None, None, 0)
            self.now += seconds[self.threads] + (slow_first if self.threads != before else 0.0)
            before = self.threads
            self.callback.on_train_batch_end(None, None, None, None, 0)


QUIET, BUSY = {1: 0.4, 2: 0.3, 4: 0.2, 6: 0.25}, {1: 0.4, 2: 0.9, 4: 1.5, 6: 2.0}


@pytest.mark.parametrize(("most", "tried"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_all_numbers_of_threads_are_tried_at_the_start_from_one_on(most, tried, monkeypatch):
    machine = Machine(monkeypatch, most=most)
    machine.callback.on_train_start(None, None)
    assert machine.taken == [1]
    machine.steps(PROBE_STEPS * len(tried), dict.fromkeys(tried, 0.1))
    assert machine.taken[: len(tried)] == tried and len(machine.taken) == len(tried) + 1


@pytest.mark.parametrize(("seconds", "quickest"), [(QUIET, 4), (BUSY, 1)])
def test_the_quickest_is_taken_and_the_first_step_with_each_not_counted(seconds, quickest, monkeypatch):
    machine = Machine(monkeypatch, most=6)
    machine.callback.on_train_start(None, None)
    machine.steps(4 * PROBE_STEPS, seconds, slow_first=5.0)
    assert machine.threads == quickest
    assert machine.callback.seconds == pytest.approx(seconds)
    machine.steps(10, seconds)
    assert machine.threads == quickest and len(machine.taken) == 5


def test_it_is_tried_again_when_steps_become_slower(monkeypatch):
    machine = Machine(monkeypatch, most=6)
    machine.callback.on_train_start(None, None)
    machine.steps(4 * PROBE_STEPS, QUIET)
    assert machine.threads == 4
    machine.steps(7, {4: 1.29 * 0.2})  # a little slower is no reason
    assert machine.threads == 4 and len(machine.taken) == 5
    machine.steps(4, BUSY | {4: 0.3})
    assert machine.taken[5:] == [1]
    machine.steps(4 * PROBE_STEPS, BUSY)
    assert machine.threads == 1 and machine.callback.seconds == pytest.approx(BUSY)


def test_it_is_tried_again_after_a_while_as_the_machine_may_have_become_quiet(monkeypatch):
    machine = Machine(monkeypatch, most=6)
    machine.callback.on_train_start(None, None)
    machine.steps(4 * PROBE_STEPS, BUSY)
    assert machine.threads == 1
    machine.steps(int(TRY_AGAIN / 0.4) - 1, BUSY)
    assert machine.threads == 1 and len(machine.taken) == 5
    machine.steps(2 + 4 * PROBE_STEPS, QUIET)
    assert machine.threads == 4 and machine.taken[5:9] == [1, 2, 4, 6]


def test_most_is_the_number_of_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(pace, "cores", lambda: 3)
    assert QuickestThreads()._choices == [1, 2, 3]


@pytest.mark.parametrize(("told", "taken"), [("", 3), ("1", 1), ("2", 2), ("8", 3), ("0", 3), ("many", 3)])
def test_who_leaves_cores_to_others_by_openmps_variable_has_no_more_taken(monkeypatch, told, taken):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(pace, "TOLD", told)
    assert pace.cores() == taken


def test_where_the_system_does_not_say_which_cores_a_process_may_use_it_has_all_as_on_macos(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores() == 5


@pytest.mark.long
def test_what_ultralytics_does_to_that_variable_is_no_word_of_a_user():
    code = (
        "import os; {}; from waferlab.training.pace import TOLD; print(repr(TOLD), os.environ.get('OMP_NUM_THREADS'))"
    )
    imports = {
        "from waferlab.models.yolo import import_ultralytics_tasks as tasks; tasks()": "'' None",
        "import ultralytics": "'' 1",
    }
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for first, printed in imports.items():
        command = [sys.executable, "-c", code.format(first)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == printed
    told = subprocess.run(
        [sys.executable, "-c", code.format("pass")], cwd=ROOT, env=env | {"OMP_NUM_THREADS": "3,1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == "'3' 3,1"
