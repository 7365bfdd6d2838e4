"""Compiled kernels multiply and add alike for all strides of the images."""

import os
import re

import pytest
import torch

from benchmarks.static import triton_kernels
from deco_kernels import testing
from tests.installed import installed
from tests.ops.cases import transposed

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing"),
]


def products(code: str) -> set[str]:
    """Every float32 multiplication in PTX code, as an expression of constants and of ? for all other values."""
    values: dict[str, str] = {}
    found = set()
    for instruction, result, operands in re.findall(
        r"^\s+(mul|fma\.rn|selp)\.f32\s+(%\w+), ([^;]+);", code, re.MULTILINE
    ):
        parts = [values.get(name, name if name.startswith("0f") else "?") for name in operands.split(", ")]
        if instruction != "selp":
            parts[:2] = sorted(parts[:2])
        values[result] = f"{instruction}({', '.join(parts)})"
        if instruction != "selp":
            found.add(values[result])
    return found


@pytest.mark.aot_all
@pytest.mark.parametrize("names", [("target",), ("pred", "target")], ids="+".join)
def test_the_color_transform_of_the_loss_rounds_alike(names):
    """Transposed images change the layout of the tiles, and with it what the compiler makes of plain sums."""
    installed("triton")
    found = []
    for view in (torch.clone, transposed):
        inputs = testing.random_inputs("flow_matching_loss", dtype=torch.bfloat16, image_size=(1, 16, 32))
        inputs.tensors.update({name: view(inputs.tensors[name]) for name in names})
        launches = {launch.kernel.fn.__name__: launch for launch in triton_kernels.launches_of(inputs, "sm_90")}
        found.append(products(triton_kernels.compile_launch(launches["spectrum_kernel"], "sm_90").asm["ptx"]))
    assert len(found[0]) > 3 and found[0] == found[1]
