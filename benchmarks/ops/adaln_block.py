"""adaln_block: one decoder block."""

from benchmarks.ops.problem import Problem, Shapes
from benchmarks.ops.sizes import Size


class AdalnBlock(Problem):
    op = "adaln_block"
    activations = trained = ("h", "cond")

    def leading(self, size: Size) -> tuple[int, ...]:
        return (size.tokens, size.patch_pixels)

    def outputs(self, size: Size) -> Shapes:
        return {"out": (size.tokens, size.patch_pixels, size.decoder_width)}

    def multiply_adds(self, size: Size, training: bool) -> int:
        """Modulation 3D² and two linears of D²; training adds the same again for weights and for activations."""
        return size.pixels * 5 * size.decoder_width**2 * (3 if training else 1)


PROBLEM = AdalnBlock()
