"""Choice of backend: argument, context manager, environment, automatic; fallbacks and their log lines."""

import inspect
import logging
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import deco_kernels
from deco_kernels import native, ops
from deco_kernels.backends.support import backends_table
from deco_kernels.ops import registry
from deco_kernels.ops.registry import Request
from deco_kernels.signatures import OPS, flat, grouped
from tests.ops.cases import F32

ROOT = Path(__file__).resolve().parents[2]


def test_no_private_name_of_pytorch():
    """Renames in PyTorch must not break the ops, which fix only the lowest version. `torch._foreach_*` is public."""
    for path in Path(ops.__file__).parent.glob("*.py"):
        text = path.read_text().replace("torch._foreach_", "torch.foreach_")
        names = set(re.findall(r"\b\w+\._[a-zA-Z]\w*", text))
        assert all(name.endswith("._replace") for name in names), (path, names)
        assert not re.search(r"torch\._|from torch.* import .*\b_", text), path


def test_order_of_choice():
    assert registry.chosen_backend(None) == "auto"
    with deco_kernels.use_backend("reference"):
        assert registry.chosen_backend(None) == "reference"
        assert registry.chosen_backend("cpu") == "cpu"
        with deco_kernels.use_backend("auto"):
            assert registry.chosen_backend(None) == "auto"
        assert registry.chosen_backend(None) == "reference"
    assert registry.chosen_backend(None) == "auto"


def test_the_block_ends_with_an_exception_too():
    with pytest.raises(KeyError), deco_kernels.use_backend("reference"):
        raise KeyError
    assert registry.chosen_backend(None) == "auto"


def test_one_block_object_can_be_entered_twice():
    block = deco_kernels.use_backend("reference")
    with block, deco_kernels.use_backend("cpu"):
        with block:
            assert registry.chosen_backend(None) == "reference"
        assert registry.chosen_backend(None) == "cpu"
    assert registry.chosen_backend(None) == "auto"


@pytest.mark.parametrize(("value", "error"), [("fast", ValueError), (None, TypeError), (3, TypeError)])
def test_use_backend_refuses_unknown_names(value, error):
    with pytest.raises(error, match="backend"):
        deco_kernels.use_backend(value)


# Imports the package once for each value of the variable, in a fork.
ENVIRONMENT = """
import os, sys, torch
for value in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["DECO_KERNELS_BACKEND"] = value
        from deco_kernels.ops import registry
        try:
            print(registry.chosen_backend(None), flush=True)
        except ValueError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_environment():
    command = [sys.executable, "-c", ENVIRONMENT, "reference", "", "typo"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chosen, default, refused = output.splitlines()
    assert (chosen, default) == ("reference", "auto") and "DECO_KERNELS_BACKEND: unknown name 'typo'" in refused


def test_automatic_candidates():
    assert registry.automatic_candidates(Request("pixel_decoder", "cpu", (F32,))) == ("cpu", "reference")
    assert registry.automatic_candidates(Request("pixel_decoder", "cpu", (torch.float64,))) == ("reference",)
    assert registry.automatic_candidates(Request("pixel_decoder", "cuda", (F32,))) == ("cuda", "triton", "reference")
    assert registry.automatic_candidates(Request("pixel_decoder", "mps", (F32,))) == ("reference",)


def test_fall_back_to_the_reference_is_logged_once_as_a_warning(caplog):
    request = Request("pixel_decoder", "cpu", (F32, F32), 40, 1, 16, 3)
    registry.log_fallback.cache_clear()
    with caplog.at_level(logging.INFO, "deco_kernels"):
        for depth in (1, 1, 1):
            registry.serving_module.cache_clear()
            registry.serving_module("auto", request._replace(depth=depth), torch.device("cpu"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "pixel_decoder" in caplog.text and "'cpu'" in caplog.text


def test_a_registered_backend_is_used_by_name_only():
    registry.register_backend("twin", "deco_kernels.backends.reference")
    try:
        request = Request("pixel_decoder", "cpu", (F32, F32), 32, 1, 16, 3)
        module = registry.serving_module("twin", request, torch.device("cpu"))
        assert module.__name__ == "deco_kernels.backends.reference.pixel_decoder"
        assert "twin" not in registry.automatic_candidates(request)
    finally:
        registry.packages.pop("twin")
        registry.serving_module.cache_clear()


def test_an_op_that_a_backend_lacks(tmp_path, monkeypatch):
    package = tmp_path / "lacking_backend"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def unavailable_reason(device): return None\ndef unsupported_reason(request): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.register_backend("lacking", "lacking_backend")
    try:
        with pytest.raises(deco_kernels.BackendUnavailable, match="does not implement adaln_block"):
            registry.serving_module("lacking", Request("adaln_block", "cpu", (F32,), 32), torch.device("cpu"))
    finally:
        registry.packages.pop("lacking")
        registry.serving_module.cache_clear()


@pytest.mark.parametrize("op", [op for op in OPS if op != "frequency_loss"])
def test_the_pages_hold_the_tables_of_arguments(op):
    page = (ROOT / "docs" / f"{op}.md").read_text(encoding="utf-8")
    assert OPS[op].table() in page


def test_the_readme_holds_the_table_of_backends():
    assert backends_table(("reference", "cpu", "triton", "cuda")) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("op", OPS)
def test_the_description_is_the_public_signature(op):
    """Public functions are written out by hand: their tensors are the described ones, in order."""
    parameters = inspect.signature(getattr(ops, op)).parameters
    assert [name for name in parameters if name in OPS[op].names] == list(OPS[op].names)
    assert [name for name, value in parameters.items() if value.annotation is torch.Tensor] == [
        argument.name for argument in OPS[op].arguments if not argument.optional
    ]


def test_groups_hold_the_tensors_in_order():
    group = grouped(OPS["pixel_decoder"].group, range(15))
    assert flat(group) == list(range(15))
    assert (group.weights.blocks.modulation.norm_weight, group.weights.head_bias) == (4, 13)


def test_the_name_auto_is_reserved():
    with pytest.raises(ValueError, match="reserved"):
        registry.register_backend("auto", "deco_kernels.backends.reference")


def test_a_native_module_that_was_built_loads():
    """Otherwise all tests of the cpu backend would be skipped silently."""
    if not list(Path(deco_kernels.__file__).parent.glob("_native_cpu*")):
        pytest.skip("the native CPU module is not built")
    assert native.cpu_unavailable_reason() is None


def test_a_native_module_of_older_sources_says_rebuild(monkeypatch):
    class Old:
        __file__ = "_native_cpu.so"

        def select_isa(self, name):
            pass

    monkeypatch.setattr(native.importlib, "import_module", lambda name: Old())
    native.load_cpu.cache_clear()
    try:
        reason = native.cpu_unavailable_reason()
        assert "Rebuild" in reason and "_native_cpu.so" in reason and "pixel_decoder_forward" in reason
        assert "select_isa" not in reason
        with pytest.raises(ImportError, match="Rebuild"):
            native.cpu()
    finally:
        monkeypatch.undo()
        native.load_cpu.cache_clear()


@pytest.mark.parametrize(
    ("backend", "call", "functions"),
    [
        ("cpu", r"native\.cpu\(\)\.(\w+)", native.CPU_FUNCTIONS),
        ("cuda", r"\bmodule\.((?!\w*_workspace)\w+)", native.CUDA_FUNCTIONS),
    ],
)
def test_every_function_that_the_backend_calls_is_asked_for(backend, call, functions):
    called = set()
    for path in (Path(deco_kernels.__file__).parent / "backends" / backend).glob("*.py"):
        called |= set(re.findall(call, path.read_text()))
    assert called and called <= set(functions)


def test_a_cuda_module_of_older_sources_is_refused(monkeypatch):
    old = types.ModuleType("deco_kernels._native_cuda")
    old.__file__ = "_native_cuda.so"
    for name in native.CUDA_FUNCTIONS[:-1]:
        setattr(old, name, None)
    monkeypatch.setitem(sys.modules, old.__name__, old)
    native.load_cuda.cache_clear()
    try:
        reason = native.cuda_unavailable_reason()
        assert "Rebuild" in reason and "DECO_KERNELS_BUILD=cuda" in reason and "lacks scaled_product." in reason
        old.scaled_product = None
        native.load_cuda.cache_clear()
        assert native.cuda_unavailable_reason() is None
        del old.padded_rows  # of sources whose decoder keeps no activations, with other arguments
        native.load_cuda.cache_clear()
        assert "lacks padded_rows." in native.cuda_unavailable_reason()
    finally:
        monkeypatch.undo()
        native.load_cuda.cache_clear()


@pytest.mark.parametrize("name", ["flow_matching_loss", "frequency_loss"])
def test_a_refused_loss_is_named_as_it_was_called(name):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(deco_kernels.BackendUnavailable, match=f"cannot serve {name}: "):
        getattr(ops, name)(images, images, torch.ones(3, 8, 8, dtype=torch.float64), backend="cpu")
