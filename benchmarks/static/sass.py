"""Parses compiled NVIDIA code: registers, spills, and the instructions of a kernel's steady loop by pipe.

Uses cuobjdump and nvdisasm from Triton's wheel; needs no GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
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


# Pipe on Hopper -> cycles that one warp instruction occupies it, per scheduler (a quarter of an SM).
PIPE_CYCLES = {
    "issue": 1,
    "fp32": 1,  # 128 lanes per SM
    "alu": 2,  # 64 lanes per SM: integer, logic, compare, convert
    "mufu": 8,  # 16 lanes per SM: special functions
    "memory": 4,  # 32 lanes per SM, shared by the four schedulers: shared and global memory, shuffles
    "tensor": 4,  # m16n8k16; wgmma is counted by its shape
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
_UNIFORM = "other"  # the uniform datapath uses only an issue slot


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


def steady_counts(code: Code, inner_trips: int) -> tuple[Counter, float]:
    """Executed warp instructions of one iteration of the outermost loop, by pipe, and tensor-pipe cycles.

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


def counts(code: Code, executions: Callable[[int], float]) -> tuple[Counter, float]:
    """Executed warp instructions by pipe ("issue": all of them) and tensor-pipe cycles. The instruction at an address
    is executed executions(address) times."""
    total: Counter = Counter()
    tensor_cycles = 0.0
    for instruction in code.instructions:
        times = executions(instruction.address)
        if times:
            pipe = pipe_of(instruction.opcode)
            total[pipe] += times
            total["issue"] += times
            if pipe == "tensor":
                tensor_cycles += times * _tensor_cycles(instruction.opcode)
    return total, tensor_cycles


def _tensor_cycles(opcode: str) -> float:
    """Multiply-adds of the instruction over 512 (bfloat16) or 256 (TF32) per cycle and scheduler."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if shape:
        rows, columns, depth = (int(size) for size in shape.groups())
        products = rows * columns * depth / 4  # four warps share one wgmma
    else:
        size = re.search(r"\.(1684|1688|16816)\b", opcode)
        products = {"1684": 512, "1688": 1024, "16816": 2048}[size[1] if size else "16816"]
    return products / (256 if "TF32" in opcode else 512)
