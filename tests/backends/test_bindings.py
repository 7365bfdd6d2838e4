"""Calls of the native modules: they reject tuples with one integer more or fewer, and an extra argument, and they
release the GIL."""

import re
import sys
import threading

import pytest
import torch

from deco_kernels import native, testing
from deco_kernels.testing import emulation
from tests.ops.cases import KERNEL_OPS, OPS, small_inputs


class Recorder:
    """Wraps a native module and records the arguments of its calls."""

    def __init__(self, module):
        self.module, self.calls = module, {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] = arguments
            return getattr(self.module, name)(*arguments)

        return call


def refuses_other_numbers(recorder):
    """Every function rejects an extra argument and one integer more or fewer, with its name and the argument's."""
    assert recorder.calls
    for name, arguments in recorder.calls.items():
        function = getattr(recorder.module, name)
        listed = re.search("Arguments: (.*)[.] Written", function.__doc__)
        fields = listed[1].split(", ") if listed else [r"\w+"] * len(arguments)  # workspace queries list none
        for changed in {arguments[:-1], (*arguments, 0)} - {arguments}:
            with pytest.raises(TypeError, match=rf"^{name}: expected {len(arguments)} arguments|^{name}\(\): incompat"):
                function(*changed)
        for place, (field, value) in enumerate(zip(fields, arguments, strict=True)):
            if isinstance(value, tuple):
                for changed in (value[:-1], (*value, 0)):
                    said = rf"^{name}: {field}: expected {len(value)} integers, got {len(changed)}"
                    with pytest.raises(ValueError, match=said):
                        function(*arguments[:place], changed, *arguments[place + 1 :])


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")
@pytest.mark.parametrize("op", OPS)
def test_cpu_bindings_refuse_other_numbers_of_integers(op, monkeypatch):
    recorder = Recorder(native.cpu())
    monkeypatch.setattr(native, "cpu", lambda: recorder)
    testing.run(small_inputs(op, torch.bfloat16), "cpu")
    refuses_other_numbers(recorder)


@pytest.mark.emulate
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_cuda_bindings_refuse_other_numbers_of_integers(emulated, op, monkeypatch):
    recorder = Recorder(emulated)
    monkeypatch.setattr(native, "cuda", lambda device: recorder)
    testing.run(small_inputs(op, torch.bfloat16), emulation.BACKEND)
    refuses_other_numbers(recorder)


class WithAnotherThread:
    """Wraps a native module; repeats its calls of `name` until another thread has run during one of them."""

    def __init__(self, module, name):
        self.module, self.name, self.has_run = module, name, False

    def __getattr__(self, name):
        return self.repeat if name == self.name else getattr(self.module, name)

    def repeat(self, *arguments):
        may_run, running = threading.Event(), threading.Event()
        other = threading.Thread(target=lambda: may_run.wait() and running.set())
        other.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # seconds: no thread has to give the GIL away
        try:
            may_run.set()
            for _ in range(200):
                getattr(self.module, self.name)(*arguments)
                self.has_run = running.is_set()
                if self.has_run:
                    break
        finally:
            sys.setswitchinterval(interval)
            other.join()


@pytest.mark.skipif(native.cpu_unavailable_reason() is not None, reason="needs the native CPU module")
def test_cpu_bindings_release_the_gil(monkeypatch):
    module = WithAnotherThread(native.cpu(), "pixel_decoder_forward")
    monkeypatch.setattr(native, "cpu", lambda: module)
    testing.run(small_inputs("pixel_decoder", torch.bfloat16, image_size=(2, 64, 64)), "cpu")
    assert module.has_run


@pytest.mark.emulate
def test_cuda_bindings_release_the_gil(emulated, monkeypatch):
    module = WithAnotherThread(emulated, "adaln_block_forward")
    monkeypatch.setattr(native, "cuda", lambda device: module)
    testing.run(small_inputs("adaln_block", torch.bfloat16), emulation.BACKEND)
    assert module.has_run
