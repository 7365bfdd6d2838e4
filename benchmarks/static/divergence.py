"""Finds instructions of compiled kernels that need all lanes of a warp and may run while some lanes are elsewhere.

The compiler opens a region (BSSY) before a branch on which lanes may differ, and closes it (BSYNC) where they meet
again. Between such a branch and the end of its innermost region, a warp may be split. BRA.DIV or WARPSYNC before a
shuffle handle a split warp.
"""

import re
from collections import Counter

from benchmarks.static import sass

COLLECTIVES = ("HMMA", "LDSM", "STSM", "MOVM", "SHFL", "BAR")

# Kernels whose loops all lanes of a warp repeat equally often, although the compiler cannot know it.
UNIFORM_WARPS = {
    "decoder_embedding.embedding_kernel": "a warp loops over its own tiles; other conditions are parameters",
    "flow_matching_loss_backward.spectrum_kernel": "a warp loops over its own groups of 8x8 blocks",
}


def check(kernel: str, code: sass.Code) -> None:
    """Raise RuntimeError if a split warp may reach a collective instruction of a kernel not in UNIFORM_WARPS."""
    exposed = exposed_collectives(code)
    if exposed and kernel.split("+")[0] not in UNIFORM_WARPS:
        raise RuntimeError(
            f"{kernel}: a warp may be split at {dict(exposed)}, which need all lanes; move them out of the branch, or "
            "name the kernel in benchmarks.static.divergence.UNIFORM_WARPS if no branch differs between lanes"
        )


def exposed_collectives(code: sass.Code) -> Counter[str]:
    """Opcode -> number of collective instructions that a split warp may reach."""
    instructions = code.instructions
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    regions = [(i, place[_target(x)]) for i, x in enumerate(instructions) if x.opcode.startswith("BSSY")]
    reached: set[int] = set()
    for i, instruction in enumerate(instructions):
        around = [region for region in regions if region[0] < i < region[1]]
        if around and _may_split(instruction):
            _, end = max(around)
            reached |= _reachable(instructions, place, [i + 1, place[_target(instruction)]], end)
    collectives = (i for i in reached if _base(instructions[i]) in COLLECTIVES and not _is_guarded(instructions, i))
    return Counter(_base(instructions[i]) for i in collectives)


def _base(instruction: sass.Instruction) -> str:
    return instruction.opcode.split(".")[0]


def _target(instruction: sass.Instruction) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", instruction.text)[-1], 16)


def _may_split(instruction: sass.Instruction) -> bool:
    """Whether it is a branch that depends on a predicate of the lanes."""
    return instruction.opcode == "BRA" and re.match(r"@!?P\d", instruction.text) is not None


def _reachable(instructions: list[sass.Instruction], place: dict[int, int], starts: list[int], end: int) -> set[int]:
    """Indices of the instructions that control reaches from `starts` before the region ends at index `end`."""
    found: set[int] = set()
    while starts:
        i = starts.pop()
        instruction = instructions[i]
        if i in found or i == end or (_base(instruction) == "BSYNC" and i + 1 == end):
            continue
        found.add(i)
        if _base(instruction) == "BRA":
            starts.append(place[_target(instruction)])
        leaves = _base(instruction) in ("BRA", "EXIT", "RET") and not instruction.text.startswith("@")
        if not leaves or instruction.opcode.startswith("BRA.DIV"):
            starts.append(i + 1)
    return found


def _is_guarded(instructions: list[sass.Instruction], i: int) -> bool:
    before = (instruction.opcode for instruction in instructions[max(0, i - 2) : i])
    return any(opcode.startswith(("BRA.DIV", "WARPSYNC")) for opcode in before)
