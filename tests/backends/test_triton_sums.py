"""The compiled mean of LayerNorm: sums that are exact for equal channels, in both layouts that h has in kernels."""

import itertools
import os
import re

import pytest
import torch

from benchmarks.static import triton_kernels
from tests.backends.architectures import in_make_test
from tests.installed import installed

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing"),
]


def terms_of_sums(code: str) -> set[tuple[int, int]]:
    """(terms left, terms right) of every floating-point addition in LLVM code without branches.

    An addition has the terms of both sides. Any other instruction, such as a shuffle between threads, has those of its
    operands, and a result that depends on no addition has one. Lanes of a vector that are poison or -0 have none.
    """
    terms: dict[str, list[int]] = {}  # per lane
    sums = set()
    for result, instruction in re.findall(r"^ +%(\S+) = (.*)$", code, re.MULTILINE):
        operands = [terms[name] for name in re.findall(r"%(\w+)", instruction) if name in terms]
        place = int((re.findall(r"i64 (\d+)", instruction) or [0])[-1])
        match instruction.split()[0]:
            case "fadd":
                assert re.match(r"fadd (float|<\d x float>) %", instruction), f"may be reordered: {instruction}"
                sums |= {pair for pair in zip(*operands, strict=True) if all(pair)}
                found = [sum(pair) for pair in zip(*operands, strict=True)]
            case _ if "vector.reduce.fadd" in instruction:  # in order of the lanes
                (start,), lanes = operands
                before = list(itertools.accumulate(lanes, initial=start))
                sums |= set(zip(before, lanes, strict=False))
                found = before[-1:]
            case "extractelement":
                found = [operands[0][place]]
            case "insertelement":
                vector, scalar = operands if len(operands) == 2 else ([0] * _lanes(instruction), *operands)
                found = [*vector[:place], *scalar, *vector[place + 1 :]]
            case "shufflevector":
                lanes = [*operands[0], *([0] * _lanes(instruction) if len(operands) == 1 else operands[1])]
                places = re.findall(r"i32 (\w+)", instruction.rpartition("<")[2])
                found = [0 if place == "poison" else lanes[int(place)] for place in places]
            case "bitcast" if instruction.count(f"<{_lanes(instruction)} x") == 2:
                found = operands[0]
            case _:
                found = [max([1, *itertools.chain(*operands)])] * _lanes(instruction)
        terms[result] = found
    return sums


def _lanes(instruction: str) -> int:
    """Lanes of a vector instruction, from its first type."""
    return int((re.findall(r"<(\d+) x", instruction) or [1])[0])


@pytest.mark.parametrize("architecture", in_make_test(triton_kernels.ARCHITECTURES))
@pytest.mark.parametrize(("width", "warps"), [(32, 4), pytest.param(16, 4, marks=pytest.mark.aot_all), (64, 8)])
def test_sums_of_equal_channels_are_exact(architecture, width, warps):
    """Every addition has two sides of as many terms; equal channels make them equal, and doubling is exact."""
    installed("triton")
    from deco_kernels.backends.triton import functions, launching
    from deco_kernels.backends.triton.table import Launch
    from tests.backends import small_kernels

    if not functions.SUMS_IN_PAIRS.value:
        pytest.skip("this Triton adds in order; mean_of takes a second pass, as in the interpreted tests")
    x, means = torch.empty(128, width, dtype=torch.bfloat16), torch.empty(2, 128)
    with launching.record_launches(architecture) as recorded:
        launching.launch(small_kernels.row_means, (1,), Launch(128, warps, 1, 1), x, means, BLOCK=128, D=width)
    found = terms_of_sums(triton_kernels.compile_launch(recorded[0], architecture).asm["llir"])
    assert found == {(terms, terms) for terms in (2**level for level in range(width.bit_length() - 1))}


def test_a_sequential_sum_is_noticed():
    code = """
      %1 = load <2 x float>, ptr %x
      %2 = extractelement <2 x float> %1, i64 0
      %3 = extractelement <2 x float> %1, i64 1
      %4 = fadd float %2, %3
      %5 = fadd float %4, %2
    """
    assert terms_of_sums(code) == {(1, 1), (2, 1)}
