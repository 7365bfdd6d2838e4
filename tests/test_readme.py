"""The code blocks of README.md run unchanged, in order, with small models under the published names."""

import ast
import re
from pathlib import Path

import pytest
import torch

from deco_kernels import model
from deco_kernels.model import presets
from tests.tiny_qwen3 import HIDDEN, save_tiny_qwen3

README = Path(__file__).resolve().parents[1] / "README.md"
SMALL = dict(width=8, depth=1, heads=1, decoder_width=16, decoder_depth=1)


@pytest.fixture
def small_models(monkeypatch, tmp_path):
    for name, sizes in (("deco-xl/16", {}), ("deco-xxl/16", dict(text_depth=1, text_width=HIDDEN, text_length=32))):
        cls, arguments = presets.PRESETS[name]
        monkeypatch.setitem(presets.PRESETS, name, (cls, {**arguments, **SMALL, **sizes}))
    folder, encoder = save_tiny_qwen3(tmp_path / "encoder"), model.Qwen3TextEncoder
    small = lambda name: encoder(str(folder), max_length=32, width=HIDDEN)  # noqa: E731
    monkeypatch.setattr(model, "Qwen3TextEncoder", small)


def test_python_blocks(small_models, capsys, one_thread):
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = {}
    exec(first, found)
    printed = ast.literal_eval(capsys.readouterr().out)
    assert list(printed) == ["total", "pixel", "frequency"] and all(value > 0 for value in printed.values())
    assert all(parameter.grad is not None for name, parameter in found["net"].named_parameters() if "head" in name)
    assert torch.equal(found["samples"], found["noise"])  # as stated below the block
    exec(second, found)
    assert found["samples"].shape == (1, 3, 512, 512) and found["samples"].isfinite().all()
