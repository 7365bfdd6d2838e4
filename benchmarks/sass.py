"""Reads compiled NVIDIA code: registers, spills, and the instructions of a kernel's steady loop by pipe.

Needs cuobjdump, which Triton's wheel carries; nothing here runs on a GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its suffixes: "LDG.E.128"
    text: str


class Code(NamedTuple):
    registers: int
    spill_bytes: int
    instructions: list[Instruction]


# Pipe of the H100 family -> cycles for which one warp instruction occupies it, per scheduler (a quarter of an SM).
PIPE_CYCLES = {
    "issue": 1,
    "fp32": 1,  # 128 lanes per SM
    "alu": 2,  # 64 lanes per SM: integer, logic, compare, convert
    "mufu": 8,  # 16 lanes per SM: special functions
    "memory": 4,  # 32 lanes per SM, shared by the four schedulers: shared and global memory, shuffles
    "tensor": 4,  # m16n8k16; the wide asynchronous form is counted by its size
    "other": 1,
}
_PIPES = {
    "fp32": ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"),
    "mufu": ("MUFU",),
    "memory": ("LDG", "LDS", "LDSM", "STS", "STSM", "STG", "LDL", "STL", "SHFL", "LDGSTS", "ATOMG", "ATOMS", "RED"),
    "tensor": ("HMMA", "HGMMA", "IMMA", "UTCHMMA", "UTCQMMA"),
    "other": ("BRA", "EXIT", "BSSY", "BSYNC", "NOP", "CALL", "RET", "WARPSYNC", "BAR", "DEPBAR", "LDGDEPBAR", "SYNCS",
              "WARPGROUP", "LDC", "LDCU", "ULDC", "S2R", "S2UR", "R2UR", "CS2R", "MEMBAR", "FENCE", "ERRBAR", "CCTL"),
}  # fmt: skip
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}
_UNIFORM = "other"  # the uniform data path takes an issue slot and nothing else


def pipe_of(opcode: str) -> str:
    base = opcode.split(".")[0]
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    return _UNIFORM if base.startswith("U") else "alu"


def tool(name: str) -> Path:
    """A tool of Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def read(cubin: bytes) -> Code:
    """The only kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("-res-usage", file.name)
        listing = _run("-sass", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise ValueError(f"cuobjdump reports no resource usage:\n{usage}")
    return Code(int(registers[1]), int(stack[1]), list(_instructions(listing)))


def _run(option: str, path: str) -> str:
    return subprocess.run([tool("cuobjdump"), option, path], capture_output=True, text=True, check=True).stdout


def _instructions(listing: str) -> Iterator[Instruction]:
    for line in listing.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match:
            text = match[2].strip()
            opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
            yield Instruction(int(match[1], 16), opcode, text)


def _loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) address of every backward branch's body."""
    found = set()
    for instruction in instructions:
        if instruction.opcode.split(".")[0] == "BRA":
            target = re.search(r"0x([0-9a-f]+)", instruction.text)
            if target and int(target[1], 16) < instruction.address:
                found.add((int(target[1], 16), instruction.address))
    return sorted(found)


def _size(loop: tuple[int, int]) -> int:
    return loop[1] - loop[0]


def steady_counts(code: Code, inner_trips: int) -> tuple[Counter, float]:
    """Executed warp instructions of one turn of the outermost loop, by pipe, and tensor-pipe cycles.

    Without a loop the whole kernel counts. A loop inside runs `inner_trips` times.
    """
    loops = _loops(code.instructions)
    outer = max(loops, key=_size) if loops else (0, code.instructions[-1].address)
    inside = [loop for loop in loops if loop[0] > outer[0] and loop[1] <= outer[1]]
    counts: Counter = Counter()
    tensor_cycles = 0.0
    for instruction in code.instructions:
        if not outer[0] <= instruction.address <= outer[1]:
            continue
        trips = inner_trips if any(first <= instruction.address <= last for first, last in inside) else 1
        pipe = pipe_of(instruction.opcode)
        counts[pipe] += trips
        counts["issue"] += trips
        if pipe == "tensor":
            tensor_cycles += trips * _tensor_cycles(instruction.opcode)
    return counts, tensor_cycles


def _tensor_cycles(opcode: str) -> float:
    """Multiply-adds of the instruction over 512 (bfloat16) or 256 (TF32) per cycle and scheduler."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if shape:
        rows, columns, depth = (int(size) for size in shape.groups())
        products = rows * columns * depth / 4  # four warps share a wide product
    else:
        size = re.search(r"\.(1684|1688|16816)\b", opcode)
        products = {"1684": 512, "1688": 1024, "16816": 2048}[size[1] if size else "16816"]
    return products / (256 if "TF32" in opcode else 512)
