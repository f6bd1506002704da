"""Promises about memory: what a step frees, the next one has without asking the system."""

import subprocess
import sys

import pytest
from conftest import ROOT

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


def test_the_memory_that_a_step_frees_is_there_for_the_next():
    if not keep_freed_memory():
        pytest.skip("no glibc")
    assert page_faults("kept") < 0.1 * page_faults("as ever")


def test_where_there_is_no_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("waferlab.training.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
