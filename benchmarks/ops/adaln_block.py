"""adaln_block: one decoder block."""

from benchmarks.ops.pixel_decoder import block_shapes
from benchmarks.ops.problem import Problem, Shapes
from benchmarks.ops.sizes import Size


class AdalnBlock(Problem):
    op = "adaln_block"
    activations = trained = ("h", "cond")

    def arguments(self, size: Size) -> Shapes:
        rows = (size.tokens, size.patch_pixels, size.decoder_width)
        weights = {name: shape[1:] for name, shape in block_shapes(size).items()}
        return {"h": rows, "cond": rows, **weights}

    def outputs(self, size: Size) -> Shapes:
        return {"out": (size.tokens, size.patch_pixels, size.decoder_width)}

    def multiply_adds(self, size: Size, training: bool) -> int:
        """Modulation 3D² and two linears of D²; training adds the same again for weights and for activations."""
        return size.pixels * 5 * size.decoder_width**2 * (3 if training else 1)


PROBLEM = AdalnBlock()
