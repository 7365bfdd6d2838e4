"""The tensor arguments of every op, in order: one list for the public functions, the operators and the backends."""

_BLOCK = (
    "norm_weight",
    "norm_bias",
    "mod_weight",
    "mod_bias",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
)
DECODER_WEIGHTS = ("pixel_weight", "pixel_table", *_BLOCK, "head_weight", "head_bias")

TENSORS = {
    "adaln_block": ("h", "cond", *_BLOCK),
    "upsample_modulate": ("h", "tokens", "up_weight", "up_bias", *_BLOCK[:4]),
    "pixel_decoder": ("image", "cond", *DECODER_WEIGHTS),
    "pixel_decoder_from_tokens": ("image", "tokens", "up_weight", "up_bias", *DECODER_WEIGHTS),
    "flow_matching_loss": ("pred", "target", "frequency_weight", "sample_weight"),
    "frequency_loss": ("pred", "target", "frequency_weight", "sample_weight"),
}

MATMUL_WEIGHTS = frozenset(("up_weight", "pixel_weight", "mod_weight", "fc1_weight", "fc2_weight", "head_weight"))
"""Rounded to the activation dtype before use, as eager autocast does; every other weight keeps its value."""
