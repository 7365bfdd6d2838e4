"""Peak memory of contenders: their names, and what it contains."""

import subprocess
import sys

import pytest

from benchmarks.harness import memory
from benchmarks.ops.sizes import Size
from deco_kernels.machine import default_heap

BACKENDS = ("reference", "cpu")


def test_contenders():
    assert memory.contenders_in("pixel_decoder", BACKENDS) == ["published", *BACKENDS]
    two_ops = ["cpu two ops keeping cond", "cpu two ops"]
    assert memory.contenders_in("pixel_decoder_loss_from_tokens", BACKENDS) == [*two_ops, "cpu"]


@pytest.mark.parametrize("code, said, status", [(1, "a\nb", "failed"), (-11, "", "failed"), (-9, "", "unavailable")])
def test_a_contender_that_fails_is_not_called_unavailable(monkeypatch, code, said, status):
    """Unless the system killed it, as where memory runs out."""
    answer = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: answer)
    for row in memory.measure_memory("pixel_decoder", 8, "cpu", "float32", ("cpu",), 1):
        assert row["status"] == status and row["reason"] == ("b" if said else f"the process ended with status {code}")


GROWTH = """
import sys, torch
from benchmarks.harness import memory
from benchmarks.ops.sizes import Size
torch.set_num_threads(1)
size = Size(height=16, width=16)
print(memory.step_growth("pixel_decoder_loss_from_tokens", size, sys.argv[1], torch.float32, "cpu"))
"""


@pytest.mark.parametrize("name", memory.contenders_in("pixel_decoder_loss_from_tokens", ("cpu",)))
def test_growth_contains_the_gradient_of_up_weight(name):
    """Even for a single token. In a process of its own, whose heap has no free memory from other tests."""
    size = Size(height=16, width=16)
    gradient = 4 * size.patch_pixels * size.decoder_width * size.token_width
    command = [sys.executable, "-c", GROWTH, name]
    growth = subprocess.run(command, env=default_heap(), capture_output=True, text=True, check=True).stdout
    assert int(growth) >= 0.9 * gradient
