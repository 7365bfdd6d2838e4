"""Collective instructions that a split warp may reach are found in compiled code."""

import pytest

from benchmarks.static import divergence, sass


def code_of(*texts: str) -> sass.Code:
    """A kernel with these instructions; "to 4" at the end of one is the address of the fifth."""
    instructions = []
    for i, text in enumerate(texts):
        text, _, target = text.partition(" to ")
        text = f"{text}, {16 * int(target):#x}" if target else text
        opcode = text.split()[1] if text.startswith("@") else text.split()[0]
        instructions.append(sass.Instruction(16 * i, opcode.rstrip(","), text))
    return sass.Code(32, 0, instructions)


BRANCH = ("BSSY B0 to 5", "{before}", "@P0 BRA to 4", "{inside}", "BSYNC B0", "{after}", "EXIT")


def branch(before="MOV R1, R2", inside="MOV R1, R2", after="MOV R1, R2", branch="@P0 BRA to 4"):
    places = {"{before}": before, "{inside}": inside, "{after}": after, "@P0 BRA to 4": branch}
    return code_of(*(places.get(text, text) for text in BRANCH))


@pytest.mark.parametrize("collective", ["HMMA.16816.F32 R4, R4, R8, R4", "SHFL.BFLY PT, R2, R3, 0x1, 0x1f"])
def test_a_collective_after_the_branch_is_exposed(collective):
    name = collective.split(".")[0]
    assert divergence.exposed_collectives(branch(inside=collective)) == {name: 1}
    for elsewhere in (branch(before=collective), branch(after=collective)):
        assert not divergence.exposed_collectives(elsewhere)
    assert not divergence.exposed_collectives(branch(inside=collective, branch="@UP0 BRA to 4"))


def test_a_loop_exposes_its_body():
    loop = ("BSSY B0 to 5", "MOV R1, R2", "HMMA.16816.F32 R4, R4, R8, R4", "@!P1 BRA to 1", "BSYNC B0", "EXIT")
    assert divergence.exposed_collectives(code_of(*loop)) == {"HMMA": 1}


def test_the_innermost_region_ends_the_split():
    nested = ("BSSY B0 to 7", "BSSY B1 to 4", "@P0 BRA to 3", "BSYNC B1", "LDSM.16 R1, [R2]", "MOV R1, R2", "BSYNC B0")
    assert not divergence.exposed_collectives(code_of(*nested, "EXIT"))


def test_guarded_shuffles_are_safe():
    shuffle = "SHFL.BFLY PT, R2, R3, 0x1, 0x1f"
    texts = ("BSSY B0 to 6", "@P0 BRA to 5", "BRA.DIV UR4 to 7", shuffle, "MOV R1, R2", "BSYNC B0", "EXIT")
    fallback = ("WARPSYNC.COLLECTIVE R38 to 9", shuffle, "BRA to 4")
    assert not divergence.exposed_collectives(code_of(*texts, *fallback))


def test_only_named_kernels_may_have_exposed_collectives():
    code = branch(inside="MOVM.16.MT88 R1, R2")
    with pytest.raises(RuntimeError, match="tile.some_kernel.*: .*'MOVM': 1.*UNIFORM_WARPS"):
        divergence.check("tile.some_kernel+first", code)
    for kernel in divergence.UNIFORM_WARPS:
        divergence.check(f"{kernel}+first", code)
