"""upsample_modulate: upsample, modulation linear, LayerNorm and modulation of one block."""

from benchmarks.names import SAVING_MEMORY
from benchmarks.ops.problem import Problem, Shapes
from benchmarks.ops.sizes import Size


class UpsampleModulate(Problem):
    op = "upsample_modulate"
    activations = trained = ("h", "tokens")

    def other_choice(self, backend: str) -> tuple[str, dict[str, bool]]:
        return SAVING_MEMORY, {"save_memory": True}

    def outputs(self, size: Size) -> Shapes:
        shape = (size.tokens, size.patch_pixels, size.decoder_width)
        return {"modulated": shape, "gate": shape}

    def multiply_adds(self, size: Size, training: bool) -> int:
        """Upsample and modulation linear; training adds the same again for weights and for activations."""
        per_pixel = size.decoder_width * size.token_width + 3 * size.decoder_width**2
        return size.pixels * per_pixel * (3 if training else 1)


PROBLEM = UpsampleModulate()
