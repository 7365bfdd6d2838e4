"""What a failed capture leaves behind is undone: with fakes that leave it as PyTorch 2.11 does."""

import contextlib
import gc
import weakref

import pytest
import torch

from deco_kernels.flow import cuda_graphs
from deco_kernels.flow.cuda_graphs import CaptureFailed

POOL = (0, 7)


class Device:
    """The state of a device that captures change, and the names of the calls that change it."""

    def __init__(self):
        self.stream, self.pools, self.capturing_generator = "callers", [], False
        self.invalid = self.ended = False
        self.calls = []

    @contextlib.contextmanager
    def set_stream(self, stream):
        previous, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = previous

    def destroy_graph(self, *_):
        """Not permitted during a capture, and the error is not raised."""
        self.invalid |= self.capturing_generator

    @contextlib.contextmanager
    def graph(self, graph, pool=None):
        """If the capture is invalid, ending it raises before anything is restored."""
        self.calls.append("begin")
        previous, self.stream = self.stream, "of the capture"
        self.pools.append(pool)
        self.capturing_generator, self.invalid = True, False
        try:
            yield
        finally:
            self.calls.append("end")
            if self.invalid and not self.ended:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.pools.remove(pool)
            self.capturing_generator, self.stream = False, previous

    def end_pool(self, index, pool):
        self.calls.append("end pool")
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def release_pool(self, index, pool):
        self.calls.append("release pool")

    def wait(self):
        """What invalidates a capture, such as waiting for a value."""
        self.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def device(monkeypatch):
    fake, callers, zeros = Device(), Stream(), torch.zeros
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: callers)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: fake.set_stream("callers" if s is callers else "side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release_pool, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: fake.calls.append("kernel") or zeros(*size))
    return fake


def assert_as_before(device):
    assert device.stream == "callers" and not device.pools and not device.capturing_generator


def test_a_capture_warms_up_on_a_side_stream(device):
    streams = []
    _, result = cuda_graphs.capture(
        call=lambda: streams.append(device.stream) or "result", warm_up=lambda: streams.append(device.stream)
    )
    assert result == "result" and streams == ["side", "of the capture"] and device.calls == ["begin", "end"]
    assert_as_before(device)


def leave_garbage(device):
    """A graph in a reference cycle, as that of a sampler that is not used any more."""
    cycle = Stream()
    cycle.itself = cycle
    weakref.finalize(cycle, device.destroy_graph)


def collect():
    """What Python does after some allocations, unless collection is disabled."""
    if gc.isenabled():
        gc.collect()


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_collected_during_a_capture(device, fails):
    leave_garbage(device)

    def call():
        collect()
        assert not device.invalid
        return device.wait() if fails else "result"

    with pytest.raises(CaptureFailed, match="not permitted") if fails else contextlib.nullcontext():
        cuda_graphs.capture(call, warm_up=lambda: None)
    assert gc.isenabled()
    assert_as_before(device)


def test_collection_that_the_caller_has_disabled_stays_disabled(device):
    gc.disable()
    try:
        cuda_graphs.capture(lambda: None, warm_up=lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_failed_capture_is_undone(device):
    """The memory pool first, then the generator, by a capture that succeeds on the stream of the caller."""
    with pytest.raises(CaptureFailed, match="not permitted when stream is capturing"):
        cuda_graphs.capture(call=device.wait, warm_up=lambda: None)
    assert device.calls == ["begin", "end", "end pool", "release pool", "begin", "kernel", "end"]
    assert_as_before(device)


def test_a_call_that_hides_the_failure_is_undone(device):
    def call():
        with contextlib.suppress(RuntimeError):
            device.wait()

    with pytest.raises(CaptureFailed, match="due to a previous error"):
        cuda_graphs.capture(call, warm_up=lambda: None)
    assert_as_before(device)


def test_a_capture_that_ended_is_not_ended_again(device):
    device.ended = True
    with pytest.raises(CaptureFailed, match="not permitted"):
        cuda_graphs.capture(call=device.wait, warm_up=lambda: None)
    assert "release pool" not in device.calls
    assert_as_before(device)


def test_errors_of_the_call_itself_are_raised_as_they_are(device):
    with pytest.raises(TypeError, match="velocity"):
        cuda_graphs.capture(call=lambda: exec("raise TypeError('velocity')"), warm_up=lambda: None)
    assert_as_before(device)
