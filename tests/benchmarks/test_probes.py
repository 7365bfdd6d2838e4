"""The probes of single instructions: what their loops hold on every architecture. They need a GPU to run."""

import collections

import pytest

from benchmarks.gpu_check import probes
from benchmarks.static import sass
from tests.installed import installed

PER_ITERATION = 64


def test_modeled_cycles_are_those_of_the_instruction_s_pipe():
    expected = {"mma.sync m16n8k16": 6.26, "wgmma m64n32k16": 24.7, "wgmma m64n96k16": 48.7, "tanh": 8.75}
    expected |= {"ldmatrix.x4": 16, "shuffle": 4, "FFMA": 1}
    expected |= {"ldmatrix.x4 and two mma.sync": 16, "mma.sync and four FFMA": pytest.approx(10.26)}
    assert {name: probes.modeled_cycles(name, "90a") for name in probes.OPCODES} == expected


@pytest.mark.aot
@pytest.mark.skipif(probes.cuda_tool("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a", "100", "120"])
def test_the_loop_of_a_probe_holds_its_instruction(tmp_path, architecture):
    """As often as it is counted: the compiler has merged, folded or moved none, and there is no other work."""
    installed("triton", reason="cuobjdump comes with Triton")
    cubin = probes.compile_source(architecture, tmp_path / "probes.cubin", "-cubin")
    every = {opcode for counts in probes.OPCODES.values() for opcode in counts}
    wanted = [{opcode: PER_ITERATION * n for opcode, n in counts.items()} for counts in probes.OPCODES.values()]
    if architecture != "90a":
        wanted = [counts for counts in wanted if not any(opcode.startswith("HGMMA") for opcode in counts)]
    found = []
    for code in sass.read_all(cubin).values():
        assert code.spill_bytes == 0
        for first, last in sass.loops(code):
            opcodes = [i.opcode for i in code.instructions if first <= i.address <= last]
            counts = collections.Counter(opcode for opcode in opcodes if opcode in every)
            if counts:
                assert len(opcodes) <= 2.2 * sum(counts.values())
                found.append(dict(counts))
    assert sorted(sorted(counts.items()) for counts in found) == sorted(sorted(counts.items()) for counts in wanted)


@pytest.fixture
def pretended_program(tmp_path, monkeypatch):
    """A program in place of the compiled one."""
    program = tmp_path / "probes"
    monkeypatch.setattr(probes, "program", lambda architecture: program)
    monkeypatch.setattr(probes, "cuda_tool", lambda name: None)
    return program


def test_measured_cycles_are_printed_beside_modeled_ones(pretended_program, capsys):
    pretended_program.write_text('#!/bin/sh\necho \'{"probe": "FFMA", "cycles": 1.01}\'\nexit 1\n')
    pretended_program.chmod(0o755)
    assert probes.main("90a") == 1
    assert capsys.readouterr().out == '{"probe": "FFMA", "cycles": 1.01, "modeled": 1.0}\n'


def test_without_a_compiler_the_probes_are_refused(pretended_program):
    with pytest.raises(RuntimeError, match="no nvcc on PATH"):
        probes.main("90a")
