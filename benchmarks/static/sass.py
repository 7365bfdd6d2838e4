"""Parses compiled NVIDIA code: registers, spills, and the instructions of a kernel's steady loop by pipe.

Uses cuobjdump and nvdisasm from Triton's wheel; needs no GPU.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # with suffixes, such as "LDG.E.128"
    text: str


class Code(NamedTuple):
    registers: int
    spill_bytes: int
    instructions: list[Instruction]


_PIPES = {
    "fp32": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"),
    "special": ("MUFU",),
    "shared": ("LDS", "LDSM", "STS", "STSM", "SHFL", "ATOMS"),
    "global": ("LDG", "STG", "LDL", "STL", "LDGSTS", "ATOMG", "RED"),
    "tensor": ("HMMA", "HGMMA", "IMMA", "UTCHMMA", "UTCQMMA"),
    "other": ("BRA", "EXIT", "BSSY", "BSYNC", "NOP", "CALL", "RET", "WARPSYNC", "BAR", "DEPBAR", "LDGDEPBAR", "SYNCS",
              "WARPGROUP", "LDC", "LDCU", "ULDC", "S2R", "S2UR", "R2UR", "CS2R", "MEMBAR", "FENCE", "ERRBAR", "CCTL"),
}  # fmt: skip
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}
_UNIFORM = "other"  # the uniform datapath uses only an issue slot


def pipe_of(opcode: str) -> str:
    """Pipe that executes an instruction; "alu" for those that no table names."""
    base = opcode.split(".")[0]
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    return _UNIFORM if base.startswith("U") else "alu"


def access_bytes(opcode: str) -> int:
    """Bytes that a load or store of shared memory moves per thread."""
    if match := re.search(r"\.(?:[US](8|16)|(64|128))\b", opcode):
        return int(match[1] or match[2]) // 8
    return 4


def copies_to_shared(opcode: str) -> bool:
    """Whether an access of global memory (cp.async) also writes shared memory."""
    return opcode.split(".")[0] == "LDGSTS"


def shared_passes(opcode: str) -> int:
    """Accesses of 128 bytes that a warp instruction makes to shared memory, without bank conflicts."""
    if opcode.startswith(("LDSM", "STSM")):
        return int(opcode.rpartition(".")[2]) if opcode[-1].isdigit() and opcode[-2] == "." else 1
    return max(1, access_bytes(opcode) // 4)


def mma_shape(opcode: str) -> str | None:
    """ "16816" for m16n8k16."""
    shape = re.search(r"\.(1684|1688|16816)\b", opcode)
    return shape[1] if shape else None


def tool(name: str) -> Path:
    """A tool of Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def read(cubin: bytes) -> Code:
    """Parses a cubin with a single kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = read_all(Path(file.name)).values()
    return code


def read_all(cubin: Path) -> dict[str, Code]:
    """The kernels of a cubin by mangled name."""
    usage = dict(re.findall(r"Function (\w+):\s+(REG:.*)", _run("cuobjdump", "-res-usage", cubin)))
    listings = re.split(r"\n\s*Function : (\w+)\n", _run("cuobjdump", "-sass", cubin))
    kernels = {}
    for name, listing in zip(listings[1::2], listings[2::2], strict=True):
        registers, stack = (int(re.search(rf"{what}:(\d+)", usage[name])[1]) for what in ("REG", "STACK"))
        kernels[name] = Code(registers, stack, list(_instructions(listing)))
    return kernels


def read_lines(cubin: Path) -> dict[str, dict[int, set[tuple[str, int]]]]:
    """For a cubin compiled with -lineinfo: kernel -> instruction address -> its (file, line) and those of the calls it
    is inlined into."""
    sections = re.split(r"\n\.text\.(\w+):\n", _run("nvdisasm", "-gi", "-c", cubin))
    return {name: _lines(listing) for name, listing in zip(sections[1::2], sections[2::2], strict=True)}


def _lines(listing: str) -> dict[int, set[tuple[str, int]]]:
    lines, places, complete = {}, set(), False
    for text in listing.splitlines():
        if "//## File" in text:
            if complete:
                places, complete = set(), False
            places |= {(file, int(number)) for file, number in re.findall(r'"([^"]+)", line (\d+)', text)}
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/", text):
            lines[int(match[1], 16)] = places
            complete = True
    return lines


def _run(name: str, *arguments) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(listing: str) -> Iterator[Instruction]:
    for line in listing.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match:
            text = match[2].strip()
            opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
            yield Instruction(int(match[1], 16), opcode, text)


def loops(code: Code) -> list[tuple[int, int]]:
    """(first, last) address of every loop (backward branch), largest first."""
    found = set()
    for instruction in code.instructions:
        if instruction.opcode.split(".")[0] == "BRA":
            target = re.search(r"0x([0-9a-f]+)", instruction.text)
            if target and int(target[1], 16) < instruction.address:
                found.add((int(target[1], 16), instruction.address))
    return sorted(found, key=lambda loop: (loop[0] - loop[1], loop))


def is_inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] < inner[0] and inner[1] <= outer[1]


def steady_counts(code: Code, inner_trips: int) -> dict[str, float]:
    """Opcode -> executed warp instructions of one iteration of the outermost loop.

    Without a loop the whole kernel counts. An inner loop runs `inner_trips` times.
    """
    found = loops(code)
    outer = found[0] if found else (0, code.instructions[-1].address)
    inside = [loop for loop in found if is_inside(loop, outer)]

    def executions(address: int) -> int:
        if not outer[0] <= address <= outer[1]:
            return 0
        return inner_trips if any(first <= address <= last for first, last in inside) else 1

    return counts(code, executions)


def counts(code: Code, executions: Callable[[int], float]) -> dict[str, float]:
    """Opcode -> executed warp instructions. The instruction at an address is executed executions(address) times."""
    total: dict[str, float] = defaultdict(float)
    for instruction in code.instructions:
        if times := executions(instruction.address):
            total[instruction.opcode] += times
    return total
